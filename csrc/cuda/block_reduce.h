// Reductions over the threads of a block in a fixed order.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace spear {

constexpr int kWarp = 32;
constexpr int kBlockThreads = 256;  // of the kernels that use what follows
constexpr int kBlockWarps = kBlockThreads / kWarp;

__device__ inline float max_of_warp(float value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    return value;
}

__device__ inline double sum_of_warp(double value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// Sum of `value` over the threads before this one; `total` over all. Called by every thread of the block.
__device__ inline uint32_t sum_before(uint32_t value, uint32_t& total) {
    __shared__ uint32_t sums[kBlockWarps];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    uint32_t up_to = value;
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, up_to, offset);
        if (lane >= offset) up_to += other;
    }
    if (lane == kWarp - 1) sums[warp] = up_to;
    __syncthreads();
    uint32_t before = up_to - value;
    total = 0;
    for (int i = 0; i < kBlockWarps; ++i) {
        if (i < warp) before += sums[i];
        total += sums[i];
    }
    __syncthreads();  // the next call overwrites the sums
    return before;
}

}  // namespace spear
