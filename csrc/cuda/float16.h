// The fp16 element type of the CUDA kernels, with what packed_words.h asks of one.
#pragma once

#include <cuda_fp16.h>

#include "../packed_words.h"

namespace spear {

struct Float16 {
    __half value;
};

__device__ inline float to_float(Float16 element) { return __half2float(element.value); }
__device__ inline void assign(Float16& target, float value) { target.value = __float2half_rn(value); }

template <>
struct Packing<Float16> {
    __device__ static void unpack(uint32_t word, float* x) {
        x[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
        x[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
    }
    __device__ static uint32_t pack(const float* x) {
        const uint32_t low = __half_as_ushort(__float2half_rn(x[0]));
        const uint32_t high = __half_as_ushort(__float2half_rn(x[1]));
        return low | high << 16;
    }
};

}  // namespace spear
