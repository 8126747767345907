// Connected components of every volume of a batch, by union-find on the foreground alone.
// (Playne and Hawick, IEEE Transactions on Parallel and Distributed Systems 29(6), 2018,
// doi:10.1109/TPDS.2018.2799216: the root of a tree is its smallest index, and links are minima, so
// that the order in which threads run leaves no trace.)
//
// `parents` holds index + 1 of a voxel's parent, 0 on background, and the labels in the end: a batch
// is read once and written once. What follows runs over the chunks' lists of foreground voxels.
// `sizes` is defined on the foreground only: voxels of a component at its root, then its label.

__device__ __forceinline__ int root_of(const int* parents, int voxel) {
    for (int parent; (parent = load(parents + voxel) - 1) != voxel;) voxel = parent;
    return voxel;
}

__device__ __forceinline__ void join(int* parents, int one, int other) {
    for (;;) {
        one = root_of(parents, one);
        other = root_of(parents, other);
        if (one == other) return;
        if (one < other) {
            int smaller = one;
            one = other;
            other = smaller;
        }
        int before = atomicMin(parents + one, other + 1) - 1;
        if (before == one) return;
        one = before;  // somebody else has linked it meanwhile: that link has to be kept too
    }
}

// tail: 1 positive, -1 negative, 0 both.
extern "C" __global__ void threshold(
    const Bits* maps, const Bits* cutoffs, int tail, int n_voxels, int chunks,
    int* parents, int* sizes, int* lists, int* n_listed
) {
    Chunk chunk = own_chunk(n_voxels, chunks);
    Bits cutoff = cutoffs[chunk.volume];
    Bits values[ITEMS];
    read_chunk(maps + chunk.offset, chunk.first, n_voxels, values);
    bool marked[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        int i = chunk.first + j * THREADS + (int)threadIdx.x;
        Bits magnitude = values[j] & ~SIGN;
        bool in_tail = tail == 0 || (tail < 0) == (values[j] >= SIGN);
        marked[j] = i < n_voxels && in_tail && magnitude >= cutoff && magnitude <= INFINITE;
        if (i < n_voxels) parents[chunk.offset + i] = marked[j] ? i + 1 : 0;
        if (marked[j]) sizes[chunk.offset + i] = 0;
    }
    list_marked(marked, chunk.first, own_list(lists), n_listed + blockIdx.x);
}

// neighbours: bit d for the neighbour at (d / 9 - 1, d / 3 % 3 - 1, d % 3 - 1), d < 13, which come
// before a voxel in C order. by_sign: values of opposite signs are not joined.
extern "C" __global__ void merge(
    const Bits* maps, int n_voxels, int ny, int nz, int chunks, unsigned neighbours, int by_sign,
    int* parents, int* lists, const int* n_listed
) {
    Chunk chunk = own_chunk(n_voxels, chunks);
    const int* list = own_list(lists);
    maps += chunk.offset;
    parents += chunk.offset;
    int n = n_listed[blockIdx.x];
    for (int k = threadIdx.x; k < n; k += THREADS) {
        int i = list[k];
        if (load(parents + i) == 0) continue;  // no longer marked
        int z = i % nz, y = i / nz % ny, x = i / nz / ny;
        for (int d = 0; d < 13; d++) {
            int dx = d / 9 - 1, dy = d / 3 % 3 - 1, dz = d % 3 - 1;
            if (!(neighbours >> d & 1) || x + dx < 0 || y + dy < 0 || y + dy >= ny) continue;
            if (z + dz < 0 || z + dz >= nz) continue;
            int other = i + (dx * ny + dy) * nz + dz;
            if (load(parents + other) == 0) continue;
            if (by_sign && (maps[i] ^ maps[other]) >= SIGN) continue;
            join(parents, i, other);
        }
    }
}

extern "C" __global__ void flatten(
    int n_voxels, int chunks, int* parents, int* sizes, int* lists, const int* n_listed
) {
    Chunk chunk = own_chunk(n_voxels, chunks);
    const int* list = own_list(lists);
    parents += chunk.offset;
    int n = n_listed[blockIdx.x];
    for (int strip = 0; strip < n; strip += THREADS) {
        int k = strip + threadIdx.x, root = -1;
        if (k < n && load(parents + list[k]) != 0) {
            root = root_of(parents, list[k]);
            store(parents + list[k], root + 1);
        }
        // Neighbours in the list mostly share a root: one addition for all of them in a warp.
        unsigned same = __match_any_sync(ALL, root);
        bool is_first = (same & ((1u << threadIdx.x % 32) - 1)) == 0;
        if (root >= 0 && is_first) atomicAdd(sizes + chunk.offset + root, __popc(same));
    }
}

