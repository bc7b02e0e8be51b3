// The policy loss of one token, for the host and for CUDA.
#pragma once

#include <math.h>
#include <stdint.h>

#include "host_device.h"

#define SPEAR_ALWAYS_INLINE __attribute__((always_inline))

namespace spear {

// Modes of the policy loss: PPO with dual clip, plain policy gradient, Clip-Cov, KL-Cov.
constexpr int kVanilla = 0;
constexpr int kPolicyGradient = 1;
constexpr int kClipCov = 2;
constexpr int kKlCov = 3;

// Columns of a policy loss, and where its gradient goes.
struct PolicyInputs {
    const float* log_probs;
    const float* old_log_probs;
    const float* advantages;
    const float* weights;
    const uint8_t* selected;  // null in the modes that choose no tokens
    const uint8_t* mask;      // null: every token takes part
    float* gradient;
};

#include "policy_terms.h"

// One token of the loss -sum weight * surrogate.
struct PolicyToken {
    float loss;      // -weight * surrogate
    float gradient;  // of that, by the log-prob
    float log_ratio;
    float ratio;
    bool clipped;
    bool dual_clipped;
};

template <int kMode>
SPEAR_HOST_DEVICE inline PolicyToken policy_token(const PolicyRule<float>& rule, float log_prob, float old_log_prob,
                                           float advantage, float weight, bool selected) {
    const float log_ratio = limited_log_ratio(log_prob, old_log_prob);
    const float ratio = expf(log_ratio);
    const PolicyTerms<float, bool> terms =
        policy_terms<kMode, float, bool>(rule, log_prob, old_log_prob, advantage, log_ratio, ratio, selected);
    return {-(weight * terms.surrogate), -(weight * terms.slope), log_ratio, ratio, terms.clipped, terms.dual_clipped};
}

}  // namespace spear
