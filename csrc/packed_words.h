// Sixteen bytes of a row as the CUDA kernels move them, and the numbers in them. Compiles for the host too, where the
// tests run it.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace spear {

struct alignas(16) Words {
    uint32_t at[4];
};

// Elements in 16 bytes.
template <typename Element>
constexpr int kVectorWidth = static_cast<int>(16 / sizeof(Element));

SPEAR_HOST_DEVICE inline float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
#endif
}

SPEAR_HOST_DEVICE inline uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return bits;
#endif
}

// One load or store of 16 bytes; the address is a multiple of 16.
SPEAR_HOST_DEVICE inline Words load_words(const void* source) {
    Words words;
#if defined(__CUDA_ARCH__)
    const uint4 loaded = *static_cast<const uint4*>(source);
    words.at[0] = loaded.x;
    words.at[1] = loaded.y;
    words.at[2] = loaded.z;
    words.at[3] = loaded.w;
#else
    __builtin_memcpy(&words, __builtin_assume_aligned(source, 16), sizeof(words));
#endif
    return words;
}

SPEAR_HOST_DEVICE inline void store_words(void* target, const Words& words) {
#if defined(__CUDA_ARCH__)
    *static_cast<uint4*>(target) = make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]);
#else
    __builtin_memcpy(__builtin_assume_aligned(target, 16), &words, sizeof(words));
#endif
}

// How the elements of one type lie in a 32-bit word, the first one in the low bits.
template <typename Element>
struct Packing;

template <>
struct Packing<float> {
    SPEAR_HOST_DEVICE static void unpack(uint32_t word, float* x) { x[0] = float_of_bits(word); }
    SPEAR_HOST_DEVICE static uint32_t pack(const float* x) { return bits_of_float(x[0]); }
};

template <>
struct Packing<Bfloat16> {
    SPEAR_HOST_DEVICE static void unpack(uint32_t word, float* x) {
        x[0] = float_of_bits(word << 16);
        x[1] = float_of_bits(word & 0xffff0000u);
    }
    SPEAR_HOST_DEVICE static uint32_t pack(const float* x) {
#if defined(__CUDA_ARCH__)
        uint32_t word;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
        return word;
#else
        Bfloat16 low, high;
        assign(low, x[0]);
        assign(high, x[1]);
        return low.bits | static_cast<uint32_t>(high.bits) << 16;
#endif
    }
};

template <typename Element>
SPEAR_HOST_DEVICE inline void unpack(const Words& words, float (&x)[kVectorWidth<Element>]) {
    constexpr int kPerWord = kVectorWidth<Element> / 4;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int i = 0; i < 4; ++i) Packing<Element>::unpack(words.at[i], x + i * kPerWord);
}

template <typename Element>
SPEAR_HOST_DEVICE inline Words pack(const float (&x)[kVectorWidth<Element>]) {
    constexpr int kPerWord = kVectorWidth<Element> / 4;
    Words words;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int i = 0; i < 4; ++i) words.at[i] = Packing<Element>::pack(x + i * kPerWord);
    return words;
}

}  // namespace spear
