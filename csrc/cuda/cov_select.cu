// Selection by covariance on CUDA: the candidates, and the first k of them by histograms of the digits of 64-bit words
// (key_select.h). All counting is by integers, so that the order of the threads has no effect, and covariances are in
// double as on the CPU: the same tokens are chosen. Nothing waits: what is counted stays on the device.
#include "cov_select.h"

#include "../cov_math.h"
#include "../key_select.h"
#include "block_reduce.h"
#include "cov_rows.h"

namespace spear {
namespace {

constexpr int kPerThread = 8;
constexpr int kTile = kBlockThreads * kPerThread;
constexpr int kMaxBlocks = 264;  // of the kernels that loop over the candidates
constexpr int kBinsPerThread = kDigits / kBlockThreads;
constexpr double kNearWidth = 1e-5;

// What the first k are ordered by; each decides where those before it are equal.
enum Order { kByCovariance, kByKey, kByRowKey, kByPosition, kByAdvantage, kByLogProb, kByPlace };

struct CovTask {
    const float* log_probs;
    const float* old_log_probs;
    const float* advantages;
    const int64_t* keys;
    CovRows rows;
    double ratio;
    double clip_low;  // bounds of the log-ratio
    double clip_high;
    Order order;
    double* numbers;
    const int32_t* places;  // where a token's result belongs; null: at its own place
    uint8_t* chosen;

