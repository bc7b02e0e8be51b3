// Block kernels of policy_loss for one instruction set; see foreach_isa.h for the rules of such a file.
#include "policy_terms.h"

constexpr int64_t kChunk = 512;  // tokens at a time

struct PolicyLanes {
    DoubleSums loss, log_ratio, ratio;
    Int clipped = {};
    Int dual_clipped = {};
    Float max_ratio = {};  // every ratio is positive
};

// pi / pi_old of kWidth tokens, and its logarithm; 0 beside the mask.
struct Ratios {
    Float log_ratio;
    Float ratio;
};

template <bool kMasked>
SPEAR_INLINE Ratios ratios_of(const PolicyInputs& inputs, int64_t i) {
    const Float log_ratio = limited_log_ratio(load(inputs.log_probs + i), load(inputs.old_log_probs + i));
    const Ratios ratios = {log_ratio, exponential(log_ratio)};
    if (!kMasked) return ratios;
    // What stands beside the mask may be anything, so it is replaced, not multiplied by 0.
    const Int used = load_mask(inputs.mask + i);
    const Float zero = {};
    return {used ? ratios.log_ratio : zero, used ? ratios.ratio : zero};
}

// kWidth tokens from position i, but for the sums of their ratios.
template <int kMode, bool kMasked>
SPEAR_INLINE void add_tokens(PolicyLanes& lanes, const PolicyInputs& inputs, int64_t i, const Ratios& ratios,
                             const PolicyRule<Float>& rule) {
    constexpr bool kChooses = kMode == kClipCov || kMode == kKlCov;
    const Float log_prob = load(inputs.log_probs + i), old_log_prob = load(inputs.old_log_probs + i);
    const Float weight = load(inputs.weights + i);
    const Int selected = kChooses ? load_mask(inputs.selected + i) : Int{};
    const PolicyTerms<Float, Int> terms = policy_terms<kMode, Float, Int>(
        rule, log_prob, old_log_prob, load(inputs.advantages + i), ratios.log_ratio, ratios.ratio, selected);
    Float loss = -(weight * terms.surrogate);
    Float gradient = -(weight * terms.slope);
    Int clipped = terms.clipped, dual_clipped = terms.dual_clipped;
    if (kMasked) {
        const Int used = load_mask(inputs.mask + i);
        const Float zero = {};
        loss = used ? loss : zero;
        gradient = used ? gradient : zero;
        clipped &= used;
        dual_clipped &= used;
    }
    store(inputs.gradient + i, gradient);
    lanes.loss.add(loss);
    lanes.clipped -= clipped;
    lanes.dual_clipped -= dual_clipped;
    lanes.max_ratio = larger(ratios.ratio, lanes.max_ratio);
}

// The last, fewer than kWidth, tokens of a block, from position i; the lanes after them are masked.
template <int kMode>
SPEAR_INLINE void add_tail(PolicyLanes& lanes, const PolicyInputs& inputs, int64_t i, int64_t count,
                           const PolicyRule<Float>& rule) {
    float columns[4][kWidth] = {};
    float gradient[kWidth];
    uint8_t selected[kWidth] = {}, mask[kWidth] = {};
    for (int64_t k = 0; k < count; ++k) {
        columns[0][k] = inputs.log_probs[i + k];
        columns[1][k] = inputs.old_log_probs[i + k];
        columns[2][k] = inputs.advantages[i + k];
        columns[3][k] = inputs.weights[i + k];
        selected[k] = inputs.selected ? inputs.selected[i + k] : 0;
        mask[k] = inputs.mask ? inputs.mask[i + k] : 1;
    }
    const PolicyInputs tail = {columns[0], columns[1], columns[2], columns[3], selected, mask, gradient};
    const Ratios ratios = ratios_of<true>(tail, 0);
    add_tokens<kMode, true>(lanes, tail, 0, ratios, rule);
    lanes.log_ratio.add(ratios.log_ratio);
    lanes.ratio.add(ratios.ratio);
    for (int64_t k = 0; k < count; ++k) inputs.gradient[i + k] = gradient[k];
}

template <int kMode, bool kMasked>
PolicyTotals policy_block(const PolicyInputs& columns, int64_t start, int64_t stop, const PolicySettings& settings) {
    const PolicyInputs inputs = columns;  // of its own: no store can change where the columns are
    const PolicyRule<Float> rule = {broadcast(settings.low), broadcast(settings.high), broadcast(settings.dual),
                                    broadcast(settings.coef)};
    PolicyLanes lanes;
    // An exponential is one long chain of operations, and a processor overlaps the chains of those tokens that its
    // window holds: many where nothing else is done to them, few where all is.
    float log_ratios[kChunk], ratios[kChunk];
    int64_t i = start;
    for (int64_t size = kChunk; size == kChunk; i += size) {
        size = stop - i < kChunk ? (stop - i) / kWidth * kWidth : kChunk;
        for (int64_t k = 0; k < size; k += kWidth) {
            const Ratios made = ratios_of<kMasked>(inputs, i + k);
            store(log_ratios + k, made.log_ratio);
            store(ratios + k, made.ratio);
        }
        for (int64_t k = 0; k < size; k += kWidth) {
            add_tokens<kMode, kMasked>(lanes, inputs, i + k, {load(log_ratios + k), load(ratios + k)}, rule);
        }
        for (int64_t k = 0; k < size; k += kWidth) {
            lanes.log_ratio.add(log_ratios + k);
            lanes.ratio.add(ratios + k);
        }
    }
    if (i < stop) add_tail<kMode>(lanes, inputs, i, stop - i, rule);
    PolicyTotals totals = {lanes.loss.total(), 0, 0, lanes.log_ratio.total(), lanes.ratio.total(), 0};
    for (int64_t lane = 0; lane < kWidth; ++lane) {
        totals.clipped += lanes.clipped[lane];
        totals.dual_clipped += lanes.dual_clipped[lane];
        totals.max_ratio = lanes.max_ratio[lane] > totals.max_ratio ? lanes.max_ratio[lane] : totals.max_ratio;
    }
    return totals;
}

template <bool kMasked>
PolicyBlock policy_block_of(int mode) {
    switch (mode) {
        case kVanilla: return policy_block<kVanilla, kMasked>;
        case kPolicyGradient: return policy_block<kPolicyGradient, kMasked>;
        case kClipCov: return policy_block<kClipCov, kMasked>;
        default: return policy_block<kKlCov, kMasked>;
    }
}

static PolicyBlock policy_block_for(int mode, bool masked) {
    return masked ? policy_block_of<true>(mode) : policy_block_of<false>(mode);
}
