// Sampling of one row of logits. Included once per instruction set.

// In place: x / temperature, minus infinity behind the vocabulary up to a whole page. Returns the index of the first
// largest entry, or -1 when some logit is NaN or the largest is infinite.
static int64_t scale_row(float* x, int64_t vocab, float temperature) {
    const Float lowest = broadcast(-__builtin_inff());
    const int64_t end = round_up(vocab, kPage);
    for (int64_t i = vocab; i < end; ++i) x[i] = -__builtin_inff();
    Float best = lowest;
    Int unordered = {};
    for (int64_t i = 0; i < end; i += kWidth) {
        const Float value = load(x + i) / temperature;
        store(x + i, value);
        best = select(value > best, value, best);
        unordered |= value != value;
    }
    for (int64_t lane = 0; lane < kWidth; ++lane) {
        if (unordered[lane]) return -1;
    }
    const float top = max_lanes(best);
    if (!__builtin_isfinite(top)) return -1;
    int64_t index = 0;
    while (x[index] != top) ++index;
    return index;
}

// Sum of exp(x - top) over entries [first, first + kSumChunk), in double.
SPEAR_INLINE double chunk_sum(const float* x, float top, int64_t first, int64_t end) {
    const int64_t last = first + kSumChunk < end ? first + kSumChunk : end;
    Float parts[kParts] = {};
    for (int64_t i = first; i < last; i += kPage) {
        for (int64_t p = 0; p < kParts; ++p) parts[p] += exp_lanes(load(x + i + p * kWidth) - top);
    }
    double sum = 0;
    for (int64_t p = 0; p < kParts; ++p) {
        for (int64_t lane = 0; lane < kWidth; ++lane) sum += static_cast<double>(parts[p][lane]);
    }
    return sum;
}

// Entry at which the running sum of exp(x - top), in vocabulary order, passes uniform * total.
static int64_t inverse_cdf(const float* x, float top, int64_t end, const double* sums, double target) {
    const int64_t chunks = (end + kSumChunk - 1) / kSumChunk;
    int64_t chunk = 0;
    double below = 0;
    while (chunk + 1 < chunks && below + sums[chunk] <= target) below += sums[chunk++];
    const int64_t first = chunk * kSumChunk, last = first + kSumChunk < end ? first + kSumChunk : end;
    int64_t chosen = -1;
    for (int64_t i = first; i < last; i += kWidth) {
        const Float weights = exp_lanes(load(x + i) - top);
        for (int64_t lane = 0; lane < kWidth; ++lane) {
            if (!(weights[lane] > 0.0f)) continue;
            chosen = i + lane;
            below += static_cast<double>(weights[lane]);
            if (below > target) return chosen;
        }
    }
    return chosen;
}

// Temperature 0 is greedy and reports log_softmax(logits); else log_softmax(logits / temperature), unrestricted.
static SampledToken sample_row(float* x, int64_t vocab, float temperature, int32_t top_k, float top_p, uint64_t key,
                               uint64_t position, double* sums) {
    const bool greedy = temperature == 0.0f;
    const int64_t best = scale_row(x, vocab, greedy ? 1.0f : temperature), end = round_up(vocab, kPage);
    if (best < 0) return {-1, 0.0f};
    const float top = x[best];
    double total = 0;
    for (int64_t first = 0; first < end; first += kSumChunk) {
        sums[first / kSumChunk] = chunk_sum(x, top, first, end);
        total += sums[first / kSumChunk];
    }
    const double log_sum = static_cast<double>(top) + __builtin_log(total);
    int64_t token = best;
    if (!greedy) {
        const double uniform = keyed_uniform(key, position);
        const bool restricted = (top_k > 0 && top_k < vocab) || top_p < 1.0f;
        token = restricted ? sample_restricted(x, vocab, log_sum, top_k, top_p, uniform)
                           : inverse_cdf(x, top, end, sums, uniform * total);
        if (token < 0) token = best;
    }
    return {static_cast<int32_t>(token), static_cast<float>(static_cast<double>(x[token]) - log_sum)};
}