    __device__ double covariance(int64_t token) const {
        return (static_cast<double>(advantages[token]) - numbers[kMeanAdvantage]) *
               (static_cast<double>(log_probs[token]) - numbers[kMeanLogProb]);
    }
    __device__ bool is_clipped(int64_t token) const {
        // The difference is taken in float, as in the loss.
        const double log_ratio = log_probs[token] - old_log_probs[token];
        const float advantage = advantages[token];
        return (advantage > 0 && log_ratio > clip_high) || (advantage < 0 && log_ratio < clip_low);
    }
    __device__ uint64_t word(Order by, int64_t token) const {
        switch (by) {
            case kByCovariance: return ordered_word(-covariance(token));
            case kByKey: return ordered_word(keys[token]);
            case kByRowKey: return ordered_word(keys[rows.start(rows.row_of(token))]);
            case kByPosition: return token - rows.start(rows.row_of(token));
            case kByAdvantage: return ordered_word(static_cast<double>(advantages[token]));
            case kByLogProb: return ordered_word(static_cast<double>(log_probs[token]));
            default: return token;
        }
    }
    __device__ uint32_t wanted() const {
        const int64_t tokens = rows.tokens();
        if (!(ratio > 0) || tokens == 0) return 0;
        const int64_t share = ratio < 1 ? floor_share(ratio, tokens) : tokens;
        return static_cast<uint32_t>(share < 1 ? 1 : share);
    }
    __device__ void choose(int64_t token) const { chosen[places ? places[token] : token] = 1; }
};

// Between the kernels; all 0 at first. `left`: candidates that share the digits of the k-th found so far.
struct CovState {
    uint32_t histograms[2][kDigits];
    uint32_t candidates, near, left, padding;
    WordSearch search;
};

struct CovLists {
    CovState* state;
    int32_t* candidates;
    int32_t* left;
    uint8_t* open;  // for each of `left`: not decided yet
};

// The next step of a search, from a histogram in shared or global memory; the same in every thread of the block.
__device__ WordSearch narrowed_by_block(const WordSearch& search, const uint32_t* histogram) {
    __shared__ WordSearch result;
    const int first = threadIdx.x * kBinsPerThread;
    uint32_t inside = 0, total;
    for (int i = 0; i < kBinsPerThread; ++i) inside += histogram[first + i];
    uint32_t before = sum_before(inside, total);
    if (before < search.rank && search.rank <= before + inside) {
        int bin = first;
        while (before + histogram[bin] < search.rank) before += histogram[bin++];
        result = narrowed_to(search, bin, before, histogram[bin]);
    }
    __syncthreads();
    const WordSearch next = result;
    __syncthreads();  // the next call overwrites it
    return next;
}

// The search after its first digit; done at once where every candidate or none is taken.
__device__ WordSearch first_step(const CovTask& task, const CovState& state) {
    const uint32_t k = task.wanted();
    WordSearch search = word_search(k);
    if (k > 0 && state.candidates > k) return narrowed_by_block(search, state.histograms[0]);
    search.done = true;
    search.last = ~uint64_t{0};
    return search;
}

__device__ void clear(uint32_t* histogram) {
    for (int i = threadIdx.x; i < kDigits; i += kBlockThreads) histogram[i] = 0;
    __syncthreads();
}

__device__ void add_histogram(const uint32_t* own, uint32_t* target) {
    __syncthreads();
    for (int i = threadIdx.x; i < kDigits; i += kBlockThreads) {
        if (own[i]) atomicAdd(&target[i], own[i]);
    }
}

// Lists the candidates, in any order, and counts the first digits of their words. Nothing is chosen yet.
__global__ void __launch_bounds__(kBlockThreads) find_candidates(const CovTask task, const CovLists lists) {
    __shared__ uint32_t histogram[kDigits];
    __shared__ uint32_t base;
    clear(histogram);
    const double lb = task.numbers[kLowerBound], ub = task.numbers[kUpperBound];
    const int64_t first = int64_t{blockIdx.x} * kTile + threadIdx.x, tokens = task.rows.tokens();
    uint32_t candidates = 0, count = 0, near = 0;
    for (int i = 0; i < kPerThread; ++i) {
        const int64_t token = first + i * kBlockThreads;
        if (token < task.rows.capacity) task.chosen[token] = 0;
        if (token >= tokens) continue;
        const double covariance = task.covariance(token);
        near += (covariance >= lb - kNearWidth && covariance <= lb + kNearWidth) ||
                (covariance >= ub - kNearWidth && covariance <= ub + kNearWidth);
        if (!(covariance > lb && covariance < ub) || task.is_clipped(token)) continue;
        candidates |= 1u << i;
        ++count;
        const uint64_t word = task.order == kByCovariance ? ordered_word(-covariance) : task.word(kByKey, token);
        atomicAdd(&histogram[digit(word_search(1), word)], 1u);
    }
    uint32_t totals;
    const uint32_t before = sum_before(count | near << 16, totals) & 0xffff;
    if (threadIdx.x == 0) {
        base = atomicAdd(&lists.state->candidates, totals & 0xffff);
        atomicAdd(&lists.state->near, totals >> 16);
    }
    add_histogram(histogram, lists.state->histograms[0]);
    int32_t* out = lists.candidates + base + before;
    for (int i = 0; i < kPerThread; ++i) {
        if (candidates >> i & 1) *out++ = static_cast<int32_t>(first + i * kBlockThreads);
    }
}

// Counts the second digits of those whose first digit is that of the k-th.
__global__ void __launch_bounds__(kBlockThreads) count_second_digits(const CovTask task, const CovLists lists) {
    __shared__ uint32_t histogram[kDigits];
    const WordSearch search = first_step(task, *lists.state);
    if (search.done) return;
    clear(histogram);
    const int64_t count = lists.state->candidates, stride = int64_t{gridDim.x} * kBlockThreads;
    for (int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x; i < count; i += stride) {
        const uint64_t word = task.word(task.order, lists.candidates[i]);
        if (is_left(search, word)) atomicAdd(&histogram[digit(search, word)], 1u);
    }
    add_histogram(histogram, lists.state->histograms[1]);
}

// Takes the candidates that two digits decide, and lists those that they do not.
__global__ void __launch_bounds__(kBlockThreads) take_decided(const CovTask task, const CovLists lists) {
    CovState& state = *lists.state;
    WordSearch search = first_step(task, state);
    if (!search.done) search = narrowed_by_block(search, state.histograms[1]);
    if (blockIdx.x == 0 && threadIdx.x == 0) state.search = search;
    if (task.wanted() == 0) return;
    const int64_t count = state.candidates, stride = int64_t{gridDim.x} * kBlockThreads;
    for (int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x; i < count; i += stride) {
        const int32_t token = lists.candidates[i];
        const uint64_t word = task.word(task.order, token);
        if (search.done ? word <= search.last : (word & search.fixed) < search.last) {
            task.choose(token);
        } else if (!search.done && is_left(search, word)) {
            const uint32_t place = atomicAdd(&state.left, 1u);
            lists.left[place] = token;
            lists.open[place] = 1;
        }
    }
}

// Takes those whose word the finished search decides; the ones that equal the k-th stay open if there are too many.
__device__ void take_up_to(const CovTask& task, const CovLists& lists, Order by, const WordSearch& search) {
    for (uint32_t i = threadIdx.x; i < lists.state->left; i += kBlockThreads) {
        if (!lists.open[i]) continue;
        const uint64_t word = task.word(by, lists.left[i]);
        if (search.tied && word == search.last) continue;
        lists.open[i] = 0;
        if (word <= search.last) task.choose(lists.left[i]);
    }
    __syncthreads();
}

// One block decides about those that are left, which are few unless most are equal: by the further digits, then by
// whatever comes next in the order.
__global__ void __launch_bounds__(kBlockThreads) decide_rest(const CovTask task, const CovLists lists) {
    __shared__ uint32_t histogram[kDigits];
    const CovState& state = *lists.state;
    WordSearch search = state.search;
    for (int by = task.order; state.left > 0; ++by) {
        const Order order = static_cast<Order>(by);
        while (!search.done) {
            clear(histogram);
            for (uint32_t i = threadIdx.x; i < state.left; i += kBlockThreads) {
                const uint64_t word = task.word(order, lists.left[i]);
                if (lists.open[i] && is_left(search, word)) atomicAdd(&histogram[digit(search, word)], 1u);
            }
            __syncthreads();
            search = narrowed_by_block(search, histogram);
        }
        take_up_to(task, lists, order, search);
        if (!search.tied) break;
        search = word_search(search.rank);
    }
    if (threadIdx.x > 0) return;
    const uint32_t k = task.wanted();
    task.numbers[kCandidates] = state.candidates;
    task.numbers[kChosen] = state.candidates < k ? state.candidates : k;
    task.numbers[kNear] = state.near;
}

// Where the parts of the scratch lie, in int32.
constexpr int64_t kStateWords = (sizeof(CovState) + 15) / 16 * 4;

CovLists lists_in(void* scratch, int64_t tokens) {
    int32_t* words = static_cast<int32_t*>(scratch);
    int32_t* candidates = words + kStateWords;
    return {reinterpret_cast<CovState*>(words), candidates, candidates + tokens,
            reinterpret_cast<uint8_t*>(candidates + 2 * tokens)};
}

cudaError_t launch(const CovTask& task, const CovLists& lists, int64_t tokens, cudaStream_t stream) {
    const int64_t tiles = tokens < 1 ? 1 : (tokens + kTile - 1) / kTile;
    const unsigned blocks = static_cast<unsigned>(tiles < kMaxBlocks ? tiles : kMaxBlocks);
    find_candidates<<<static_cast<unsigned>(tiles), kBlockThreads, 0, stream>>>(task, lists);
    if (const cudaError_t error = cudaGetLastError()) return error;
    count_second_digits<<<blocks, kBlockThreads, 0, stream>>>(task, lists);
    if (const cudaError_t error = cudaGetLastError()) return error;
    take_decided<<<blocks, kBlockThreads, 0, stream>>>(task, lists);
    if (const cudaError_t error = cudaGetLastError()) return error;
    decide_rest<<<1, kBlockThreads, 0, stream>>>(task, lists);
    return cudaGetLastError();
}

}  // namespace
}  // namespace spear

