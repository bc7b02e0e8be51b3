// The temperature, and what the gradient of one row needs, in the forms that the CPU and the CUDA kernels use.
#pragma once

#include <cmath>

#include "host_device.h"

namespace spear {

// The temperature in the forms that the kernels use.
struct Scale {
    SPEAR_HOST_DEVICE explicit Scale(double temperature)
        : inv_temperature(1.0 / temperature),
          log2_factor(static_cast<float>(inv_temperature * 1.4426950408889634)),
          floor(static_cast<float>(-125.0 / (inv_temperature * 1.4426950408889634))) {}

    double inv_temperature;
    float log2_factor;  // exp(d / T) = 2^(d * log2_factor)
    float floor;        // differences below it are clamped: their exponential is at most 2^-125
};

// d loss / dx_j = exp((x_j - max) / T) * (factor + slope * (x_j - max)) for every column but the target's.
struct RowGradient {
    float max;
    float factor;
    float slope;
};

// The numbers that one row of the gradient is made of, from g = (max, sum exp, entropy, gradient of the log-prob,
// gradient of the entropy), where max and sum are those of the whole vocabulary. With p = exp((x - max) / T) / sum:
//   d log p_t / dx_j = (1[j = t] - p_j) / T,   d H / dx_j = -p_j (log p_j + H) / T.
struct GradientTerms {
    SPEAR_HOST_DEVICE GradientTerms(const float* g, double inv_temperature)
        : max(g[0]), inv_temperature(inv_temperature), grad_logprob(g[3]), is_zero(g[3] == 0 && g[4] == 0) {
        const double sum = g[1], entropy = g[2], grad_entropy = g[4];
        factor = -inv_temperature / sum * (grad_logprob + grad_entropy * (entropy - log(sum)));
        slope = -inv_temperature / sum * inv_temperature * grad_entropy;
    }

    // A row without a usable softmax: every column of its gradient is NaN.
    SPEAR_HOST_DEVICE bool is_nan() const { return factor != factor || slope != slope; }

    SPEAR_HOST_DEVICE RowGradient narrowed() const {
        return {max, static_cast<float>(factor), static_cast<float>(slope)};
    }

    // Gradient of the target's column, whose logit is x.
    SPEAR_HOST_DEVICE float at_target(float x) const {
        const double d = static_cast<double>(x) - max;
        const double e = exp(d * inv_temperature);
        return static_cast<float>((e > 0 ? e * (factor + slope * d) : 0) + inv_temperature * grad_logprob);
    }

    float max;
    double inv_temperature;
    double grad_logprob;
    double factor;
    double slope;
    bool is_zero;  // no gradient arrives: the row is exactly 0, whatever its logits
};

}  // namespace spear