__device__ __forceinline__ bool is_kept(
    const int* parents, const int* sizes, int voxel, int min_voxels
) {
    return parents[voxel] == voxel + 1 && sizes[voxel] >= min_voxels;
}

extern "C" __global__ void count_kept(
    int n_voxels, int chunks, int min_voxels, const int* parents, const int* sizes,
    int* lists, const int* n_listed, int* n_kept
) {
    Chunk chunk = own_chunk(n_voxels, chunks);
    const int* list = own_list(lists);
    int n = n_listed[blockIdx.x], kept = 0;
    for (int strip = 0; strip < n; strip += THREADS) {
        int k = strip + threadIdx.x;
        kept += __syncthreads_count(
            k < n && is_kept(parents + chunk.offset, sizes + chunk.offset, list[k], min_voxels)
        );
    }
    if (threadIdx.x == 0) n_kept[blockIdx.x] = kept;
}

// One block a volume: replace the chunks' numbers of components by the sums of those before.
extern "C" __global__ void number_chunks(int chunks, int* n_kept, int* counts) {
    n_kept += (long long)blockIdx.x * chunks;
    int before = 0;
    for (int strip = 0; strip < chunks; strip += THREADS) {
        int k = strip + threadIdx.x, total;
        int place = before + sum_before(k < chunks ? n_kept[k] : 0, &total);
        if (k < chunks) n_kept[k] = place;
        before += total;
    }
    if (threadIdx.x == 0) counts[blockIdx.x] = before;
}

// Replace the sizes at the roots by labels: 1..n in C order of the roots, 0 for the small ones.
extern "C" __global__ void number(
    int n_voxels, int chunks, int min_voxels, const int* parents, int* sizes,
    int* lists, const int* n_listed, const int* n_before
) {
    Chunk chunk = own_chunk(n_voxels, chunks);
    const int* list = own_list(lists);
    parents += chunk.offset;
    sizes += chunk.offset;
    int n = n_listed[blockIdx.x], label = n_before[blockIdx.x] + 1;
    for (int strip = 0; strip < n; strip += THREADS) {
        int k = strip + threadIdx.x, total;
        bool kept = k < n && is_kept(parents, sizes, list[k], min_voxels);
        int own = label + sum_before(kept, &total);
        if (k < n && parents[list[k]] == list[k] + 1) sizes[list[k]] = kept ? own : 0;
        label += total;
    }
}

// Replace parents by labels, and count the labelled voxels of each chunk.
extern "C" __global__ void write_labels(
    int n_voxels, int chunks, int* parents, const int* sizes,
    int* lists, const int* n_listed, int* n_labelled
) {
    Chunk chunk = own_chunk(n_voxels, chunks);
    const int* list = own_list(lists);
    parents += chunk.offset;
    sizes += chunk.offset;
    int n = n_listed[blockIdx.x], labelled = 0;
    for (int strip = 0; strip < n; strip += THREADS) {
        int k = strip + threadIdx.x, label = 0;
        if (k < n && parents[list[k]] != 0) {
            label = sizes[parents[list[k]] - 1];
            parents[list[k]] = label;
        }
        labelled += __syncthreads_count(label != 0);
    }
    if (threadIdx.x == 0) n_labelled[blockIdx.x] = labelled;
}

// The labelled voxels of the batch in C order, chunk by chunk.
extern "C" __global__ void gather_labelled(
    int n_voxels, int chunks, const int* labels, int* lists, const int* n_listed,
    const long long* ends, int* index, int* label
) {
    Chunk chunk = own_chunk(n_voxels, chunks);
    const int* list = own_list(lists);
    labels += chunk.offset;
    long long begin = blockIdx.x ? ends[blockIdx.x - 1] : 0;
    int n = n_listed[blockIdx.x];
    for (int strip = 0; strip < n; strip += THREADS) {
        int k = strip + threadIdx.x, total;
        int own = k < n ? labels[list[k]] : 0;
        long long place = begin + sum_before(own != 0, &total);
        if (own) {
            index[place] = list[k];
            label[place] = own;
        }
        begin += total;
    }
}
