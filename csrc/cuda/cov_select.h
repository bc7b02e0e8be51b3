// C interface of the selection by covariance on CUDA. A set of tokens is one or several rows back to back: starts[rows
// + 1], int64, or null for one row of `tokens`. numbers[8], double: tokens, mean advantage, mean log-prob, lower and
// upper bound of the covariance, candidates, chosen ones, tokens near a bound.
#pragma once

#include "library.h"

// The tokens on the mask, in their order, as one row: columns[3][tokens] = log-probs, old log-probs, advantages, then
// keys, places (int32, where they were) and starts[2]. counts: int32 of scratch, one per 4096 tokens.
SPEAR_EXPORT int spear_cov_pack(int device, void* stream, const void* log_probs, const void* old_log_probs,
                                const void* advantages, const void* keys, const void* mask, int64_t tokens,
                                void* columns, void* packed_keys, void* places, void* starts, void* counts);

// Number of doubles of scratch for spear_cov_means of rows of at most `longest` tokens.
SPEAR_EXPORT int64_t spear_cov_means_scratch(int64_t rows, int64_t longest);

// Writes the first five numbers; the means are NaN where a sum is not finite, and 0 without tokens.
SPEAR_EXPORT int spear_cov_means(int device, void* stream, const void* log_probs, const void* advantages,
                                 const void* starts, int64_t rows, int64_t tokens, int64_t longest, double lb,
                                 double ub, void* numbers, void* scratch);

// Number of int32 of scratch for spear_cov_select.
SPEAR_EXPORT int64_t spear_cov_select_scratch(int64_t tokens);

// Sets chosen[tokens] (bytes; at places[i] for token i, or at i where places is null) to 1 for the max(floor(ratio *
// tokens), 1) first candidates (none for a ratio of 0) and to 0 elsewhere, and writes the last three numbers. The
// smallest key comes first, or by_covariance the largest covariance; equal ones go by key, key of the row, position in
// it, advantage, log-prob and place. Log-ratios beyond the clip bounds are no candidates.
SPEAR_EXPORT int spear_cov_select(int device, void* stream, const void* log_probs, const void* old_log_probs,
                                  const void* advantages, const void* keys, const void* starts, int64_t rows,
                                  int64_t tokens, const void* places, double ratio, double clip_low,
                                  double clip_high, int by_covariance, void* numbers, void* scratch, void* chosen);
