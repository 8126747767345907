// Voxels that are the maximum of their window: the few that beat the voxels next to them are listed,
// and only they look at the whole window. The plateaus they form are components, as in components.cu.

// reach: 1, or 0 where the window is the voxel itself.
extern "C" __global__ void list_candidates(
    const Bits* maps, const Bits* floors, int nx, int ny, int nz, int chunks, int reach,
    int* parents, int* sizes, int* lists, int* n_listed
) {
    int n_voxels = nx * ny * nz;
    Chunk chunk = own_chunk(n_voxels, chunks);
    Bits floor_key = ordered_key(floors[chunk.volume]);
    maps += chunk.offset;
    Bits values[ITEMS];
    read_chunk(maps, chunk.first, n_voxels, values);
    bool marked[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        int i = chunk.first + j * THREADS + (int)threadIdx.x;
        Bits height = ordered_key(values[j]);
        marked[j] = i < n_voxels && height > floor_key;
        if (i >= n_voxels) continue;
        int z = i % nz, y = i / nz % ny, x = i / nz / ny;
        for (int d = 0; d < 27 && marked[j] && reach; d++) {
            int dx = d / 9 - 1, dy = d / 3 % 3 - 1, dz = d % 3 - 1;
            if (x + dx < 0 || x + dx >= nx || y + dy < 0 || y + dy >= ny) continue;
            if (z + dz < 0 || z + dz >= nz) continue;
            marked[j] = ordered_key(maps[i + (dx * ny + dy) * nz + dz]) <= height;
        }
        parents[chunk.offset + i] = marked[j] ? i + 1 : 0;
        if (marked[j]) sizes[chunk.offset + i] = 0;
    }
    list_marked(marked, chunk.first, own_list(lists), n_listed + blockIdx.x);
}

// One warp a candidate. Outside a volume is zero, which no floor lies below.
extern "C" __global__ void reject_candidates(
    const Bits* maps, int nx, int ny, int nz, int chunks, int distance,
    int* parents, int* lists, const int* n_listed
) {
    Chunk chunk = own_chunk(nx * ny * nz, chunks);
    const int* list = own_list(lists);
    maps += chunk.offset;
    int lane = threadIdx.x % 32, n = n_listed[blockIdx.x];
    for (int k = threadIdx.x / 32; k < n; k += WARPS) {
        int i = list[k];
        Bits height = ordered_key(maps[i]);
        int z = i % nz, y = i / nz % ny, x = i / nz / ny;
        int x_end = x + distance < nx ? x + distance : nx - 1;
        int y_begin = y > distance ? y - distance : 0;
        int y_end = y + distance < ny ? y + distance : ny - 1;
        int z_begin = z > distance ? z - distance : 0;
        int z_end = z + distance < nz ? z + distance : nz - 1;
        bool is_beaten = false;
        for (int a = x > distance ? x - distance : 0; a <= x_end && !is_beaten; a++) {
            bool beaten_here = false;
            for (int b = y_begin; b <= y_end; b++) {
                for (int c = z_begin + lane; c <= z_end; c += 32) {
                    beaten_here |= ordered_key(maps[(a * ny + b) * nz + c]) > height;
                }
            }
            is_beaten = __any_sync(ALL, beaten_here);
        }
        if (is_beaten && lane == 0) parents[chunk.offset + i] = 0;
    }
}
