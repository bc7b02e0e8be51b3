// Numbers of a selection by covariance that must be the same bit for bit on the host and on CUDA.
#pragma once

#include <math.h>
#include <stdint.h>

#include "host_device.h"

namespace spear {

// The order in which a row is summed: blocks of kSumBlock values, in a block value i to sum i mod kSumLanes, these
// folded in halves, and the blocks in order.
constexpr int kSumLanes = 16;
constexpr int kSumBlock = 4096;

// Correctly rounded sum of doubles (expansions of Shewchuk 1997): the order of what is added has no effect. Made for
// sums of floats, whose bits reach from 2^-149 to 2^159: no two parts of an expansion share or touch bits, so that half
// as many parts hold any sum. There are few as a rule.
class ExactSum {
public:
    SPEAR_HOST_DEVICE void add(double value) {
        int kept = 0;
        for (int i = 0; i < count_; ++i) {
            const double other = parts_[i];
            const bool larger = fabs(value) >= fabs(other);
            const double big = larger ? value : other, small = larger ? other : value;
            const double sum = big + small, error = small - (sum - big);
            if (error != 0) parts_[kept++] = error;
            value = sum;
        }
        parts_[kept] = value;
        count_ = kept + 1;
    }

    SPEAR_HOST_DEVICE double rounded() const {
        double sum = 0, error = 0;
        int i = count_;
        while (i > 0 && error == 0) {  // the parts do not overlap and grow with the index
            const double big = sum, small = parts_[--i];
            sum = big + small;
            error = small - (sum - big);
        }
        // Half-way cases were rounded to even; what lies below them decides.
        if (i > 0 && ((error < 0 && parts_[i - 1] < 0) || (error > 0 && parts_[i - 1] > 0))) {
            const double twice = error * 2, moved = sum + twice;
            if (moved - sum == twice) sum = moved;
        }
        return sum;
    }

private:
    static constexpr int kMaxParts = 160;
    double parts_[kMaxParts];
    int count_ = 0;
};

// The product, never fused with what is done to it next.
SPEAR_HOST_DEVICE inline double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

// floor(round(ratio * count, 9)) as Python has it, for a product below 2^52: the product itself decides, unless it is
// less than half a unit of the ninth decimal below a whole number.
SPEAR_HOST_DEVICE inline int64_t floor_share(double ratio, int64_t count) {
    const double product = rounded_product(ratio, static_cast<double>(count));
    const double above = floor(product) + 1;
    return static_cast<int64_t>(above - product < 5e-10 ? above : above - 1);
}

}  // namespace spear
