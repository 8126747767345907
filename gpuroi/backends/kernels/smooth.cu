// A Gaussian along one axis, bit for bit as scipy.ndimage.correlate1d computes it: in float64, the
// centre first, then pairs from the outside in, rounded once. Compiled without multiply-add.
//
// float32 is widened and narrowed by its bits where it is denormal, which the compiler would flush.

#ifdef WIDE
__device__ __forceinline__ double widen(Bits bits) { return __longlong_as_double((long long)bits); }
__device__ __forceinline__ Bits narrow(double value) { return (Bits)__double_as_longlong(value); }
#else
#define SMALLEST_NORMAL 0x3810000000000000ll  // 2^-126 as a double
#define SMALLEST_STEP 0x36a0000000000000ll    // 2^-149
#define STEPS_TO_ONE 0x4940000000000000ll     // 2^149

__device__ __forceinline__ double widen(Bits bits) {
    if ((bits & INFINITE) != 0) return (double)__uint_as_float(bits);
    double steps = (double)(int)(bits & ~SIGN);
    return (bits & SIGN ? -steps : steps) * __longlong_as_double(SMALLEST_STEP);
}

__device__ __forceinline__ Bits narrow(double value) {
    long long wide = __double_as_longlong(value);
    long long magnitude = wide & 0x7fffffffffffffffll;
    if (magnitude >= SMALLEST_NORMAL) return __float_as_uint((float)value);
    double steps = __longlong_as_double(magnitude) * __longlong_as_double(STEPS_TO_ONE);
    return (Bits)__double2ll_rn(steps) | (wide < 0 ? SIGN : 0u);
}
#endif

// (d c b a | a b c d | d c b a)
__device__ __forceinline__ int reflected(int place, int length) {
    if (place >= 0 && place < length) return place;
    int period = 2 * length;
    place = (place % period + period) % period;
    return place < length ? place : period - 1 - place;
}

extern "C" __global__ void smooth_axis(
    const Bits* maps, Bits* smoothed, int n_voxels, int chunks, int length, int stride,
    const double* weights, int radius
) {
    Chunk chunk = own_chunk(n_voxels, chunks);
    for (int j = 0; j < ITEMS; j++) {
        int i = chunk.first + j * THREADS + (int)threadIdx.x;
        if (i >= n_voxels) return;
        int place = i / stride % length;
        const Bits* line = maps + chunk.offset + (i - place * stride);
        double sum = widen(line[place * stride]) * weights[0];
        for (int offset = radius; offset > 0; offset--) {
            double before = widen(line[reflected(place - offset, length) * stride]);
            double after = widen(line[reflected(place + offset, length) * stride]);
            sum += (before + after) * weights[offset];
        }
        smoothed[chunk.offset + i] = narrow(sum);
    }
}
