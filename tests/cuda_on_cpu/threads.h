// CUDA on CPU threads, one for each CUDA thread, so that ThreadSanitizer sees every race.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}

namespace engine {

constexpr int LIVE_BLOCKS = 3;

// What is done while one of these lives puts nothing in order that the sanitizer sees.
struct Unseen {
    Unseen() {
        AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unseen() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
        AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    }
};

// Not std::barrier: libstdc++ lets all threads of a program wait in one pool of counters, which puts
// unrelated blocks in order, and hides their races.
class Barrier {
  public:
    explicit Barrier(int n) : expected(n), missing(n) {}

    void arrive_and_wait() {
        int own = round;
        arrive();
        while (round == own) {
            Unseen pool;
            round.wait(own);
        }
    }

    // As on a device, those that have ended are not waited for.
    void arrive_and_drop() {
        expected--;
        arrive();
    }

  private:
    std::atomic<int> expected, missing, round{0};

    void arrive() {
        if (--missing > 0) return;
        missing = expected.load();
        round++;
        Unseen pool;
        round.notify_all();
    }
};

struct Block {
    std::unique_ptr<Barrier> barrier;
    std::vector<std::unique_ptr<Barrier>> warps;
    std::vector<uint64_t> deposits;
};

static Block blocks[LIVE_BLOCKS];
static unsigned n_threads;
static thread_local int own_slot, own_thread;
static thread_local unsigned own_block;

inline void run(int slot, int thread, unsigned block, const std::function<void()>& kernel) {
    own_slot = slot;
    own_thread = thread;
    own_block = block;
    kernel();
    blocks[slot].barrier->arrive_and_drop();
    blocks[slot].warps[thread / 32]->arrive_and_drop();
}

inline int launch(unsigned n_blocks, unsigned threads_a_block, unsigned, std::function<void()> kernel) {
    n_threads = threads_a_block;
    for (unsigned first = 0; first < n_blocks; first += LIVE_BLOCKS) {
        std::vector<std::thread> running;
        int n_live = std::min<unsigned>(LIVE_BLOCKS, n_blocks - first);
        for (int s = 0; s < n_live; s++) {
            blocks[s].barrier = std::make_unique<Barrier>(n_threads);
            blocks[s].warps.clear();
            for (unsigned warp = 0; warp < (n_threads + 31) / 32; warp++) {
                unsigned n = std::min(32u, n_threads - 32 * warp);
                blocks[s].warps.push_back(std::make_unique<Barrier>(n));
            }
            blocks[s].deposits.assign(n_threads, 0);
        }
        for (int s = 0; s < n_live; s++) {
            for (unsigned t = 0; t < n_threads; t++) {
                running.emplace_back(run, s, (int)t, first + s, std::cref(kernel));
            }
        }
        for (std::thread& one : running) one.join();
    }
    return 0;
}

inline int slot() { return own_slot; }
inline int thread() { return own_thread; }
inline unsigned block() { return own_block; }
inline uint64_t* deposits() { return blocks[own_slot].deposits.data(); }
inline void wait_for_block() { blocks[own_slot].barrier->arrive_and_wait(); }
// Shuffles and votes order nothing but what they hand over: the sanitizer must not see this meeting.
inline void wait_for_warp() {
    Unseen meeting;
    blocks[own_slot].warps[own_thread / 32]->arrive_and_wait();
}

}  // namespace engine

// Relaxed, as volatile accesses and atomics are on a device.
inline int load(const int* place) { return __atomic_load_n(place, __ATOMIC_RELAXED); }
inline void store(int* place, int value) { __atomic_store_n(place, value, __ATOMIC_RELAXED); }
template <class T>
T atomicAdd(T* place, T value) {
    return __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMin(T* place, T value) {
    T before = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (value < before) {
        if (__atomic_compare_exchange_n(place, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) break;
    }
    return before;
}
