// The merge of row statistics and the joining of row gradients on CUDA, one thread per row; see csrc/softmax_merge.h.
#include "merge_rows.h"

#include <cuda_runtime.h>

#include "../softmax_merge.h"

namespace spear {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;

__global__ void __launch_bounds__(kThreads) merge_each(const MergeTask task) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row < task.rows) merge_row(task, row);
}

__global__ void __launch_bounds__(kThreads)
    join_each(const float* saved, RowValues log_probs, RowValues entropy, int64_t rows, float* out) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row < rows) join_row(saved, log_probs, entropy, row, out);
}

unsigned blocks_for(int64_t rows) { return static_cast<unsigned>((rows + kThreads - 1) / kThreads); }

}  // namespace
}  // namespace spear

int spear_merge_rows(int device, void* stream, const void* parts, int64_t shards, int64_t rows, double temperature,
                     void* log_probs, void* entropy, void* saved) {
    using namespace spear;
    if (shards < 1 || rows < 0 || rows > kMaxRows) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    const MergeTask task = {static_cast<const float*>(parts), shards, rows, temperature,
                            static_cast<float*>(log_probs),   static_cast<float*>(entropy),
                            static_cast<float*>(saved)};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    merge_each<<<blocks_for(rows), kThreads, 0, queue>>>(task);
    return cudaGetLastError();
}

int spear_join_rows(int device, void* stream, const void* saved, const void* log_probs, int64_t log_probs_stride,
                    const void* entropy, int64_t entropy_stride, int64_t rows, void* out) {
    using namespace spear;
    if (rows < 0 || rows > kMaxRows) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    const RowValues first = {static_cast<const float*>(log_probs), log_probs_stride};
    const RowValues second = {static_cast<const float*>(entropy), entropy_stride};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    join_each<<<blocks_for(rows), kThreads, 0, queue>>>(static_cast<const float*>(saved), first, second, rows,
                                                        static_cast<float*>(out));
    return cudaGetLastError();
}
