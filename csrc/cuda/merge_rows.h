// C interface of the merge of row statistics on CUDA; see csrc/softmax_merge.h. Everything is fp32.
#pragma once

#include "library.h"

// parts[shards][rows][4] -> log_probs[rows], entropy[rows] (or null), saved[rows][3].
SPEAR_EXPORT int spear_merge_rows(int device, void* stream, const void* parts, int64_t shards, int64_t rows,
                                  double temperature, void* log_probs, void* entropy, void* saved);

// out[rows][5] = saved[rows][3] and the gradients of log-probs and entropy, each of its own stride; null: zeros.
SPEAR_EXPORT int spear_join_rows(int device, void* stream, const void* saved, const void* log_probs,
                                 int64_t log_probs_stride, const void* entropy, int64_t entropy_stride, int64_t rows,
                                 void* out);
