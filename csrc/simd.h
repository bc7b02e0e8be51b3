// Vectors of SPEAR_WIDTH floats in the compiler's vector extension: plain operators become the instruction set of the
// enclosing region. Included once per instruction set by foreach_isa.h, hence no guard.

constexpr int64_t kWidth = SPEAR_WIDTH;

typedef float Float __attribute__((vector_size(4 * SPEAR_WIDTH)));
typedef int32_t Int __attribute__((vector_size(4 * SPEAR_WIDTH)));
typedef uint32_t Word __attribute__((vector_size(4 * SPEAR_WIDTH)));
typedef uint16_t Half __attribute__((vector_size(2 * SPEAR_WIDTH)));

#define SPEAR_INLINE static inline __attribute__((always_inline))

SPEAR_INLINE Float broadcast(float value) { return Float{} + value; }

// The larger one; the second argument where either is NaN.
SPEAR_INLINE Float larger(Float a, Float b) {
#if SPEAR_WIDTH == 16
    return (Float)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif SPEAR_WIDTH == 8
    return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

SPEAR_INLINE Float load(const float* source) {
    Float value;
    __builtin_memcpy(&value, source, sizeof(value));
    return value;
}

SPEAR_INLINE Float load(const Bfloat16* source) {
    Half half;
    __builtin_memcpy(&half, source, sizeof(half));
    return (Float)(__builtin_convertvector(half, Word) << 16);
}

SPEAR_INLINE void store(float* target, Float value) { __builtin_memcpy(target, &value, sizeof(value)); }

// Rounds to nearest even; NaN stays NaN.
SPEAR_INLINE void store(Bfloat16* target, Float value) {
    const Word bits = (Word)value;
    const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Half half = __builtin_convertvector(value == value ? rounded : (bits >> 16) | 0x40u, Half);
    __builtin_memcpy(target, &half, sizeof(half));
}

SPEAR_INLINE float sum_lanes(Float value) {
    float sum = 0;
    for (int64_t lane = 0; lane < kWidth; ++lane) sum += value[lane];
    return sum;
}

// NaN when any lane is NaN.
SPEAR_INLINE float max_lanes(Float value) {
    float best = value[0];
    for (int64_t lane = 1; lane < kWidth; ++lane) best = best >= value[lane] ? best : value[lane];
    return best;
}

// 2^x for -125 <= x <= 0, relative error below 2e-7, exactly 1 at 0; NaN gives NaN. Minimax polynomial of degree 5 on
// [-1/2, 1/2] for the fraction; adding the magic number rounds x to an integer, which then sits in the low mantissa bits.
SPEAR_INLINE Float exp2_nonpositive(Float x) {
    const Float magic = broadcast(12582912.0f);
    const Float shifted = x + magic;
    const Float f = x - (shifted - magic);
    Float p = broadcast(1.3264727253e-03f);
    p = p * f + 9.6715127858e-03f;
    p = p * f + 5.5507337445e-02f;
    p = p * f + 2.4022242083e-01f;
    p = p * f + 6.9314697760e-01f;
    p = p * f + 1.0f;
    return (Float)((Int)p + ((Int)shifted << 23));
}
