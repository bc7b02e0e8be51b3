// token_logprobs on CUDA: one block per row, one read of the logits in the forward pass, one read and one write in the
// backward pass. Reductions have a fixed order, so results are the same bits every time.
#include "token_logprobs.h"

#include <cuda_runtime.h>

#include "../row_threads.h"
#include "block_reduce.h"
#include "float16.h"

namespace spear {
namespace {

// Many small blocks on a processor rather than few large ones: while one is between its rows' loads (at a barrier, or
// one thread at its end), the others keep the memory busy.
constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kBlocksPerProcessor = 4;             // bounds the registers: so many full blocks must fit
constexpr int64_t kMaxColumns = int64_t{1} << 30;  // so that indices within a row fit into an int
constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;

struct Logits {
    const void* data;
    int64_t row_stride;
    int columns;
    const int64_t* targets;
    int64_t first_column;

    template <typename Element>
    __device__ const Element* row(int64_t index) const {
        return static_cast<const Element*>(data) + index * row_stride;
    }
    // Local column of the row's target, or -1 if it is not here.
    __device__ int target(int64_t index) const {
        const int64_t local = targets[index] - first_column;
        return local >= 0 && local < columns ? static_cast<int>(local) : -1;
    }
};

// The union of what all threads of the block hold, in thread 0: every state moves to the common maximum, after which
// merging is adding.
__device__ SoftmaxState<double> merge_block(SoftmaxState<float> state, const Scale& scale) {
    __shared__ float maxima[kMaxWarps];
    __shared__ double sums[kMaxWarps], moments[kMaxWarps];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const float warp_max = max_of_warp(state.max);
    if (lane == 0) maxima[warp] = warp_max;
    __syncthreads();
    SoftmaxState<double> merged;
    for (int i = 0; i < warps; ++i) merged.max = fmaxf(merged.max, maxima[i]);
    state.move_to(merged.max, FastDecay{scale.log2_factor});
    const double sum = sum_of_warp(state.sum), moment = sum_of_warp(state.weighted);
    if (lane == 0) {
        sums[warp] = sum;
        moments[warp] = moment;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 0; i < warps; ++i) {
            merged.sum += sums[i];
            merged.weighted += moments[i];
        }
    }
    return merged;
}

template <typename Element, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor)
    row_stats(const Logits logits, const Scale scale, float* stats) {
    const int64_t row = blockIdx.x;
    const Element* x = logits.row<Element>(row);
    float at_target = -INFINITY;
    if (threadIdx.x == 0) {  // first, so that nobody waits for it at the end
        const int target = logits.target(row);
        if (target >= 0) at_target = to_float(x[target]);
    }
    const SoftmaxState<float> own =
        thread_stats<Element, kEntropy>(x, logits.columns, threadIdx.x, blockDim.x, scale);
    const SoftmaxState<double> merged = merge_block(own, scale);
    if (threadIdx.x == 0) {
        float* out = stats + 4 * row;
        out[0] = merged.max;
        out[1] = static_cast<float>(merged.sum);
        out[2] = kEntropy ? static_cast<float>(merged.weighted) : 0.0f;
        out[3] = at_target;
    }
}

enum class RowKind { zero, nan, usual };

struct GradientTask {
    RowKind kind;
    RowGradient grad;
};

template <typename Element>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor)
    row_gradient(const Logits logits, const Scale scale, const float* row_grads, void* out, int64_t out_stride,
                 int out_columns) {
    __shared__ GradientTask task;
    const int64_t row = blockIdx.x;
    const int thread = threadIdx.x, threads = blockDim.x, columns = logits.columns;
    const Element* x = logits.row<Element>(row);
    Element* y = static_cast<Element*>(out) + row * out_stride;
    int target = -1;
    float at_target = 0;
    if (thread == 0) {
        float own[5];  // all loads are under way before the first is used: the whole block waits for them
        for (int i = 0; i < 5; ++i) own[i] = row_grads[5 * row + i];
        target = logits.target(row);
        const float logit = target >= 0 ? to_float(x[target]) : 0.0f;  // before any thread overwrites it
        const GradientTerms terms(own, scale.inv_temperature);
        task.kind = terms.is_zero ? RowKind::zero : terms.is_nan() ? RowKind::nan : RowKind::usual;
        task.grad = terms.narrowed();
        at_target = terms.at_target(logit);
    }
    __syncthreads();
    thread_fill(y, columns, out_columns, thread, threads, 0.0f);
    if (task.kind != RowKind::usual) {
        thread_fill(y, 0, columns, thread, threads, task.kind == RowKind::zero ? 0.0f : NAN);
        return;
    }
    thread_gradient(x, y, columns, thread, threads, scale, task.grad);
    __syncthreads();  // the thread that wrote the target's column must be done
    if (target >= 0) assign(y[target], at_target);
}

