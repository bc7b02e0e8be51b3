// Block kernel of cov_select for one instruction set; see foreach_isa.h for the rules of such a file.

constexpr int64_t kHalfWidth = kWidth / 2;

SPEAR_INLINE Half load_half(const float* source) {
    Half value;
    __builtin_memcpy(&value, source, sizeof(value));
    return value;
}

// What holds of each lane. They are combined as they come out of comparisons, and turned into bits once.
#if SPEAR_WIDTH == 16
typedef unsigned Flags;
#else
typedef Int Flags;
#endif

// Where `one` is greater; not where either is NaN.
SPEAR_INLINE Flags above(Float one, Float other) {
#if SPEAR_WIDTH == 16
    return _mm512_cmp_ps_mask((__m512)one, (__m512)other, _CMP_GT_OQ);
#else
    return one > other;
#endif
}

// One bit for each lane.
SPEAR_INLINE unsigned bits_of(Flags flags) {
#if SPEAR_WIDTH == 16
    return flags & 0xffffu;
#elif SPEAR_WIDTH == 8
    return static_cast<unsigned>(_mm256_movemask_ps((__m256)flags));
#else
    unsigned bits = 0;
    for (int64_t lane = 0; lane < kWidth; ++lane) bits |= (flags[lane] ? 1u : 0u) << lane;
    return bits;
#endif
}

SPEAR_INLINE Float magnitude(Float value) { return (Float)((Int)value & 0x7fffffff); }

// What is asked of one token, in double.
SPEAR_INLINE void judge_one(const CovInputs& inputs, int64_t i, const CovRule& rule, bool& candidate, bool& near) {
    const double covariance = covariance_of(inputs, i, rule);
    const float advantage = inputs.advantages[i];
    // The difference is taken in float, as in the loss.
    const double log_ratio = inputs.log_probs[i] - inputs.old_log_probs[i];
    const bool clipped =
        ((advantage > 0) & (log_ratio > rule.clip_high)) | ((advantage < 0) & (log_ratio < rule.clip_low));
    near = ((covariance >= rule.near_lb[0]) & (covariance <= rule.near_lb[1])) |
           ((covariance >= rule.near_ub[0]) & (covariance <= rule.near_ub[1]));
    candidate = (covariance > rule.lb) & (covariance < rule.ub) & !clipped;
}

// The numbers of CovFilter, each repeated over the lanes.
struct CovLanes {
    Float mean_advantage, mean_log_prob, spread_advantage, spread_log_prob, spread;
    Float least, most, lowest, highest, clip_low, clip_high;

    SPEAR_METHOD explicit CovLanes(const CovFilter& filter)
        : mean_advantage(broadcast(filter.mean_advantage)),
          mean_log_prob(broadcast(filter.mean_log_prob)),
          spread_advantage(broadcast(filter.spread_advantage)),
          spread_log_prob(broadcast(filter.spread_log_prob)),
          spread(broadcast(filter.spread)),
          least(broadcast(filter.least)),
          most(broadcast(filter.most)),
          lowest(broadcast(filter.lowest)),
          highest(broadcast(filter.highest)),
          clip_low(broadcast(filter.clip_low)),
          clip_high(broadcast(filter.clip_high)) {}
};

// One bit for each of kWidth tokens: a candidate for sure; float does not tell (a NaN among others).
struct CovBits {
    unsigned sure;
    unsigned open;
};

SPEAR_INLINE CovBits filtered(const CovInputs& inputs, int64_t i, const CovLanes& rule) {
    const Float zero = {};
    const Float advantage = load(inputs.advantages + i), log_prob = load(inputs.log_probs + i);
    const Float by_advantage = advantage - rule.mean_advantage, by_log_prob = log_prob - rule.mean_log_prob;
    const Float covariance = by_advantage * by_log_prob;
    const Float error = magnitude(covariance) * CovFilter::kShare + magnitude(by_advantage) * rule.spread_log_prob +
                        magnitude(by_log_prob) * rule.spread_advantage + rule.spread;
    const Float lower = covariance - error, upper = covariance + error;
    const Flags inside = above(lower, rule.least) & above(rule.most, upper);
    const Flags outside = above(rule.lowest, upper) | above(lower, rule.highest);
    const Float log_ratio = log_prob - load(inputs.old_log_probs + i);
    const Flags clipped = (above(advantage, zero) & above(log_ratio, rule.clip_high)) |
                          (above(zero, advantage) & above(rule.clip_low, log_ratio));
    return {bits_of(inside & ~clipped), bits_of(~(inside | outside))};
}

#if SPEAR_WIDTH == 8
// Lanes of the bits of every byte, in order; what follows them is not read.
struct BitLanes {
    uint8_t lanes[256][8];
    constexpr BitLanes() : lanes() {
        for (unsigned bits = 0; bits < 256; ++bits) {
            int count = 0;
            for (int lane = 0; lane < 8; ++lane) {
                if ((bits >> lane) & 1u) lanes[bits][count++] = static_cast<uint8_t>(lane);
            }
        }
    }
};

constexpr BitLanes kBitLanes;
#endif

// Appends position + lane of every bit to places[count...], without a branch that depends on them: it may write kWidth
// places, which is no more than there is room for.
SPEAR_INLINE int64_t append(unsigned bits, int64_t position, int32_t* places, int64_t count) {
#if SPEAR_WIDTH == 16
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i all = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(position)));
    const __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), all);
    __builtin_memcpy(places + count, &packed, sizeof(packed));
#elif SPEAR_WIDTH == 8
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitLanes.lanes[bits]));
    const __m256i packed = _mm256_add_epi32(_mm256_cvtepu8_epi32(lanes), _mm256_set1_epi32(static_cast<int>(position)));
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

// Float decides about nearly all tokens, double about the rest: the result is that of double.
static void cov_block(const CovInputs& columns, int64_t start, int64_t stop, const CovRule& rule, CovBlock& block) {
    const CovInputs inputs = columns;  // of its own: no store can change where the columns are
    const CovLanes filter(rule.filter);
    int32_t* places = block.tokens;
    int64_t candidates = 0, num_near = 0, i = start;
    bool candidate, near;
    for (; i + kWidth <= stop; i += kWidth) {
        CovBits bits = filtered(inputs, i, filter);
        for (unsigned open = bits.open; open; open &= open - 1) {
            const int lane = __builtin_ctz(open);
            judge_one(inputs, i + lane, rule, candidate, near);
            bits.sure |= (candidate ? 1u : 0u) << lane;
            num_near += near;
        }
        candidates = append(bits.sure, i, places, candidates);
    }
    for (; i < stop; ++i) {
        judge_one(inputs, i, rule, candidate, near);
        places[candidates] = static_cast<int32_t>(i);
        candidates += candidate;
        num_near += near;
    }
    block.candidates = candidates;
    block.near = num_near;
}

// Sum in double of at most kSumBlock values, over kSumLanes interleaved sums that are then folded in halves.
static double block_sum(const float* values, int64_t count) {
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

static CovKernels cov_kernels() { return {cov_block, block_sum}; }
