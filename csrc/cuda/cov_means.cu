// The tokens on a mask as one row, and the mean advantage and log-prob of rows: the sums are those of the CPU, bit for
// bit.
#include <math.h>

#include "../cov_math.h"
#include "block_reduce.h"
#include "cov_rows.h"
#include "cov_select.h"

namespace spear {
namespace {

constexpr int kPerThread = kSumBlock / kBlockThreads;

struct PackTask {
    const float* columns[3];
    const int64_t* keys;
    const uint8_t* mask;
    int64_t tokens;
    float* packed[3];
    int64_t* packed_keys;
    int32_t* places;
    int64_t* starts;
    uint32_t* counts;
};

// Bit i: whether token `first` + i is on the mask.
__device__ uint32_t masked_bits(const PackTask& task, int64_t first) {
    uint32_t bits = 0;
    for (int i = 0; i < kPerThread; ++i) {
        if (first + i < task.tokens && task.mask[first + i]) bits |= 1u << i;
    }
    return bits;
}

__device__ uint32_t count_bits(uint32_t bits) {
    uint32_t count = 0;
    for (; bits; bits &= bits - 1) ++count;
    return count;
}

__global__ void __launch_bounds__(kBlockThreads) count_masked(const PackTask task) {
    const int64_t first = int64_t{blockIdx.x} * kSumBlock + threadIdx.x * kPerThread;
    uint32_t total;
    sum_before(count_bits(masked_bits(task, first)), total);
    if (threadIdx.x == 0) task.counts[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kBlockThreads) pack_masked(const PackTask task, int blocks) {
    uint32_t earlier = 0, before, total;
    for (int block = threadIdx.x; block < static_cast<int>(blockIdx.x); block += kBlockThreads) {
        earlier += task.counts[block];
    }
    sum_before(earlier, before);
    const int64_t first = int64_t{blockIdx.x} * kSumBlock + threadIdx.x * kPerThread;
    const uint32_t bits = masked_bits(task, first);
    int64_t place = before + sum_before(count_bits(bits), total);
    for (int i = 0; i < kPerThread; ++i) {
        if (!(bits >> i & 1)) continue;
        for (int column = 0; column < 3; ++column) task.packed[column][place] = task.columns[column][first + i];
        task.packed_keys[place] = task.keys[first + i];
        task.places[place++] = static_cast<int32_t>(first + i);
    }
    if (threadIdx.x == 0 && static_cast<int>(blockIdx.x) == blocks - 1) {
        task.starts[0] = 0;
        task.starts[1] = int64_t{before} + total;
    }
}

// sums[row][block][2]: of one block of values of a row, advantages and log-probs.
__global__ void __launch_bounds__(kBlockThreads)
    sum_blocks(const float* advantages, const float* log_probs, const CovRows rows, int blocks_per_row, double* sums) {
    __shared__ float values[2][kSumBlock];
    const int row = blockIdx.x / blocks_per_row, block = blockIdx.x % blocks_per_row;
    const int64_t first = rows.start(row) + int64_t{block} * kSumBlock, stop = rows.start(row + 1);
    if (first >= stop) return;
    for (int i = threadIdx.x; i < kSumBlock; i += kBlockThreads) {
        // Zeros at the end change no sum: none is ever -0.
        values[0][i] = first + i < stop ? advantages[first + i] : 0.0f;
        values[1][i] = first + i < stop ? log_probs[first + i] : 0.0f;
    }
    __syncthreads();
    if (threadIdx.x >= 2 * kSumLanes) return;
    const int column = threadIdx.x / kSumLanes, lane = threadIdx.x % kSumLanes;
    double sum = 0;
#pragma unroll 16
    for (int i = lane; i < kSumBlock; i += kSumLanes) sum += values[column][i];
    for (int half = kSumLanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
    if (lane == 0) sums[2 * int64_t{blockIdx.x} + column] = sum;
}

// Means over all rows; thread c adds the rows of column c exactly, once all rows are summed into their first block.
__global__ void __launch_bounds__(kBlockThreads)
    mean_of_rows(const CovRows rows, int blocks_per_row, double lb, double ub, double* sums, double* numbers) {
    __shared__ double totals[2];
    const int column = threadIdx.x % 2;
    const int64_t stride = 2 * int64_t{blocks_per_row};
    for (int row = threadIdx.x / 2; row < rows.count; row += kBlockThreads / 2) {
        const int64_t length = rows.start(row + 1) - rows.start(row);
        double* own = sums + row * stride + column;
        double sum = 0;
#pragma unroll 16  // the loads need not wait for the sums
        for (int64_t block = 0; block * kSumBlock < length; ++block) sum += own[2 * block];
        own[0] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        ExactSum exact;
        double total = 0;
        for (int row = 0; row < rows.count; ++row) {
            const double sum = sums[row * stride + column];
            if (sum - sum != 0) total = NAN;
            else if (total == total) exact.add(sum);
        }
        totals[column] = total == total ? exact.rounded() : total;
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    const double count = static_cast<double>(rows.tokens());
    // A step that the trainer will skip: no covariance, no selection.
    const bool broken = totals[0] != totals[0] || totals[1] != totals[1];
    numbers[kTokens] = count;
    numbers[kMeanAdvantage] = count == 0 ? 0 : broken ? NAN : totals[0] / count;
    numbers[kMeanLogProb] = count == 0 ? 0 : broken ? NAN : totals[1] / count;
    numbers[kLowerBound] = lb;
    numbers[kUpperBound] = ub;
}

int64_t blocks_of(int64_t tokens) { return tokens < 1 ? 1 : (tokens + kSumBlock - 1) / kSumBlock; }

}  // namespace
}  // namespace spear

int spear_cov_pack(int device, void* stream, const void* log_probs, const void* old_log_probs, const void* advantages,
                   const void* keys, const void* mask, int64_t tokens, void* columns, void* packed_keys, void* places,
                   void* starts, void* counts) {
    using namespace spear;
    if (!fits(1, tokens)) return cudaErrorInvalidValue;
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    float* packed = static_cast<float*>(columns);
    const PackTask task = {{static_cast<const float*>(log_probs), static_cast<const float*>(old_log_probs),
                            static_cast<const float*>(advantages)},
                           static_cast<const int64_t*>(keys),
                           static_cast<const uint8_t*>(mask),
                           tokens,
                           {packed, packed + tokens, packed + 2 * tokens},
                           static_cast<int64_t*>(packed_keys),
                           static_cast<int32_t*>(places),
                           static_cast<int64_t*>(starts),
                           static_cast<uint32_t*>(counts)};
    const unsigned blocks = static_cast<unsigned>(blocks_of(tokens));
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    count_masked<<<blocks, kBlockThreads, 0, queue>>>(task);
    if (const cudaError_t error = cudaGetLastError()) return error;
    pack_masked<<<blocks, kBlockThreads, 0, queue>>>(task, static_cast<int>(blocks));
    return cudaGetLastError();
}

int64_t spear_cov_means_scratch(int64_t rows, int64_t longest) { return 2 * rows * spear::blocks_of(longest); }

int spear_cov_means(int device, void* stream, const void* log_probs, const void* advantages, const void* starts,
                    int64_t rows, int64_t tokens, int64_t longest, double lb, double ub, void* numbers,
                    void* scratch) {
    using namespace spear;
    if (!fits(rows, tokens) || longest < 0 || longest > tokens || rows * blocks_of(longest) > kMaxCovTokens) {
        return cudaErrorInvalidValue;
    }
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    const CovRows held = {static_cast<const int64_t*>(starts), static_cast<int>(rows), tokens};
    const int per_row = static_cast<int>(blocks_of(longest));
    double* sums = static_cast<double*>(scratch);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const unsigned blocks = static_cast<unsigned>(rows * per_row);
    sum_blocks<<<blocks, kBlockThreads, 0, queue>>>(static_cast<const float*>(advantages),
                                                    static_cast<const float*>(log_probs), held, per_row, sums);
    if (const cudaError_t error = cudaGetLastError()) return error;
    mean_of_rows<<<1, kBlockThreads, 0, queue>>>(held, per_row, lb, ub, sums, static_cast<double*>(numbers));
    return cudaGetLastError();
}
