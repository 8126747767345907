// Exact order statistics of every volume of a batch: radix selection, digit by digit from the top.
// (Alabi, Blanchard, Gordon and Steinbach, ACM Journal of Experimental Algorithmics 17, 2012,
// doi:10.1145/2133803.2345676.) A digit has up to 11 bits: float32 takes three reads of the maps.
//
// A job is a volume and a rank. Its prefix grows by a digit a pass; the value of the rank after it
// comes out too, since percentiles interpolate between the two.

#define DIGITS 2048
#define READS 8  // of a thread, under way at once

extern "C" __global__ void count_digits(
    const Bits* maps, const unsigned char* population, int n_voxels, int chunks, int n_ranks,
    int absolute, const Bits* prefixes, Bits* next, int* histograms, int shift, int digit_bits
) {
    SHARED(int, counts, DIGITS);
    SHARED(Bits, smallest_above, 1);
    int n_digits = 1 << digit_bits;
    for (int digit = threadIdx.x; digit < n_digits; digit += THREADS) counts[digit] = 0;
    if (threadIdx.x == 0) smallest_above[0] = ~(Bits)0;
    __syncthreads();

    int rank = blockIdx.x % (unsigned)n_ranks;
    int part = blockIdx.x / (unsigned)n_ranks;
    int volume = part / chunks;
    long long job = (long long)volume * n_ranks + rank;
    long long offset = (long long)volume * n_voxels;
    bool is_first = shift + digit_bits == BITS;
    Bits prefix = prefixes[job];
    Bits smallest = ~(Bits)0;
    // Most of a map may be one value, whose counter all threads would queue for: a thread counts
    // repetitions on its own.
    int last_digit = 0, repetitions = 0;
    unsigned step = chunks * THREADS;
    for (unsigned from = part % chunks * THREADS + threadIdx.x; from < (unsigned)n_voxels;
         from += READS * step) {
        Bits values[READS];
        bool is_member[READS];
#pragma unroll
        for (int j = 0; j < READS; j++) {
            unsigned i = from + j * step;
            is_member[j] = i < (unsigned)n_voxels;
            values[j] = is_member[j] ? maps[offset + i] : 0;
        }
        if (population) {
#pragma unroll
            for (int j = 0; j < READS; j++) {
                is_member[j] = is_member[j] && population[offset + from + j * step];
            }
        }
#pragma unroll
        for (int j = 0; j < READS; j++) {
            if (!is_member[j]) continue;
            Bits key = absolute ? values[j] & ~SIGN : ordered_key(values[j]);
            Bits above = is_first ? 0 : key >> (shift + digit_bits);
            if (above == prefix) {
                int digit = (int)(key >> shift) & (n_digits - 1);
                if (digit != last_digit) {
                    if (repetitions) atomicAdd(counts + last_digit, repetitions);
                    last_digit = digit;
                    repetitions = 0;
                }
                repetitions++;
            } else if (above > prefix && key < smallest) {
                smallest = key;
            }
        }
    }
    if (repetitions) atomicAdd(counts + last_digit, repetitions);
    bool is_last = shift == 0;
    if (is_last && smallest != ~(Bits)0) atomicMin(smallest_above, smallest);
    __syncthreads();
    for (int digit = threadIdx.x; digit < n_digits; digit += THREADS) {
        if (counts[digit]) atomicAdd(histograms + job * DIGITS + digit, counts[digit]);
    }
    if (is_last && threadIdx.x == 0 && smallest_above[0] != ~(Bits)0) {
        atomicMin(next + job, smallest_above[0]);
    }
}

// One block a job: append the digit that holds the rank to the prefix, and clear the histogram.
extern "C" __global__ void pick_digit(
    Bits* prefixes, int* ranks, Bits* next, int* histograms, int digit_bits, int is_last
) {
    SHARED(int, picked, 3);  // the digit, the rank among its keys, the next digit in use
    int* histogram = histograms + (long long)blockIdx.x * DIGITS;
    int n_digits = 1 << digit_bits;
    int rank = ranks[blockIdx.x];
    if (threadIdx.x == 0) picked[2] = n_digits;
    __syncthreads();

    int a_thread = (n_digits + THREADS - 1) / THREADS;
    int first = threadIdx.x * a_thread;
    int end = first + a_thread < n_digits ? first + a_thread : n_digits;
    int own = 0, total;
    for (int digit = first; digit < end; digit++) own += histogram[digit];
    int before = sum_before(own, &total);
    if (before <= rank && rank < before + own) {
        int digit = first;
        while (before + histogram[digit] <= rank) before += histogram[digit++];
        picked[0] = digit;
        picked[1] = rank - before;
    }
    __syncthreads();
    int digit = picked[0];
    for (int other = first; other < end; other++) {
        if (other > digit && histogram[other]) {
            atomicMin(picked + 2, other);
            break;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        Bits above = prefixes[blockIdx.x] << digit_bits;
        Bits key = above | (Bits)digit;
        if (is_last && picked[1] + 1 < histogram[digit]) {
            next[blockIdx.x] = key;
        } else if (is_last && picked[2] < n_digits) {
            next[blockIdx.x] = above | (Bits)picked[2];
        }  // else it is the smallest key with another prefix, which `count_digits` has left there
        prefixes[blockIdx.x] = key;
        ranks[blockIdx.x] = picked[1];
    }
    __syncthreads();
    for (int other = threadIdx.x; other < n_digits; other += THREADS) histogram[other] = 0;
}
