// What all kernels share. Plain CUDA C without headers: NVRTC compiles the files of this folder, one
// after the other, as one source, once for float32 and once (WIDE) for float64 maps.
//
// Maps arrive as the bits of their values. Kernels compare those, never floats: the compiler is told
// to flush denormals, and integers do not care.
//
// Every kernel but `pick_digit` and `number_chunks` walks through a batch in chunks: one block a
// chunk, CHUNK voxels of one volume. Indices inside a volume have 32 bits, offsets of volumes 64.

#ifdef WIDE
typedef unsigned long long Bits;
#define BITS 64
#define SIGN 0x8000000000000000ull
#define INFINITE 0x7ff0000000000000ull
#else
typedef unsigned int Bits;
#define BITS 32
#define SIGN 0x80000000u
#define INFINITE 0x7f800000u
#endif

#ifndef THREADS
#define THREADS 256
#endif
#ifndef ITEMS
#define ITEMS 16  // voxels a thread
#endif
#define CHUNK (THREADS * ITEMS)
#define WARPS (THREADS / 32)
#define ALL 0xffffffffu

// The tests run these files on a CPU, where memory that threads share needs other words.
#ifndef SHARED
#define SHARED(type, name, size) __shared__ type name[size]
__device__ __forceinline__ int load(const int* place) { return *(const volatile int*)place; }
__device__ __forceinline__ void store(int* place, int value) { *(volatile int*)place = value; }
#endif

struct Chunk {
    int volume;
    int first;         // voxel of the volume
    long long offset;  // of the volume in the batch
};

__device__ __forceinline__ Chunk own_chunk(int n_voxels, int chunks_a_volume) {
    Chunk chunk;
    chunk.volume = (int)(blockIdx.x / (unsigned)chunks_a_volume);
    chunk.first = (int)(blockIdx.x % (unsigned)chunks_a_volume) * CHUNK;
    chunk.offset = (long long)chunk.volume * n_voxels;
    return chunk;
}

// The voxels that the own chunk has listed; a chunk has room for all of its voxels.
__device__ __forceinline__ int* own_list(int* lists) {
    return lists + (long long)blockIdx.x * CHUNK;
}

// The values of a chunk, all before the first is used: reads wait for one another only where a write
// comes between, which may go to the same place for all the compiler knows.
__device__ __forceinline__ void read_chunk(
    const Bits* maps, int first, int n_voxels, Bits* values
) {
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        int i = first + j * THREADS + (int)threadIdx.x;
        values[j] = i < n_voxels ? maps[i] : 0;
    }
}

// Unsigned integers in the order of the values, -0 before 0 and every NaN last.
__device__ __forceinline__ Bits ordered_key(Bits bits) {
    if ((bits & ~SIGN) > INFINITE) return ~(Bits)0;
    return bits & SIGN ? ~bits : bits | SIGN;
}

// The sum of `value` over the threads before this one; `total` is that of all threads of the block.
__device__ int sum_before(int value, int* total) {
    SHARED(int, warp_sums, WARPS);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        int below = __shfl_up_sync(ALL, sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int before = sum - value;
    *total = 0;
    for (int other = 0; other < WARPS; other++) {
        if (other < warp) before += warp_sums[other];
        *total += warp_sums[other];
    }
    __syncthreads();  // before the next call writes
    return before;
}

// List the marked voxels of the own chunk in ascending order; thread t marks first + j THREADS + t.
__device__ void list_marked(const bool* marked, int first, int* list, int* n_listed) {
    SHARED(int, before, ITEMS * WARPS);  // marked voxels before each row of 32
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned rows[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        rows[j] = __ballot_sync(ALL, marked[j]);
        if (lane == 0) before[j * WARPS + warp] = __popc(rows[j]);
    }
    __syncthreads();
    int total = 0;
    for (int row = 0; row < ITEMS * WARPS; row += THREADS) {
        int own = row + (int)threadIdx.x, strip;
        int count = own < ITEMS * WARPS ? before[own] : 0;
        int place = total + sum_before(count, &strip);
        if (own < ITEMS * WARPS) before[own] = place;
        total += strip;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        if (!marked[j]) continue;
        int place = before[j * WARPS + warp] + __popc(rows[j] & ((1u << lane) - 1));
        list[place] = first + j * THREADS + (int)threadIdx.x;
    }
    if (threadIdx.x == 0) *n_listed = total;
}
