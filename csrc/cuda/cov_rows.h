// Rows of tokens back to back, and the numbers of a selection by covariance, as the CUDA kernels pass them on.
#pragma once

#include <cstdint>

namespace spear {

// Places in `numbers` of cov_select.h.
enum CovNumber { kTokens, kMeanAdvantage, kMeanLogProb, kLowerBound, kUpperBound, kCandidates, kChosen, kNear };

constexpr int64_t kMaxCovTokens = (int64_t{1} << 31) - 1;

struct CovRows {
    const int64_t* starts;  // [count + 1]; null: one row
    int count;
    int64_t capacity;  // of the columns; at least the number of tokens

    __device__ int64_t start(int row) const { return starts ? starts[row] : row > 0 ? capacity : 0; }
    __device__ int64_t tokens() const { return start(count); }
    // The row that holds a token.
    __device__ int row_of(int64_t place) const {
        int low = 0, high = count;  // start(low) <= place < start(high)
        while (high - low > 1) {
            const int middle = low + (high - low) / 2;
            (start(middle) <= place ? low : high) = middle;
        }
        return low;
    }
};

inline bool fits(int64_t rows, int64_t tokens) {
    return rows >= 1 && rows <= kMaxCovTokens && tokens >= 0 && tokens <= kMaxCovTokens;
}

}  // namespace spear
