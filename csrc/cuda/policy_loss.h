// C interface of the policy loss on CUDA.
#pragma once

#include "library.h"

// Number of doubles of scratch that a loss of so many tokens needs.
SPEAR_EXPORT int64_t spear_policy_loss_scratch(int64_t tokens);

// Writes the gradient fp32 [tokens], the loss fp32 [1], and sums fp64 [6] = (loss, clipped, dual clipped, log-ratio,
// ratio, largest ratio); columns are fp32 [tokens]; selected and mask are bytes [tokens] or null; mode as in
// policy_math.h.
SPEAR_EXPORT int spear_policy_loss(int device, void* stream, const void* log_probs, const void* old_log_probs,
                                   const void* advantages, const void* weights, const void* selected,
                                   const void* mask, int64_t tokens, int mode, double low, double high, double dual,
                                   double coef, void* gradient, void* loss, void* sums, void* scratch);