// Enough threads for one round of loads over the row, in whole warps.
template <typename Element>
int block_size(int64_t columns) {
    const int64_t per_thread = kVectorsInFlight * kVectorWidth<Element>;
    const int64_t warps = (columns + per_thread * kWarp - 1) / (per_thread * kWarp);
    return kWarp * static_cast<int>(warps < 1 ? 1 : warps > kMaxWarps ? kMaxWarps : warps);
}

template <typename Element>
void launch_forward(const Logits& logits, const Scale& scale, int64_t rows, bool with_entropy, float* stats,
                    cudaStream_t stream) {
    const auto kernel = with_entropy ? row_stats<Element, true> : row_stats<Element, false>;
    kernel<<<static_cast<unsigned>(rows), block_size<Element>(logits.columns), 0, stream>>>(logits, scale, stats);
}

template <typename Element>
void launch_backward(const Logits& logits, const Scale& scale, int64_t rows, const float* row_grads, void* out,
                     int64_t out_stride, int out_columns, cudaStream_t stream) {
    row_gradient<Element><<<static_cast<unsigned>(rows), block_size<Element>(out_columns), 0, stream>>>(
        logits, scale, row_grads, out, out_stride, out_columns);
}

bool fits(int64_t rows, int64_t columns) {
    return rows >= 0 && rows <= kMaxRows && columns >= 0 && columns <= kMaxColumns;
}

}  // namespace
}  // namespace spear

int spear_token_logprobs_forward(int device, void* stream, const void* logits, int dtype, int64_t rows,
                                 int64_t row_stride, int64_t columns, const void* targets, int64_t first_column,
                                 double temperature, int with_entropy, void* stats) {
    using namespace spear;
    if (!fits(rows, columns) || dtype < 0 || dtype > 2) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    const Logits x = {logits, row_stride, static_cast<int>(columns), static_cast<const int64_t*>(targets),
                      first_column};
    const Scale scale(temperature);
    float* out = static_cast<float*>(stats);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (dtype == 0) launch_forward<float>(x, scale, rows, with_entropy, out, queue);
    if (dtype == 1) launch_forward<Bfloat16>(x, scale, rows, with_entropy, out, queue);
    if (dtype == 2) launch_forward<Float16>(x, scale, rows, with_entropy, out, queue);
    return cudaGetLastError();
}

int spear_token_logprobs_backward(int device, void* stream, const void* logits, int dtype, int64_t rows,
                                  int64_t row_stride, int64_t columns, const void* targets, int64_t first_column,
                                  double temperature, const void* row_grads, void* out, int64_t out_stride,
                                  int64_t out_columns) {
    using namespace spear;
    if (!fits(rows, out_columns) || columns < 0 || columns > out_columns || dtype < 0 || dtype > 2) {
        return cudaErrorInvalidValue;
    }
    if (rows == 0) return cudaSuccess;
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    const Logits x = {logits, row_stride, static_cast<int>(columns), static_cast<const int64_t*>(targets),
                      first_column};
    const Scale scale(temperature);
    const float* grads = static_cast<const float*>(row_grads);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const int wide = static_cast<int>(out_columns);
    if (dtype == 0) launch_backward<float>(x, scale, rows, grads, out, out_stride, wide, queue);
    if (dtype == 1) launch_backward<Bfloat16>(x, scale, rows, grads, out, out_stride, wide, queue);
    if (dtype == 2) launch_backward<Float16>(x, scale, rows, grads, out, out_stride, wide, queue);
    return cudaGetLastError();
}

const char* spear_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