int64_t spear_cov_select_scratch(int64_t tokens) { return spear::kStateWords + 2 * tokens + (tokens + 3) / 4; }

int spear_cov_select(int device, void* stream, const void* log_probs, const void* old_log_probs,
                     const void* advantages, const void* keys, const void* starts, int64_t rows, int64_t tokens,
                     const void* places, double ratio, double clip_low, double clip_high, int by_covariance,
                     void* numbers, void* scratch, void* chosen) {
    using namespace spear;
    if (!fits(rows, tokens)) return cudaErrorInvalidValue;
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    const CovTask task = {static_cast<const float*>(log_probs),
                          static_cast<const float*>(old_log_probs),
                          static_cast<const float*>(advantages),
                          static_cast<const int64_t*>(keys),
                          {static_cast<const int64_t*>(starts), static_cast<int>(rows), tokens},
                          ratio,
                          clip_low,
                          clip_high,
                          by_covariance ? kByCovariance : kByKey,
                          static_cast<double*>(numbers),
                          static_cast<const int32_t*>(places),
                          static_cast<uint8_t*>(chosen)};
    const CovLists lists = lists_in(scratch, tokens);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (const cudaError_t error = cudaMemsetAsync(lists.state, 0, sizeof(CovState), queue)) return error;
    return launch(task, lists, tokens, queue);
}
