// Block kernel of cov_select for one instruction set; see foreach_isa.h for the rules of such a file.

constexpr int64_t kHalfWidth = kWidth / 2;

typedef int64_t Long __attribute__((vector_size(4 * SPEAR_WIDTH)));

// One bit per lane of a mask.
SPEAR_INLINE unsigned lane_bits(Long mask) {
#if SPEAR_WIDTH == 16
    return static_cast<unsigned>(_mm512_movepi64_mask((__m512i)mask));
#elif SPEAR_WIDTH == 8
    return static_cast<unsigned>(_mm256_movemask_pd((__m256d)mask));
#else
    return (mask[0] ? 1u : 0u) | (mask[1] ? 2u : 0u);
#endif
}

struct CovVectors {
    Double mean_advantage, mean_log_prob, lb, ub, near_lb[2], near_ub[2], clip_low, clip_high;
};

SPEAR_INLINE Double broadcast_double(double value) { return value - Double{}; }

SPEAR_INLINE Half load_half(const float* source) {
    Half value;
    __builtin_memcpy(&value, source, sizeof(value));
    return value;
}

// kHalfWidth tokens: masks of the candidates and of those near a bound.
SPEAR_INLINE void judge_tokens(const float* log_probs, const float* old_log_probs, const float* advantages,
                               const CovVectors& v, Long& candidates, Long& near) {
    const Half log_prob = load_half(log_probs);
    // The difference is taken in float, as in the loss.
    const Double log_ratio = widened(log_prob - load_half(old_log_probs));
    const Double advantage = widened(load_half(advantages));
    const Double covariance = (advantage - v.mean_advantage) * (widened(log_prob) - v.mean_log_prob);
    const Double zero = {};
    const Long above = (advantage > zero) & (log_ratio > v.clip_high);
    const Long below = (advantage < zero) & (log_ratio < v.clip_low);
    candidates = (covariance > v.lb) & (covariance < v.ub) & ~(above | below);
    near = ((covariance >= v.near_lb[0]) & (covariance <= v.near_lb[1])) |
           ((covariance >= v.near_ub[0]) & (covariance <= v.near_ub[1]));
}

// Appends the places of the candidates among kHalfWidth tokens of the block, without a branch that depends on them: it
// may write kHalfWidth places, which is no more than there is room for.
SPEAR_INLINE void collect(Long candidates, Long near, int64_t position, CovBlock& block) {
    int64_t* places = block.places + block.candidates;
    const unsigned bits = lane_bits(candidates);
#if SPEAR_WIDTH == 16
    const Long lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    const __m512i packed = _mm512_maskz_compress_epi64(static_cast<__mmask8>(bits), (__m512i)(lanes + position));
    __builtin_memcpy(places, &packed, sizeof(packed));
#else
    int64_t count = 0;
    for (int64_t lane = 0; lane < kHalfWidth; ++lane) {
        places[count] = position + lane;
        count += (bits >> lane) & 1u;
    }
#endif
    block.candidates += __builtin_popcount(bits);
    block.near += __builtin_popcount(lane_bits(near));
}

static void cov_block(const CovInputs& inputs, int64_t start, int64_t stop, const CovRule& rule, CovBlock& block) {
    const CovVectors v = {broadcast_double(rule.mean_advantage),
                          broadcast_double(rule.mean_log_prob),
                          broadcast_double(rule.lb),
                          broadcast_double(rule.ub),
                          {broadcast_double(rule.near_lb[0]), broadcast_double(rule.near_lb[1])},
                          {broadcast_double(rule.near_ub[0]), broadcast_double(rule.near_ub[1])},
                          broadcast_double(rule.clip_low),
                          broadcast_double(rule.clip_high)};
    Long candidates, near;
    int64_t i = start;
    for (; i + kHalfWidth <= stop; i += kHalfWidth) {
        judge_tokens(inputs.log_probs + i, inputs.old_log_probs + i, inputs.advantages + i, v, candidates, near);
        collect(candidates, near, i, block);
    }
    if (i == stop) return;
    float columns[3][kHalfWidth] = {};
    for (int64_t k = 0; i + k < stop; ++k) {
        columns[0][k] = inputs.log_probs[i + k];
        columns[1][k] = inputs.old_log_probs[i + k];
        columns[2][k] = inputs.advantages[i + k];
    }
    judge_tokens(columns[0], columns[1], columns[2], v, candidates, near);
    for (int64_t k = 0; i + k < stop; ++k) {
        if (candidates[k]) block.places[block.candidates++] = i + k;
        if (near[k]) ++block.near;
    }
}

// Sum in double of at most kSumBlock values, over kSumLanes interleaved sums that are then folded in halves.
SPEAR_INLINE double lane_sum(const float* values, int64_t count) {
    constexpr int64_t kVectors = kSumLanes / kHalfWidth;
    Double sums[kVectors] = {};
    int64_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes) {
        for (int64_t k = 0; k < kVectors; ++k) sums[k] += widened(load_half(values + i + k * kHalfWidth));
    }
    double lanes[kSumLanes];
    __builtin_memcpy(lanes, sums, sizeof(lanes));
    for (int64_t k = 0; i + k < count; ++k) lanes[k] += values[i + k];
    for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
        for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    }
    return lanes[0];
}

static double row_sum(const float* values, int64_t count) {
    double sum = 0;
    for (int64_t start = 0; start < count; start += kSumBlock) {
        sum += lane_sum(values + start, count - start < kSumBlock ? count - start : kSumBlock);
    }
    return sum;
}

static CovKernels cov_kernels() { return {cov_block, row_sum}; }
