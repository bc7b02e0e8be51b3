// The statistics of a softmax over part of a row, and their exact merge (online softmax, Milakov and Gimelshein 2018,
// extended by the first moment for the entropy).
#pragma once

#include <cmath>
#include <cstdint>

namespace spear {

// Stands for "no finite logit seen": lower than every useful logit, and differences to it stay free of inf - inf.
constexpr float kLowest = -3.402823466e38f;

struct OnlineSoftmax {
    float max = kLowest;   // largest logit
    double sum = 0;        // sum of exp((x - max) / T)
    double weighted = 0;   // sum of exp((x - max) / T) * (x - max)

    // Moves the reference point to a larger maximum.
    void raise_max(float larger, double inv_temperature) {
        if (!(larger > max)) return;
        const double shift = static_cast<double>(max) - larger;
        const double scale = sum > 0 ? std::exp(shift * inv_temperature) : 0;
        weighted = scale > 0 ? scale * (weighted + sum * shift) : 0;
        sum *= scale;
        max = larger;
    }
};

}  // namespace spear
