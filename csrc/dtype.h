// Element types that arrive from torch by address.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace spear {

// Storage of a bfloat16: the upper half of a float.
struct Bfloat16 {
    uint16_t bits;
};

enum class Dtype { float32 = 0, bfloat16 = 1 };

SPEAR_HOST_DEVICE inline float to_float(float value) { return value; }

SPEAR_HOST_DEVICE inline float to_float(Bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof(result));
    return result;
}

SPEAR_HOST_DEVICE inline void assign(float& target, float value) { target = value; }

// Rounds to nearest even; NaN stays NaN.
SPEAR_HOST_DEVICE inline void assign(Bfloat16& target, float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    target.bits = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40u);
}

}  // namespace spear
