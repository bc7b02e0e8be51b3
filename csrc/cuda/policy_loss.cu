// policy_loss on CUDA: every block sums a fixed number of tokens in double, and one block adds those sums in a fixed
// order, so that a result is the same bits every time and on every device.
#include "policy_loss.h"

#include "../policy_math.h"
#include "block_reduce.h"

namespace spear {
namespace {

constexpr int kTokensPerThread = 4;
constexpr int kBlockTokens = kBlockThreads * kTokensPerThread;
constexpr int kSums = 5;  // loss, clipped, dual clipped, log-ratio, ratio; the largest ratio comes after them
constexpr int kTotals = kSums + 1;
constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;

struct PolicyColumns : PolicyInputs {
    int64_t tokens;
};

struct PolicyTotals {
    double sums[kSums] = {};
    float max_ratio = 0;  // every ratio is positive
};

template <int kMode>
__device__ void add_token(const PolicyColumns& columns, int64_t place, const PolicyRule<float>& rule,
                          PolicyTotals& totals) {
    // What stands beside the mask may be anything, so it is not even read.
    if (columns.mask && !columns.mask[place]) {
        columns.gradient[place] = 0;
        return;
    }
    const bool selected = columns.selected && columns.selected[place];
    const PolicyToken token =
        policy_token<kMode>(rule, columns.log_probs[place], columns.old_log_probs[place], columns.advantages[place],
                            columns.weights[place], selected);
    columns.gradient[place] = token.gradient;
    totals.sums[0] += token.loss;
    totals.sums[1] += token.clipped;
    totals.sums[2] += token.dual_clipped;
    totals.sums[3] += token.log_ratio;
    totals.sums[4] += token.ratio;
    totals.max_ratio = fmaxf(totals.max_ratio, token.ratio);
}

// Writes the totals of the whole block to out[kTotals].
__device__ void store_block(const PolicyTotals& own, double* out) {
    __shared__ double warps[kBlockWarps][kTotals];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int i = 0; i < kSums; ++i) {
        const double sum = sum_of_warp(own.sums[i]);
        if (lane == 0) warps[warp][i] = sum;
    }
    const float largest = max_of_warp(own.max_ratio);
    if (lane == 0) warps[warp][kSums] = largest;
    __syncthreads();
    if (threadIdx.x >= kTotals) return;
    double total = 0;
    for (int i = 0; i < kBlockWarps; ++i) {
        const double part = warps[i][threadIdx.x];
        total = threadIdx.x == kSums ? fmax(total, part) : total + part;
    }
    out[threadIdx.x] = total;
}

template <int kMode>
__global__ void __launch_bounds__(kBlockThreads)
    policy_blocks(const PolicyColumns columns, const PolicyRule<float> rule, double* partials) {
    PolicyTotals totals;
    const int64_t first = int64_t{blockIdx.x} * kBlockTokens + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
        const int64_t place = first + i * kBlockThreads;
        if (place < columns.tokens) add_token<kMode>(columns, place, rule, totals);
    }
    store_block(totals, partials + int64_t{blockIdx.x} * kTotals);
}

__global__ void __launch_bounds__(kBlockThreads)
    policy_sums(const double* partials, int64_t blocks, double* sums, float* loss) {
    PolicyTotals totals;
    for (int64_t block = threadIdx.x; block < blocks; block += kBlockThreads) {
        const double* part = partials + block * kTotals;
        for (int i = 0; i < kSums; ++i) totals.sums[i] += part[i];
        totals.max_ratio = fmaxf(totals.max_ratio, static_cast<float>(part[kSums]));
    }
    store_block(totals, sums);
    __syncthreads();
    if (threadIdx.x > 0) return;
    *loss = static_cast<float>(sums[0]);
    // The comparisons above pass over a NaN, the sum does not.
    if (sums[kSums - 1] != sums[kSums - 1]) sums[kSums] = sums[kSums - 1];
}

int64_t num_blocks(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

template <int kMode>
void launch_blocks(const PolicyColumns& columns, const PolicyRule<float>& rule, double* partials,
                   cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(num_blocks(columns.tokens));
    policy_blocks<kMode><<<blocks, kBlockThreads, 0, stream>>>(columns, rule, partials);
}

}  // namespace
}  // namespace spear

int64_t spear_policy_loss_scratch(int64_t tokens) { return spear::num_blocks(tokens) * spear::kTotals; }

int spear_policy_loss(int device, void* stream, const void* log_probs, const void* old_log_probs,
                      const void* advantages, const void* weights, const void* selected, const void* mask,
                      int64_t tokens, int mode, double low, double high, double dual, double coef, void* gradient,
                      void* loss, void* sums, void* scratch) {
    using namespace spear;
    const bool chooses = mode == kClipCov || mode == kKlCov;
    if (tokens < 0 || tokens > kMaxTokens || mode < kVanilla || mode > kKlCov || (chooses && tokens && !selected)) {
        return cudaErrorInvalidValue;
    }
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    const PolicyInputs inputs = {static_cast<const float*>(log_probs),  static_cast<const float*>(old_log_probs),
                                 static_cast<const float*>(advantages), static_cast<const float*>(weights),
                                 static_cast<const uint8_t*>(selected), static_cast<const uint8_t*>(mask),
                                 static_cast<float*>(gradient)};
    const PolicyColumns columns = {inputs, tokens};
    const PolicyRule<float> rule = {static_cast<float>(low), static_cast<float>(high), static_cast<float>(dual),
                                    static_cast<float>(coef)};
    double* partials = static_cast<double*>(scratch);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (tokens > 0) {
        if (mode == kVanilla) launch_blocks<kVanilla>(columns, rule, partials, queue);
        if (mode == kPolicyGradient) launch_blocks<kPolicyGradient>(columns, rule, partials, queue);
        if (mode == kClipCov) launch_blocks<kClipCov>(columns, rule, partials, queue);
        if (mode == kKlCov) launch_blocks<kKlCov>(columns, rule, partials, queue);
        if (const cudaError_t error = cudaGetLastError()) return error;
    }
    policy_sums<<<1, kBlockThreads, 0, queue>>>(partials, num_blocks(tokens), static_cast<double*>(sums),
                                               static_cast<float*>(loss));
    return cudaGetLastError();
}
