// Row kernels of token_logprobs for one instruction set; see foreach_isa.h for the rules of such a file.

constexpr int64_t kPair = 2 * kWidth;
constexpr int64_t kStep = 2 * kPair;  // elements per unrolled step
constexpr int64_t kRun = 8 * kStep;   // elements that are added up in float: of equal ones every sum errs the same way
constexpr int64_t kCacheLine = 64;

// Columns that share a reference: few enough to stay in L1 between the two passes.
template <typename Element>
constexpr int64_t block_columns = 8192 / static_cast<int64_t>(sizeof(Element));

// Largest element of `length` elements, a multiple of kPair; NaN is ignored here and surfaces in the sum.
template <typename Element>
SPEAR_INLINE float max_of_block(const Element* x, int64_t length) {
    Float best[4];
    for (Float& value : best) value = broadcast(kLowest);
    int64_t i = 0;
    for (; i + kStep <= length; i += kStep) {
        const Pair p = load_pair(x + i), q = load_pair(x + i + kPair);
        best[0] = larger(p.a, best[0]);
        best[1] = larger(p.b, best[1]);
        best[2] = larger(q.a, best[2]);
        best[3] = larger(q.b, best[3]);
    }
    for (; i < length; i += kPair) {
        const Pair p = load_pair(x + i);
        best[0] = larger(p.a, best[0]);
        best[1] = larger(p.b, best[1]);
    }
    return max_lanes(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

// Sums of exp((x - reference) / T) and of that times (x - reference), by lane.
template <bool kEntropy>
struct LaneSums {
    Float sum = {};
    Float weighted = {};

    SPEAR_METHOD void add(Float x, Float reference, Float floor, Float log2_factor) {
        const Float d = larger(floor, x - reference);
        const Float e = exp2_nonpositive(d * log2_factor);
        sum += e;
        if (kEntropy) weighted += e * d;
    }
};

// Adds `length` elements (a multiple of kPair) to `state`. The next block is fetched while this one is computed.
template <typename Element, bool kEntropy>
SPEAR_INLINE void add_block(OnlineSoftmax& state, const Element* x, int64_t length, const Scale& scale) {
    state.raise_max(max_of_block(x, length), scale.inv_temperature);
    const Float reference = broadcast(state.max);
    const Float floor = broadcast(scale.floor);
    const Float factor = broadcast(scale.log2_factor);
    DoubleSums sum, weighted;
    for (int64_t i = 0; i < length;) {
        const int64_t stop = i + kRun < length ? i + kRun : length;
        LaneSums<kEntropy> lanes[4];
        for (; i + kStep <= stop; i += kStep) {
            const Element* next = x + i + block_columns<Element>;
            for (int64_t k = 0; k < kStep; k += kCacheLine / static_cast<int64_t>(sizeof(Element))) {
                __builtin_prefetch(next + k);
            }
            const Pair p = load_pair(x + i), q = load_pair(x + i + kPair);
            lanes[0].add(p.a, reference, floor, factor);
            lanes[1].add(p.b, reference, floor, factor);
            lanes[2].add(q.a, reference, floor, factor);
            lanes[3].add(q.b, reference, floor, factor);
        }
        for (; i < stop; i += kPair) {
            const Pair p = load_pair(x + i);
            lanes[0].add(p.a, reference, floor, factor);
            lanes[1].add(p.b, reference, floor, factor);
        }
        sum.add((lanes[0].sum + lanes[1].sum) + (lanes[2].sum + lanes[3].sum));
        if (kEntropy) {
            weighted.add((lanes[0].weighted + lanes[1].weighted) + (lanes[2].weighted + lanes[3].weighted));
        }
    }
    state.sum += sum.total();
    if (kEntropy) state.weighted += weighted.total();
}

template <typename Element, bool kEntropy>
OnlineSoftmax forward_row(const void* row, int64_t columns, const Scale& scale) {
    const Element* x = static_cast<const Element*>(row);
    OnlineSoftmax state;
    const int64_t whole = columns - columns % kPair;
    for (int64_t start = 0; start < whole; start += block_columns<Element>) {
        const int64_t left = whole - start;
        add_block<Element, kEntropy>(state, x + start, left < block_columns<Element> ? left : block_columns<Element>,
                                     scale);
    }
    if (whole < columns) {
        Element tail[kPair];
        for (Element& element : tail) assign(element, -__builtin_inff());
        for (int64_t i = 0; whole + i < columns; ++i) tail[i] = x[whole + i];
        add_block<Element, kEntropy>(state, tail, kPair, scale);
    }
    return state;
}

// exp((x - max) / T) * (factor + slope * (x - max)), exactly 0 where the exponential underflows.
template <bool kEntropy>
struct Gradient {
    Float max, factor, slope, floor, log2_factor;

    SPEAR_METHOD Float of(Float x) const {
        const Float d = larger(floor, x - max);
        const Float e = exp2_nonpositive(d * log2_factor);
        const Float kept = (Float)((Int)e & (d > floor));
        return kEntropy ? kept * (factor + slope * d) : kept * factor;
    }
    SPEAR_METHOD Pair of(Pair x) const { return {of(x.a), of(x.b)}; }
};

// Writes a row's gradient past the caches as far as whole steps go; returns the first column that is left. The first
// pair is stored twice where the row is not aligned.
template <bool kEntropy>
SPEAR_INLINE int64_t stream_row(const float* x, float* y, int64_t columns, const Gradient<kEntropy>& gradient) {
    if (columns < 2 * kStep) return 0;
    store_pair(y, gradient.of(load_pair(x)));
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(y) % sizeof(Float));
    int64_t i = misaligned == 0 ? 0 : (static_cast<int64_t>(sizeof(Float)) - misaligned) / 4;
    for (; i + kStep <= columns; i += kStep) {
        const Pair p = gradient.of(load_pair(x + i)), q = gradient.of(load_pair(x + i + kPair));
        stream_pair(y + i, p);
        stream_pair(y + i + kPair, q);
    }
    end_stream();
    return i;
}

// bfloat16 is bound by arithmetic, not by memory.
template <bool kEntropy>
SPEAR_INLINE int64_t stream_row(const Bfloat16*, Bfloat16*, int64_t, const Gradient<kEntropy>&) {
    return 0;
}

// `stream`: the result is not the logits and larger than the caches.
template <typename Element, bool kEntropy>
void backward_row(const void* row, void* out, int64_t columns, const Scale& scale, const RowGradient& grad,
                  bool stream) {
    const Element* x = static_cast<const Element*>(row);
    Element* y = static_cast<Element*>(out);
    const Gradient<kEntropy> gradient = {broadcast(grad.max), broadcast(grad.factor), broadcast(grad.slope),
                                         broadcast(scale.floor), broadcast(scale.log2_factor)};
    int64_t i = stream ? stream_row<kEntropy>(x, y, columns, gradient) : 0;
    for (; i + kStep <= columns; i += kStep) {
        const Pair p = gradient.of(load_pair(x + i)), q = gradient.of(load_pair(x + i + kPair));
        store_pair(y + i, p);
        store_pair(y + i + kPair, q);
    }
    for (; i + kPair <= columns; i += kPair) store_pair(y + i, gradient.of(load_pair(x + i)));
    if (i < columns) {
        Element tail[kPair] = {};
        for (int64_t k = 0; i + k < columns; ++k) tail[k] = x[i + k];
        store_pair(tail, gradient.of(load_pair(tail)));
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
