// Block kernel of cov_select for one instruction set; see foreach_isa.h for the rules of such a file.

constexpr int64_t kHalfWidth = kWidth / 2;

typedef int64_t Long __attribute__((vector_size(4 * SPEAR_WIDTH)));

SPEAR_INLINE Double broadcast_double(double value) { return value - Double{}; }

SPEAR_INLINE Half load_half(const float* source) {
    Half value;
    __builtin_memcpy(&value, source, sizeof(value));
    return value;
}

// One bit for each of kWidth tokens: its covariance is in [low, high].
SPEAR_INLINE unsigned in_range(const CovInputs& inputs, int64_t position, Double mean_advantage, Double mean_log_prob,
                               Double low, Double high) {
    unsigned bits = 0;
    for (int64_t half = 0; half < 2; ++half) {
        const int64_t i = position + half * kHalfWidth;
        const Double covariance = (widened(load_half(inputs.advantages + i)) - mean_advantage) *
                                  (widened(load_half(inputs.log_probs + i)) - mean_log_prob);
#if SPEAR_WIDTH == 16
        const __mmask8 above = _mm512_cmp_pd_mask((__m512d)covariance, (__m512d)low, _CMP_GE_OQ);
        bits |= static_cast<unsigned>(_mm512_mask_cmp_pd_mask(above, (__m512d)covariance, (__m512d)high, _CMP_LE_OQ))
                << (half * kHalfWidth);
#else
        const Long mask = (covariance >= low) & (covariance <= high);
#if SPEAR_WIDTH == 8
        bits |= static_cast<unsigned>(_mm256_movemask_pd((__m256d)mask)) << (half * kHalfWidth);
#else
        bits |= ((mask[0] ? 1u : 0u) | (mask[1] ? 2u : 0u)) << (half * kHalfWidth);
#endif
#endif
    }
    return bits;
}

// Appends position + lane of every bit to places[count...], without a branch that depends on them: it may write kWidth
// places, which is no more than there is room for.
SPEAR_INLINE int64_t append(unsigned bits, int64_t position, int32_t* places, int64_t count) {
#if SPEAR_WIDTH == 16
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i all = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(position)));
    const __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), all);
    __builtin_memcpy(places + count, &packed, sizeof(packed));
#else
    int64_t next = count;
    for (int64_t lane = 0; lane < kWidth; ++lane) {
        places[next] = static_cast<int32_t>(position + lane);
        next += (bits >> lane) & 1u;
    }
#endif
    return count + __builtin_popcount(bits);
}

// Tokens whose covariance is in [lowest, highest], a range that holds every candidate and every token near a bound.
// Few are: what remains to be asked of them is asked one by one, and the old log-probs of others are never read.
static int64_t collect_range(const CovInputs& inputs, int64_t start, int64_t stop, const CovRule& rule,
                             int32_t* places) {
    const double lowest = __builtin_fmin(rule.near_lb[0], rule.near_ub[0]);  // a bound may be NaN: it holds nothing
    const double highest = __builtin_fmax(rule.near_lb[1], rule.near_ub[1]);
    const Double low = broadcast_double(lowest), high = broadcast_double(highest);
    const Double mean_advantage = broadcast_double(rule.mean_advantage);
    const Double mean_log_prob = broadcast_double(rule.mean_log_prob);
    int64_t count = 0, i = start;
    for (; i + kWidth <= stop; i += kWidth) {
        count = append(in_range(inputs, i, mean_advantage, mean_log_prob, low, high), i, places, count);
    }
    for (; i < stop; ++i) {
        const double covariance = covariance_of(inputs, i, rule);
        places[count] = static_cast<int32_t>(i);
        count += (covariance >= lowest) & (covariance <= highest);
    }
    return count;
}

static void cov_block(const CovInputs& inputs, int64_t start, int64_t stop, const CovRule& rule, CovBlock& block) {
    int32_t* places = block.places;
    const int64_t count = collect_range(inputs, start, stop, rule, places);
    int64_t candidates = 0, near = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t place = places[i];
        const double covariance = covariance_of(inputs, place, rule);
        const float advantage = inputs.advantages[place];
        // The difference is taken in float, as in the loss.
        const double log_ratio = inputs.log_probs[place] - inputs.old_log_probs[place];
        const bool clipped =
            ((advantage > 0) & (log_ratio > rule.clip_high)) | ((advantage < 0) & (log_ratio < rule.clip_low));
        near += ((covariance >= rule.near_lb[0]) & (covariance <= rule.near_lb[1])) |
                ((covariance >= rule.near_ub[0]) & (covariance <= rule.near_ub[1]));
        places[candidates] = place;
        candidates += (covariance > rule.lb) & (covariance < rule.ub) & !clipped;
    }
    block.candidates = candidates;
    block.near = near;
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
