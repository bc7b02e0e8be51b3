// From the statistics of a row's softmax on every shard of the vocabulary to its log-prob and entropy, and from their
// gradients to what the backward pass takes; for the CPU and for CUDA. In double, as softmax_stats.py has it.
#pragma once

#include <math.h>
#include <stdint.h>

#include "host_device.h"

namespace spear {

// Statistics [shards][rows][4] as token_logprobs writes them, and the results; entropy may be null.
struct MergeTask {
    const float* parts;
    int64_t shards;
    int64_t rows;
    double temperature;
    float* log_probs;  // [rows]
    float* entropy;    // [rows]
    float* saved;      // [rows][3]: largest logit, sum, entropy (0 without it)

    SPEAR_HOST_DEVICE const float* part(int64_t shard, int64_t row) const { return parts + 4 * (shard * rows + row); }
};

// The larger one, or NaN if either is.
SPEAR_HOST_DEVICE inline double larger_or_nan(double a, double b) { return a >= b || a != a ? a : b; }

SPEAR_HOST_DEVICE inline void merge_row(const MergeTask& task, int64_t row) {
    double largest = task.part(0, row)[0], target = task.part(0, row)[3];
    for (int64_t shard = 1; shard < task.shards; ++shard) {
        largest = larger_or_nan(largest, task.part(shard, row)[0]);
        target = larger_or_nan(target, task.part(shard, row)[3]);
    }
    double total = 0, moment = 0;
    for (int64_t shard = 0; shard < task.shards; ++shard) {
        const float* part = task.part(shard, row);
        const double shift = part[0] - largest;
        const double scale = shift == 0 ? 1.0 : exp(shift / task.temperature);
        total += scale * part[1];
        moment += scale * (part[2] + part[1] * shift);
    }
    if (!(total >= 0.5)) total = NAN;  // the largest logit alone contributes 1
    const double log_total = log(total);
    task.log_probs[row] = static_cast<float>((target - largest) / task.temperature - log_total);
    float* saved = task.saved + 3 * row;
    saved[0] = static_cast<float>(largest);
    saved[1] = static_cast<float>(total);
    saved[2] = 0;
    if (task.entropy) {
        saved[2] = static_cast<float>(log_total - moment / (total * task.temperature));
        task.entropy[row] = saved[2];
    }
}

// A gradient [rows] with a stride of its own (0 where one value serves all); null counts as 0.
struct RowValues {
    const float* data;
    int64_t stride;

    SPEAR_HOST_DEVICE float operator[](int64_t row) const { return data ? data[row * stride] : 0.0f; }
};

// `saved` and the gradients of log-prob and entropy side by side, [rows][5].
SPEAR_HOST_DEVICE inline void join_row(const float* saved, RowValues log_probs, RowValues entropy, int64_t row,
                                       float* out) {
    for (int i = 0; i < 3; ++i) out[5 * row + i] = saved[3 * row + i];
    out[5 * row + 3] = log_probs[row];
    out[5 * row + 4] = entropy[row];
}

}  // namespace spear
