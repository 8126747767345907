// The words of CUDA that the kernels use, on top of an engine that runs threads: fibers.h or threads.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline

struct Index {
    unsigned x;
};
#define threadIdx (Index{(unsigned)engine::thread()})
#define blockIdx (Index{engine::block()})

// Every block alive has a copy.
#define SHARED(type, name, size)                             \
    static type name##_of_blocks[engine::LIVE_BLOCKS][size]; \
    type* name = name##_of_blocks[engine::slot()]

template <class T>
std::vector<T> values_of(int first, int end, T own, void (*wait)()) {
    uint64_t* deposits = engine::deposits();
    uint64_t word = 0;
    memcpy(&word, &own, sizeof own);
    __atomic_store_n(deposits + engine::thread(), word, __ATOMIC_RELAXED);
    wait();
    std::vector<T> values(end - first);
    for (int i = first; i < end; i++) {
        word = __atomic_load_n(deposits + i, __ATOMIC_RELAXED);
        memcpy(&values[i - first], &word, sizeof own);
    }
    wait();
    return values;
}

template <class T>
std::vector<T> values_in_warp(T own) {
    int first = engine::thread() / 32 * 32;
    return values_of(first, std::min(first + 32, (int)engine::n_threads), own, engine::wait_for_warp);
}

inline unsigned bits_of(const std::vector<bool>& flags) {
    unsigned bits = 0;
    for (size_t lane = 0; lane < flags.size(); lane++) bits |= unsigned(flags[lane]) << lane;
    return bits;
}

inline void __syncthreads() { engine::wait_for_block(); }
inline int __syncthreads_count(int predicate) {
    std::vector<int> all = values_of(0, (int)engine::n_threads, predicate, engine::wait_for_block);
    return (int)std::count_if(all.begin(), all.end(), [](int one) { return one != 0; });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    std::vector<int> votes = values_in_warp(predicate);
    return bits_of(std::vector<bool>(votes.begin(), votes.end()));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
    std::vector<T> values = values_in_warp(value);
    int lane = engine::thread() % 32;
    return lane >= distance ? values[lane - distance] : value;
}
template <class T>
unsigned __match_any_sync(unsigned, T value) {
    std::vector<bool> same;
    for (T other : values_in_warp(value)) same.push_back(other == value);
    return bits_of(same);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
// CuPy has denormal floats flushed wherever one is computed with: here, wherever one begins or ends.
inline unsigned flushed(unsigned bits) { return bits & 0x7f800000u ? bits : bits & 0x80000000u; }
inline float __uint_as_float(unsigned bits) { return same_bits<float>(flushed(bits)); }
inline unsigned __float_as_uint(float value) { return flushed(same_bits<unsigned>(value)); }
inline double __longlong_as_double(long long bits) { return same_bits<double>(bits); }
inline long long __double_as_longlong(double value) { return same_bits<long long>(value); }
inline long long __double2ll_rn(double value) { return std::llrint(value); }
