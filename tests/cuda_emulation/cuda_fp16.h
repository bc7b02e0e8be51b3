// The conversions of CUDA's fp16 that csrc/cuda/ uses, on the host.
#pragma once

#include <cstring>

#include "cuda_runtime.h"

using __half = _Float16;

inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }

inline __half __ushort_as_half(unsigned short bits) {
    __half value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline unsigned short __half_as_ushort(__half value) {
    unsigned short bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
