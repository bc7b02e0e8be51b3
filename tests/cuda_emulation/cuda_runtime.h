// Enough of CUDA for the host to run the kernels of csrc/cuda/: every thread of a block is a fibre, and the blocks run
// one after the other. It tests logic (reductions, barriers, atomics, order of reads and writes), not speed.
//
// A fibre runs from one barrier to the next; the fibres take turns in ascending or in descending order, drawn for every
// round, so that a value read before another thread wrote it is seen in one of them. Threads that wait at barriers that
// cannot open end the process.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
    std::memset(target, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "error of the emulation"; }

struct EmulatedIndex {
    int x;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
constexpr int kWarp = 32, kMaxThreads = 1024, kStackBytes = 1 << 16;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fibre {
    ucontext_t context;
    std::vector<char> stack;
    State state;
};
inline Fibre fibres[kMaxThreads];
inline ucontext_t scheduler;
inline std::function<void()> body;
inline double exchanged[kMaxThreads];
inline uint32_t random_word = 1;

inline bool random_bit() {
    random_word = random_word * 1664525u + 1013904223u;
    return random_word >> 31;
}

// Gives way until the barrier opens.
inline void wait_at(State barrier) {
    Fibre& self = fibres[threadIdx.x];
    self.state = barrier;
    swapcontext(&self.context, &scheduler);
}

inline void run_body() {
    body();
    fibres[threadIdx.x].state = State::done;
}

inline void prepare(Fibre& fibre) {
    fibre.stack.resize(kStackBytes);
    fibre.state = State::ready;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, run_body, 0);
}

// Opens the barrier for the threads from `first` on if all of them that still run wait there; whether it did.
inline bool open(State barrier, int first, int count) {
    bool any = false;
    for (int i = first; i < first + count; ++i) {
        if (fibres[i].state == State::done) continue;
        if (fibres[i].state != barrier) return false;
        any = true;
    }
    for (int i = first; any && i < first + count; ++i) {
        if (fibres[i].state == barrier) fibres[i].state = State::ready;
    }
    return any;
}

// Whether some thread can go on; false when all are done.
inline bool open_barriers(int threads) {
    bool going = open(State::at_block_barrier, 0, threads), done = true;
    for (int first = 0; first < threads; first += kWarp) going |= open(State::at_warp_barrier, first, kWarp);
    for (int i = 0; i < threads; ++i) done &= fibres[i].state == State::done;
    if (going || done) return going;
    std::fprintf(stderr, "emulated CUDA: the threads of a block wait at barriers that cannot open\n");
    std::abort();
}

inline void run_block(int threads) {
    for (int i = 0; i < threads; ++i) prepare(fibres[i]);
    do {
        const bool ascending = random_bit();
        for (int i = 0; i < threads; ++i) {
            threadIdx.x = ascending ? i : threads - 1 - i;
            Fibre& fibre = fibres[threadIdx.x];
            if (fibre.state == State::ready) swapcontext(&scheduler, &fibre.context);
        }
    } while (open_barriers(threads));
}

// Runs `kernel` as a grid of one dimension; whole warps.
template <typename Kernel>
void launch(unsigned grid, int threads, Kernel kernel) {
    body = kernel;
    blockDim.x = threads;
    gridDim.x = static_cast<int>(grid);
    for (unsigned block = 0; block < grid; ++block) {
        blockIdx.x = static_cast<int>(block);
        run_block(threads);
    }
}

// What the lane `source` of the warp gave for `value`.
template <typename Value>
Value exchange(Value value, int source) {
    exchanged[threadIdx.x] = value;
    wait_at(State::at_warp_barrier);
    const Value received = static_cast<Value>(exchanged[threadIdx.x / kWarp * kWarp + source]);
    wait_at(State::at_warp_barrier);
    return received;
}
}  // namespace emulation

inline void __syncthreads() { emulation::wait_at(emulation::State::at_block_barrier); }

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int offset) {
    return emulation::exchange(value, (threadIdx.x % emulation::kWarp) ^ offset);
}

template <typename Value>
Value __shfl_up_sync(unsigned, Value value, int offset) {
    const int lane = threadIdx.x % emulation::kWarp;
    return emulation::exchange(value, lane < offset ? lane : lane - offset);
}

inline unsigned atomicAdd(unsigned* target, unsigned value) {
    const unsigned before = *target;
    *target = before + value;
    return before;
}
