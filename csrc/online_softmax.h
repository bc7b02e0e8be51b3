// The statistics of a softmax over part of a row, and their exact merge (online softmax, Milakov and Gimelshein 2018,
// extended by the first moment for the entropy). Shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace spear {

// Stands for "no finite logit seen": lower than every useful logit, and differences to it stay free of inf - inf.
constexpr float kLowest = -3.402823466e38f;

template <typename Sum>
struct SoftmaxState {
    float max = kLowest;  // largest logit
    Sum sum = 0;          // sum of exp((x - max) / T)
    Sum weighted = 0;     // sum of exp((x - max) / T) * (x - max)

    // Moves the reference point to a larger maximum; decay(d) = exp(d / T).
    template <typename Decay>
    SPEAR_HOST_DEVICE void move_to(float larger, const Decay& decay) {
        if (!(larger > max)) return;
        const Sum shift = static_cast<Sum>(max) - static_cast<Sum>(larger);
        const Sum scale = sum > 0 ? decay(shift) : 0;
        // The shift may be infinite where the scale is 0.
        weighted = scale > 0 ? scale * (weighted + sum * shift) : 0;
        sum *= scale;
        max = larger;
    }
};

#if !defined(__CUDACC__)
// As the CPU kernels keep it, row by row.
struct OnlineSoftmax : SoftmaxState<double> {
    void raise_max(float larger, double inv_temperature) {
        move_to(larger, [inv_temperature](double shift) { return std::exp(shift * inv_temperature); });
    }
};
#endif

}  // namespace spear
