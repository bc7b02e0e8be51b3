// Vectors of SPEAR_WIDTH floats in the compiler's vector extension: plain operators become the instruction set of the
// enclosing region. Included once per instruction set by foreach_isa.h, hence no guard.

constexpr int64_t kWidth = SPEAR_WIDTH;

typedef float Float __attribute__((vector_size(4 * SPEAR_WIDTH)));
typedef int32_t Int __attribute__((vector_size(4 * SPEAR_WIDTH)));
typedef uint32_t Word __attribute__((vector_size(4 * SPEAR_WIDTH)));

#ifndef SPEAR_INLINE
#define SPEAR_METHOD inline __attribute__((always_inline))
#define SPEAR_INLINE static SPEAR_METHOD
#endif

SPEAR_INLINE Float broadcast(float value) { return value - Float{}; }

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

SPEAR_INLINE void store(float* target, Float value) { __builtin_memcpy(target, &value, sizeof(value)); }

// 2 * kWidth neighbouring elements. Which lane holds which is the affair of load_pair and store_pair: bfloat16 are
// split into even and odd ones, which takes one instruction each and no shuffle.
struct Pair {
    Float a;
    Float b;
};

// Vector by vector: gcc copies a struct of two through the stack, in pieces that the loads after it cannot forward.
SPEAR_INLINE Pair load_pair(const float* source) { return {load(source), load(source + kWidth)}; }

SPEAR_INLINE Pair load_pair(const Bfloat16* source) {
    Word bits;
    __builtin_memcpy(&bits, source, sizeof(bits));
    return {(Float)(bits << 16), (Float)(bits & 0xffff0000u)};
}

SPEAR_INLINE void store_pair(float* target, Pair pair) {
    store(target, pair.a);
    store(target + kWidth, pair.b);
}

// Past the caches, for results that are larger than they are: a line need not be read before it is written. The target
// is aligned to the vector; whoever reads it on another thread needs the fence that ends a row of such stores.
SPEAR_INLINE void stream_pair(float* target, Pair pair) {
#if SPEAR_WIDTH == 16
    _mm512_stream_ps(target, (__m512)pair.a);
    _mm512_stream_ps(target + kWidth, (__m512)pair.b);
#elif SPEAR_WIDTH == 8
    _mm256_stream_ps(target, (__m256)pair.a);
    _mm256_stream_ps(target + kWidth, (__m256)pair.b);
#else
    store_pair(target, pair);
#endif
}

SPEAR_INLINE void end_stream() {
#if SPEAR_WIDTH > 4
    _mm_sfence();
#endif
}

// The nearest bfloat16, ties to even, in the upper halves of the lanes; NaN must have the default payload.
SPEAR_INLINE Word rounded_bfloat16(Float value) {
    const Word bits = (Word)value;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

SPEAR_INLINE void store_pair(Bfloat16* target, Pair pair) {
    const Word bits = (rounded_bfloat16(pair.a) >> 16) | (rounded_bfloat16(pair.b) & 0xffff0000u);
    __builtin_memcpy(target, &bits, sizeof(bits));
}

// NaN when any lane is NaN.
SPEAR_INLINE float max_lanes(Float value) {
    float best = value[0];
    for (int64_t lane = 1; lane < kWidth; ++lane) best = best >= value[lane] ? best : value[lane];
    return best;
}

// 2^x for -125 <= x <= 0, relative error below 2e-7, exactly 1 at 0; NaN gives NaN. Minimax polynomial of degree 5 on
// [-1/2, 1/2] for the fraction; adding the magic number rounds x to an integer, which then sits in the low bits.
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
    return (Float)((Word)p + ((Word)shifted << 23));  // unsigned, as lanes that nobody reads may overflow
}

// e^x for -87 <= x <= 88, relative error below 1.5e-7, exactly 1 at 0; NaN gives NaN. The argument is reduced by
// multiples of log 2 in two parts, the first of few bits so that its products are exact; (e^r - 1 - r) / r^2 is a
// minimax polynomial on |r| <= log(2) / 2.
SPEAR_INLINE Float exponential(Float x) {
    const Float magic = broadcast(12582912.0f);
    const Float shifted = x * 1.4426950409f + magic;
    const Float n = shifted - magic;
    const Float r = (x - n * 0.693359375f) - n * -2.1219444005e-04f;
    Float p = broadcast(1.3814462582e-03f);
    p = p * r + 8.3687808365e-03f;
    p = p * r + 4.1668392718e-02f;
    p = p * r + 1.6666519642e-01f;
    p = p * r + 4.9999994040e-01f;
    p = p * (r * r) + r + 1.0f;
    const Float result = (Float)((Word)p + ((Word)shifted << 23));
    return x == x ? result : x;
}

// The lanes of a vector of floats as two vectors of doubles.
typedef double Double __attribute__((vector_size(4 * SPEAR_WIDTH)));
typedef float Half __attribute__((vector_size(2 * SPEAR_WIDTH)));

// gcc converts by pieces, through the stack, where it is left to itself.
SPEAR_INLINE Double widened(Half value) {
#if SPEAR_WIDTH == 16
    return (Double)_mm512_maskz_cvtps_pd(0xff, (__m256)value);
#elif SPEAR_WIDTH == 8
    return (Double)_mm256_cvtps_pd((__m128)value);
#else
    return __builtin_convertvector(value, Double);
#endif
}

SPEAR_INLINE Half low_half(Float value) {
    Half half;
    __builtin_memcpy(&half, &value, sizeof(half));
    return half;
}

SPEAR_INLINE Half high_half(Float value) {
#if SPEAR_WIDTH == 16
    return (Half)_mm512_maskz_extractf32x8_ps(0xff, (__m512)value, 1);
#elif SPEAR_WIDTH == 8
    return (Half)_mm256_extractf128_ps((__m256)value, 1);
#else
    return Half{value[2], value[3]};
#endif
}

struct DoubleSums {
    Double low = {};
    Double high = {};

    SPEAR_METHOD void add(Float value) {
        low += widened(low_half(value));
        high += widened(high_half(value));
    }
    // kWidth values in memory: no shuffle halves them.
    SPEAR_METHOD void add(const float* values) {
        Half half;
        __builtin_memcpy(&half, values, sizeof(half));
        low += widened(half);
        __builtin_memcpy(&half, values + kWidth / 2, sizeof(half));
        high += widened(half);
    }
    SPEAR_METHOD double total() const {
        const Double both = low + high;
        double sum = 0;
        for (int64_t lane = 0; lane < kWidth / 2; ++lane) sum += both[lane];
        return sum;
    }
};

// Booleans of torch as a mask.
SPEAR_INLINE Int load_mask(const uint8_t* source) {
    // gcc widens a vector of bytes one by one where it is left to itself.
#if SPEAR_WIDTH == 16
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return (Int)_mm512_maskz_cvtepi8_epi32(0xffff, bytes) != 0;
#elif SPEAR_WIDTH == 8
    return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))) != 0;
#else
    typedef int8_t Bytes __attribute__((vector_size(SPEAR_WIDTH)));
    Bytes bytes;
    __builtin_memcpy(&bytes, source, sizeof(bytes));
    return __builtin_convertvector(bytes, Int) != 0;
#endif
}
