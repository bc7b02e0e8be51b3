// Enough of CUDA for the host to run the kernels of csrc/cuda/: one thread of the system per thread of a block, one
// block after the other. It tests logic (reductions, barriers, atomics, order of reads and writes), not speed.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
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
inline thread_local EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
constexpr int kWarp = 32, kMaxWarps = 32;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline double exchanged[kMaxWarps][kWarp];

// Runs `kernel` as a grid of one dimension.
template <typename Kernel>
void launch(unsigned grid, int threads, Kernel kernel) {
    for (unsigned block = 0; block < grid; ++block) {
        block_barrier = std::make_unique<std::barrier<>>(threads);
        warp_barriers.clear();
        for (int warp = 0; warp < threads / kWarp; ++warp) {
            warp_barriers.push_back(std::make_unique<std::barrier<>>(kWarp));
        }
        std::vector<std::thread> running;
        for (int thread = 0; thread < threads; ++thread) {
            running.emplace_back([=] {
                threadIdx.x = thread;
                blockIdx.x = static_cast<int>(block);
                blockDim.x = threads;
                gridDim.x = static_cast<int>(grid);
                kernel();
                block_barrier->arrive_and_drop();
            });
        }
        for (std::thread& thread : running) thread.join();
    }
}
}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier->arrive_and_wait(); }

namespace emulation {
// What the lane `source` of the warp gave for `value`.
template <typename Value>
Value exchange(Value value, int source) {
    const int warp = threadIdx.x / kWarp;
    std::barrier<>& barrier = *warp_barriers[warp];
    exchanged[warp][threadIdx.x % kWarp] = value;
    barrier.arrive_and_wait();
    const Value received = static_cast<Value>(exchanged[warp][source]);
    barrier.arrive_and_wait();
    return received;
}
}  // namespace emulation

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
    return __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}
