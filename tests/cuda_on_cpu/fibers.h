// CUDA on one CPU thread: a fiber for each CUDA thread, in an order that a seed decides.
//
// Several blocks are alive at once. A fiber gives way at barriers and shuffles, and now and then at
// a load or an atomic, so that the order of accesses to shared memory differs from seed to seed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace engine {

constexpr int LIVE_BLOCKS = 3;
constexpr int STACK = 64 * 1024;

struct Barrier {
    int expected = 0;
    std::vector<int> waiting;  // fibers
};

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started = false;
    int slot = 0, thread = 0;
    unsigned block = 0;
    std::unique_ptr<char[]> stack{new char[STACK]};
};

struct Block {
    int n_running = 0;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::vector<uint64_t> deposits;
};

static std::vector<Fiber> all;
static Block blocks[LIVE_BLOCKS];
static std::vector<int> ready;
static std::function<void()> kernel;
static std::mt19937 chance;
static jmp_buf scheduler;
static ucontext_t home;
static int current;
static unsigned n_threads;

inline Fiber& me() { return all[current]; }
inline Block& my_block() { return blocks[me().slot]; }
inline Barrier& my_warp() { return my_block().warps[me().thread / 32]; }

inline void release(Barrier& barrier) {
    if (barrier.waiting.empty() || (int)barrier.waiting.size() < barrier.expected) return;
    ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
}

inline void leave() {
    if (_setjmp(me().place) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier) {
    barrier.waiting.push_back(current);
    release(barrier);
    leave();
}

inline void perhaps_leave() {
    if (chance() % 4 == 0) {
        ready.push_back(current);
        leave();
    }
}

inline void run_fiber() {
    kernel();
    Block& block = my_block();
    block.n_running--;
    block.barrier.expected--;
    my_warp().expected--;
    release(block.barrier);
    release(my_warp());
    _longjmp(scheduler, 2);
}

inline void start_block(int slot, unsigned number) {
    Block& block = blocks[slot];
    block.n_running = block.barrier.expected = n_threads;
    block.warps.assign((n_threads + 31) / 32, Barrier());
    block.deposits.assign(n_threads, 0);
    for (unsigned thread = 0; thread < n_threads; thread++) {
        int index = slot * n_threads + thread;
        Fiber& fiber = all[index];
        fiber.started = false;
        fiber.slot = slot;
        fiber.thread = thread;
        fiber.block = number;
        block.warps[thread / 32].expected++;
        ready.push_back(index);
    }
}

// Runs some blocks, by their numbers. Returns 0, or 1 if threads wait for others that never come.
inline int launch(
    const unsigned* numbers, unsigned n_blocks, unsigned threads, unsigned seed,
    std::function<void()> body
) {
    kernel = std::move(body);
    n_threads = threads;
    chance.seed(seed);
    ready.clear();
    while (all.size() < LIVE_BLOCKS * threads) all.emplace_back();
    unsigned next = 0;
    for (int slot = 0; slot < LIVE_BLOCKS; slot++) {
        blocks[slot].n_running = 0;
        blocks[slot].barrier.waiting.clear();
        if (next < n_blocks) start_block(slot, numbers[next++]);
    }
    while (!ready.empty()) {
        unsigned pick = chance() % ready.size();
        current = ready[pick];
        ready[pick] = ready.back();
        ready.pop_back();
        int outcome = _setjmp(scheduler);
        if (outcome == 0) {
            Fiber& fiber = me();
            if (fiber.started) _longjmp(fiber.place, 1);
            fiber.started = true;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, run_fiber, 0);
            setcontext(&fiber.context);
        }
        if (outcome == 2 && my_block().n_running == 0 && next < n_blocks) {
            start_block(me().slot, numbers[next++]);
        }
    }
    for (Block& block : blocks) {
        if (block.n_running) return 1;
    }
    return 0;
}

inline int slot() { return me().slot; }
inline int thread() { return me().thread; }
inline unsigned block() { return me().block; }
inline uint64_t* deposits() { return my_block().deposits.data(); }
inline void wait_for_block() { wait(my_block().barrier); }
inline void wait_for_warp() { wait(my_warp()); }

}  // namespace engine

inline int load(const int* place) {
    engine::perhaps_leave();
    return *place;
}
inline void store(int* place, int value) {
    engine::perhaps_leave();
    *place = value;
}
template <class T>
T atomicAdd(T* place, T value) {
    engine::perhaps_leave();
    T before = *place;
    *place = before + value;
    return before;
}
template <class T>
T atomicMin(T* place, T value) {
    engine::perhaps_leave();
    T before = *place;
    if (value < before) *place = value;
    return before;
}
