// C interface of token_logprobs on CUDA. Strides and columns count elements; dtype: 0 fp32, 1 bf16, 2 fp16.
#pragma once

#include "library.h"

// stats[rows][4] = (max, sum exp, sum exp * (x - max), target logit or -inf where the row does not hold it).
SPEAR_EXPORT int spear_token_logprobs_forward(int device, void* stream, const void* logits, int dtype, int64_t rows,
                                              int64_t row_stride, int64_t columns, const void* targets,
                                              int64_t first_column, double temperature, int with_entropy,
                                              void* stats);

// row_grads[rows][5] as in softmax_scale.h; out may be logits; its columns after the first `columns` become 0.
SPEAR_EXPORT int spear_token_logprobs_backward(int device, void* stream, const void* logits, int dtype, int64_t rows,
                                               int64_t row_stride, int64_t columns, const void* targets,
                                               int64_t first_column, double temperature, const void* row_grads,
                                               void* out, int64_t out_stride, int64_t out_columns);

SPEAR_EXPORT const char* spear_cuda_error_string(int error);
