// What one thread of a CUDA block does with its share of a row of logits. Nothing here is specific to a device, so the
// tests run the same code on the host (row_emulation.cpp).
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "online_softmax.h"
#include "packed_words.h"
#include "softmax_scale.h"

#if defined(__CUDA_ARCH__)
#define SPEAR_UNROLL _Pragma("unroll")
#else
#define SPEAR_UNROLL
#endif

namespace spear {

constexpr int kVectorsInFlight = 4;  // loads of 16 bytes that a thread issues before it uses the first

// 2^x for x >= -125, within two units in the last place; 0 for x below the normal numbers.
SPEAR_HOST_DEVICE inline float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

// The larger one, NaN where either is NaN: a NaN logit must reach the sum.
SPEAR_HOST_DEVICE inline float larger_or_nan(float x, float y) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
    return result;
#else
    return x != x || x > y ? x : y;
#endif
}

// exp(d / T) of a shift of the reference point; exactly 0 where it is negligible.
struct FastDecay {
    float log2_factor;
    SPEAR_HOST_DEVICE float operator()(float shift) const { return fast_exp2(shift * log2_factor); }
};

// Columns [0, head) and [tail, columns) are taken one by one, those between in aligned vectors of 16 bytes.
template <typename Element>
struct RowSpan {
    SPEAR_HOST_DEVICE RowSpan(const void* row, int columns, bool use_vectors) : head(columns), vectors(0) {
        if (use_vectors) {
            const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16);
            const int before = (16 - misaligned) % 16 / static_cast<int>(sizeof(Element));
            head = before < columns ? before : columns;
            vectors = (columns - head) / kVectorWidth<Element>;
        }
        tail = head + vectors * kVectorWidth<Element>;
    }

    int head;
    int vectors;
    int tail;
};

// Adds a few logits; the sums over them are made first, so that the running sums are rounded less often.
template <bool kEntropy, int kCount>
SPEAR_HOST_DEVICE inline void add_logits(SoftmaxState<float>& state, const float (&x)[kCount], const Scale& scale) {
    float largest = x[0];  // NaN is ignored here and surfaces in the sum
    SPEAR_UNROLL
    for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, x[i]);
    state.move_to(largest, FastDecay{scale.log2_factor});
    float sum[2] = {0, 0}, weighted[2] = {0, 0};
    SPEAR_UNROLL
    for (int i = 0; i < kCount; ++i) {
        const float d = larger_or_nan(x[i] - state.max, scale.floor);
        const float e = fast_exp2(d * scale.log2_factor);
        sum[i % 2] += e;
        if (kEntropy) weighted[i % 2] += e * d;
    }
    state.sum += sum[0] + sum[1];
    if (kEntropy) state.weighted += weighted[0] + weighted[1];
}

// Statistics of the columns that fall to `thread` of `threads`.
template <typename Element, bool kEntropy>
SPEAR_HOST_DEVICE inline SoftmaxState<float> thread_stats(const Element* row, int columns, int thread, int threads,
                                                          const Scale& scale) {
    const RowSpan<Element> span(row, columns, true);
    SoftmaxState<float> state;
    for (int i = thread; i < span.head; i += threads) {
        const float x[1] = {to_float(row[i])};
        add_logits<kEntropy>(state, x, scale);
    }
    const Element* body = row + span.head;
    for (int first = thread; first < span.vectors; first += kVectorsInFlight * threads) {
        Words words[kVectorsInFlight];
        SPEAR_UNROLL
        for (int k = 0; k < kVectorsInFlight; ++k) {
            const int vector = first + k * threads;
            if (vector < span.vectors) words[k] = load_words(body + vector * kVectorWidth<Element>);
        }
        // Summed apart: of equal terms every addition errs the same way, so that few should follow one another.
        SoftmaxState<float> round;
        round.max = state.max;
        SPEAR_UNROLL
        for (int k = 0; k < kVectorsInFlight; ++k) {
            if (first + k * threads < span.vectors) {
                float x[kVectorWidth<Element>];
                unpack<Element>(words[k], x);
                add_logits<kEntropy>(round, x, scale);
            }
        }
        state.move_to(round.max, FastDecay{scale.log2_factor});
        state.sum += round.sum;
        if (kEntropy) state.weighted += round.weighted;
    }
    for (int i = span.tail + thread; i < columns; i += threads) {
        const float x[1] = {to_float(row[i])};
        add_logits<kEntropy>(state, x, scale);
    }
    return state;
}

// Gradient of a logit that is not the target's; exactly 0 where the exponential underflows.
SPEAR_HOST_DEVICE inline float logit_gradient(float x, const RowGradient& grad, const Scale& scale) {
    const float d = x - grad.max;
    const float value = fast_exp2(d * scale.log2_factor) * (grad.factor + grad.slope * d);
    return d > scale.floor ? value : 0.0f;
}

// Writes the gradient of the columns that fall to `thread` of `threads`; `out` may be `row`.
template <typename Element>
SPEAR_HOST_DEVICE inline void thread_gradient(const Element* row, Element* out, int columns, int thread, int threads,
                                              const Scale& scale, const RowGradient& grad) {
    const bool aligned_alike = reinterpret_cast<uintptr_t>(row) % 16 == reinterpret_cast<uintptr_t>(out) % 16;
    const RowSpan<Element> span(row, columns, aligned_alike);
    for (int i = thread; i < span.head; i += threads) assign(out[i], logit_gradient(to_float(row[i]), grad, scale));
    for (int first = thread; first < span.vectors; first += kVectorsInFlight * threads) {
        Words words[kVectorsInFlight];
        SPEAR_UNROLL
        for (int k = 0; k < kVectorsInFlight; ++k) {
            const int vector = first + k * threads;
            if (vector < span.vectors) words[k] = load_words(row + span.head + vector * kVectorWidth<Element>);
        }
        SPEAR_UNROLL
        for (int k = 0; k < kVectorsInFlight; ++k) {
            const int vector = first + k * threads;
            if (vector < span.vectors) {
                float x[kVectorWidth<Element>];
                unpack<Element>(words[k], x);
                SPEAR_UNROLL
                for (float& value : x) value = logit_gradient(value, grad, scale);
                store_words(out + span.head + vector * kVectorWidth<Element>, pack<Element>(x));
            }
        }
    }
    for (int i = span.tail + thread; i < columns; i += threads) {
        assign(out[i], logit_gradient(to_float(row[i]), grad, scale));
    }
}

// Writes one value into the columns [begin, end) that fall to `thread` of `threads`.
template <typename Element>
SPEAR_HOST_DEVICE inline void thread_fill(Element* out, int begin, int end, int thread, int threads, float value) {
    Element* start = out + begin;
    const RowSpan<Element> span(start, end - begin, true);
    float values[kVectorWidth<Element>];
    for (float& each : values) each = value;
    const Words words = pack<Element>(values);
    for (int i = thread; i < span.head; i += threads) assign(start[i], value);
    for (int i = thread; i < span.vectors; i += threads) {
        store_words(start + span.head + i * kVectorWidth<Element>, words);
    }
    for (int i = span.tail + thread; i < end - begin; i += threads) assign(start[i], value);
}

}  // namespace spear
