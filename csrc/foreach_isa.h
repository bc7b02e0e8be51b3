// Includes the file named by SPEAR_ROWS once per instruction set, each time inside its own namespace (spear::generic,
// spear::avx2, spear::avx512) and with code generation for that set. The file must not include anything itself: a
// standard header compiled for AVX-512 could be shared by the linker with code that must run without it.
// No include guard: each kernel file includes this once.

#define SPEAR_WIDTH 4
namespace spear::generic {
#include "simd.h"
#include SPEAR_ROWS
}  // namespace spear::generic
#undef SPEAR_WIDTH

#if defined(__x86_64__)
#if defined(__clang__)
#define SPEAR_PRAGMA(text) _Pragma(#text)
#define SPEAR_BEGIN_ISA(list) \
    SPEAR_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define SPEAR_END_ISA SPEAR_PRAGMA(clang attribute pop)
#else
#define SPEAR_PRAGMA(text) _Pragma(#text)
#define SPEAR_BEGIN_ISA(list) SPEAR_PRAGMA(GCC push_options) SPEAR_PRAGMA(GCC target(list))
#define SPEAR_END_ISA SPEAR_PRAGMA(GCC pop_options)
#endif

SPEAR_BEGIN_ISA("avx2,fma")
#define SPEAR_WIDTH 8
namespace spear::avx2 {
#include "simd.h"
#include SPEAR_ROWS
}  // namespace spear::avx2
#undef SPEAR_WIDTH
SPEAR_END_ISA

SPEAR_BEGIN_ISA("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define SPEAR_WIDTH 16
namespace spear::avx512 {
#include "simd.h"
#include SPEAR_ROWS
}  // namespace spear::avx512
#undef SPEAR_WIDTH
SPEAR_END_ISA
#endif
