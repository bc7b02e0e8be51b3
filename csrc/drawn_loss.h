// Clip-Cov and KL-Cov within one set of tokens: selection and policy loss in one parallel region, on columns that the
// selection leaves in the caches.
#pragma once

#include <cstdint>

#include "cov_select.h"
#include "isa.h"
#include "policy_loss.h"

namespace spear {

constexpr int kDrawnSums = 9;  // those of the policy loss, then candidates, tokens near a bound, selected tokens

struct DrawnColumns {
    const float* log_probs;
    const float* old_log_probs;
    const float* advantages;
    const float* weights;
    const int64_t* keys;
    const uint8_t* mask;  // null: every token takes part
    int64_t tokens;
};

struct DrawnSettings {
    int mode;  // kClipCov or kKlCov
    PolicySettings policy;
    double ratio;  // of the tokens that are selected; 0 selects none
    CovLimits limits;
};

struct DrawnResults {
    float* gradient;    // [tokens]
    uint8_t* selected;  // [tokens]
    float* loss;        // [1]
    double* sums;       // [kDrawnSums]
};

// Returns whether the selection is decided: not where tokens tie at its border. Throws std::invalid_argument.
bool drawn_loss(const DrawnColumns& columns, const DrawnSettings& settings, const DrawnResults& results, int threads,
                Isa isa);

// With the widest instruction set. Another module calls it by address: it must have been compiled with these structs.
bool widest_drawn_loss(const DrawnColumns& columns, const DrawnSettings& settings, const DrawnResults& results,
                       int threads);

using DrawnLoss = decltype(&widest_drawn_loss);

// What setup.py makes of the headers: modules of different values must not meet.
#ifndef SPEAR_HEADERS
#define SPEAR_HEADERS ""
#endif

}  // namespace spear
