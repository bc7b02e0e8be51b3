// The merge of row statistics and the joining of row gradients on the CPU; see softmax_merge.h.
#include "softmax_merge.h"

#include <pybind11/pybind11.h>

#include <stdexcept>

namespace py = pybind11;

namespace spear {
namespace {

constexpr int64_t kRowsPerThread = 512;  // fewer are not worth another thread

void merge_rows(uintptr_t parts, int64_t shards, int64_t rows, double temperature, uintptr_t log_probs,
                uintptr_t entropy, uintptr_t saved, int threads) {
    if (shards < 1) throw std::invalid_argument("no shard to merge");
    const MergeTask task = {reinterpret_cast<const float*>(parts), shards, rows, temperature,
                            reinterpret_cast<float*>(log_probs),   reinterpret_cast<float*>(entropy),
                            reinterpret_cast<float*>(saved)};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > kRowsPerThread)
    for (int64_t row = 0; row < rows; ++row) merge_row(task, row);
}

void join_rows(uintptr_t saved, uintptr_t log_probs, int64_t log_probs_stride, uintptr_t entropy,
               int64_t entropy_stride, int64_t rows, uintptr_t out) {
    const RowValues first = {reinterpret_cast<const float*>(log_probs), log_probs_stride};
    const RowValues second = {reinterpret_cast<const float*>(entropy), entropy_stride};
    for (int64_t row = 0; row < rows; ++row) {
        join_row(reinterpret_cast<const float*>(saved), first, second, row, reinterpret_cast<float*>(out));
    }
}

}  // namespace
}  // namespace spear

void register_softmax_merge(py::module_& module) {
    using py::arg;
    using Guard = py::call_guard<py::gil_scoped_release>;
    module.def("merge_rows", &spear::merge_rows, Guard(), arg("parts"), arg("shards"), arg("rows"),
               arg("temperature"), arg("log_probs"), arg("entropy"), arg("saved"), arg("threads"),
               "Log-probs [rows], entropies [rows] (address 0: none) and saved [rows, 3] of parts [shards, rows, 4].");
    module.def("join_rows", &spear::join_rows, Guard(), arg("saved"), arg("log_probs"), arg("log_probs_stride"),
               arg("entropy"), arg("entropy_stride"), arg("rows"), arg("out"),
               "Writes saved [rows, 3] and both gradients (address 0: zeros) as [rows, 5].");
}
