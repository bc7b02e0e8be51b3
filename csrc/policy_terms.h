// What one token contributes to the policy loss, for a float or for a vector of floats (comparisons then give masks,
// and ?: chooses by lane). Included by policy_math.h for scalars and once per instruction set by the rows of
// policy_loss.cpp, inside their namespaces: hence no guard, and nothing is included here.
//
// PPO, equation 7 of arXiv 1707.06347: min(r A, clip(r, low, high) A); clip-higher, arXiv 2503.14476; dual clip,
// equation 5 of arXiv 1912.09729: at least c A where A < 0; GPG, arXiv 2504.02546: log p A; Clip-Cov and KL-Cov,
// section 4 of arXiv 2505.22617.

// Bounds of the ratio, dual-clip constant and price of moving, each repeated over the lanes.
template <typename Value>
struct PolicyRule {
    Value low;
    Value high;
    Value dual;
    Value coef;
};

template <typename Value, typename Mask>
struct PolicyTerms {
    Value surrogate;     // to be maximised
    Value slope;         // its derivative by the log-prob
    Mask clipped;        // PPO's clip is active
    Mask dual_clipped;   // the dual clip is active
};

// Difference of the log-probs limited to [-20, 20]; NaN where it is not finite, so that a broken log-prob reaches the
// loss.
template <typename Value>
SPEAR_HOST_DEVICE inline SPEAR_ALWAYS_INLINE Value limited_log_ratio(Value log_prob, Value old_log_prob) {
    const Value limit = Value{} + 20.0f;
    const Value difference = log_prob - old_log_prob;
    const Value capped = difference > limit ? limit : difference;
    return (capped < -limit ? -limit : capped) + (difference - difference);
}

// `ratio` is exp(`log_ratio`), and `log_ratio` is limited_log_ratio of the two log-probs. `selected`: the tokens chosen
// by covariance, in the modes that choose. Where the limit is active there is no slope.
template <int kMode, typename Value, typename Mask>
SPEAR_HOST_DEVICE inline SPEAR_ALWAYS_INLINE PolicyTerms<Value, Mask> policy_terms(
    const PolicyRule<Value>& rule, Value log_prob, Value old_log_prob, Value advantage, Value log_ratio, Value ratio,
    Mask selected) {
    const Value zero = {};
    if (kMode == kPolicyGradient) return {log_prob * advantage, advantage, Mask{}, Mask{}};
    const Value difference = log_prob - old_log_prob;
    const Mask beyond = (difference > zero + 20.0f) | (difference < zero - 20.0f);
    const Value plain = ratio * advantage;
    Value slope = beyond ? zero : plain;
    if (kMode == kKlCov) {
        const Value sign = log_ratio > zero ? zero + 1.0f : (log_ratio < zero ? zero - 1.0f : zero);
        const Value price = rule.coef * (sign * log_ratio);
        const Value rise = beyond ? zero : rule.coef * sign;
        return {selected ? plain - price : plain, selected ? slope - rise : slope, Mask{}, Mask{}};
    }
    const Value raised = ratio < rule.low ? rule.low : ratio;
    const Value bounded = (raised > rule.high ? rule.high : raised) * advantage;
    const Mask clipped = bounded < plain;
    const Value surrogate = clipped ? bounded : plain;
    slope = clipped ? zero : slope;
    if (kMode == kClipCov) {
        const Value none = (difference - difference) * advantage;  // 0, or NaN where a token's value is not finite
        return {selected ? none : surrogate, selected ? zero : slope, clipped, Mask{}};
    }
    const Value floor = rule.dual * advantage;
    const Mask dual_clipped = (advantage < zero) & (surrogate < floor);
    return {dual_clipped ? floor : surrogate, dual_clipped ? zero : slope, clipped, dual_clipped};
}
