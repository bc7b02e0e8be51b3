// Row kernels of token_logprobs for one instruction set; see foreach_isa.h for the rules of such a file.

// Columns whose sum is kept in float before it goes to double: small enough to stay in L1 between the two passes.
constexpr int64_t kBlock = 2048;
constexpr int64_t kUnroll = 4;

// Largest element of `length` elements, a multiple of kWidth; NaN is ignored here and surfaces in the sum.
template <typename Element>
SPEAR_INLINE float max_of_block(const Element* x, int64_t length) {
    Float best[kUnroll];
    for (int64_t k = 0; k < kUnroll; ++k) best[k] = broadcast(kLowest);
    int64_t i = 0;
    for (; i + kUnroll * kWidth <= length; i += kUnroll * kWidth) {
        for (int64_t k = 0; k < kUnroll; ++k) best[k] = larger(load(x + i + k * kWidth), best[k]);
    }
    for (; i < length; i += kWidth) best[0] = larger(load(x + i), best[0]);
    return max_lanes(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

// Adds `length` elements (a multiple of kWidth) to `state`. The next block is fetched while this one is computed.
template <typename Element, bool kEntropy>
SPEAR_INLINE void add_block(OnlineSoftmax& state, const Element* x, int64_t length, const Scale& scale) {
    state.raise_max(max_of_block(x, length), scale.inv_temperature);
    const Float reference = broadcast(state.max);
    const Float floor = broadcast(scale.floor);
    Float sum[kUnroll] = {};
    Float weighted[kUnroll] = {};
    int64_t i = 0;
    for (; i + kUnroll * kWidth <= length; i += kUnroll * kWidth) {
        for (int64_t k = 0; k < kUnroll; ++k) {
            const Element* p = x + i + k * kWidth;
            __builtin_prefetch(p + kBlock);
            const Float d = larger(floor, load(p) - reference);
            const Float e = exp2_nonpositive(d * scale.log2_factor);
            sum[k] += e;
            if (kEntropy) weighted[k] += e * d;
        }
    }
    for (; i < length; i += kWidth) {
        const Float d = larger(floor, load(x + i) - reference);
        const Float e = exp2_nonpositive(d * scale.log2_factor);
        sum[0] += e;
        if (kEntropy) weighted[0] += e * d;
    }
    state.sum += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (kEntropy) state.weighted += sum_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
}

template <typename Element, bool kEntropy>
OnlineSoftmax forward_row(const void* row, int64_t columns, const Scale& scale) {
    const Element* x = static_cast<const Element*>(row);
    OnlineSoftmax state;
    const int64_t whole = columns - columns % kWidth;
    for (int64_t start = 0; start < whole; start += kBlock) {
        add_block<Element, kEntropy>(state, x + start, whole - start < kBlock ? whole - start : kBlock, scale);
    }
    if (whole < columns) {
        Element tail[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
            if (whole + i < columns) tail[i] = x[whole + i];
            else assign(tail[i], -__builtin_inff());
        }
        add_block<Element, kEntropy>(state, tail, kWidth, scale);
    }
    return state;
}

// exp((x - max) / T) * (factor + slope * (x - max)), exactly 0 where the exponential underflows.
template <typename Element, bool kEntropy>
SPEAR_INLINE Float gradient(const Element* x, const Scale& scale, const RowGradient& row) {
    const Float floor = broadcast(scale.floor);
    const Float d = larger(floor, load(x) - row.max);
    const Float e = exp2_nonpositive(d * scale.log2_factor);
    const Float kept = (Float)((Int)e & (d > floor));
    return kEntropy ? kept * (row.factor + row.slope * d) : kept * row.factor;
}

template <typename Element, bool kEntropy>
void backward_row(const void* row, void* out, int64_t columns, const Scale& scale, const RowGradient& grad) {
    const Element* x = static_cast<const Element*>(row);
    Element* y = static_cast<Element*>(out);
    int64_t i = 0;
    for (; i + kUnroll * kWidth <= columns; i += kUnroll * kWidth) {
        Float g[kUnroll];
        for (int64_t k = 0; k < kUnroll; ++k) g[k] = gradient<Element, kEntropy>(x + i + k * kWidth, scale, grad);
        for (int64_t k = 0; k < kUnroll; ++k) store(y + i + k * kWidth, g[k]);
    }
    for (; i + kWidth <= columns; i += kWidth) store(y + i, gradient<Element, kEntropy>(x + i, scale, grad));
    if (i < columns) {
        Element tail[kWidth] = {};
        for (int64_t k = 0; i + k < columns; ++k) tail[k] = x[i + k];
        store(tail, gradient<Element, kEntropy>(tail, scale, grad));
        for (int64_t k = 0; i + k < columns; ++k) y[i + k] = tail[k];
    }
}

template <typename Element>
RowKernels row_kernels_of() {
    return {forward_row<Element, false>, forward_row<Element, true>, backward_row<Element, false>,
            backward_row<Element, true>};
}

static RowKernels row_kernels(Dtype dtype) {
    return dtype == Dtype::float32 ? row_kernels_of<float>() : row_kernels_of<Bfloat16>();
}
