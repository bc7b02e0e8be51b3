// What Python calls of the selection by covariance. Tensors arrive by address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "address.h"
#include "cov_math.h"
#include "cov_select.h"
#include "isa.h"

namespace py = pybind11;

namespace spear {
namespace {

using Bounds = std::array<double, 2>;

CovInputs cov_inputs(uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages) {
    return {pointer<const float>(log_probs), pointer<const float>(old_log_probs), pointer<const float>(advantages)};
}

bool worth_threads(int threads, int64_t tokens) { return threads > 1 && tokens > CovSelection::kBlockTokens; }

// Returns (candidates, tokens near a bound, tokens marked): more than k are marked where words equal the k-th.
std::tuple<int64_t, int64_t, int64_t> cov_choose(uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages,
                                                 uintptr_t keys, int64_t tokens, double mean_advantage,
                                                 double mean_log_prob, const Bounds& bounds, double nearness,
                                                 const Bounds& clip_bounds, bool by_covariance, int64_t k,
                                                 uintptr_t chosen, int threads, const char* isa) {
    if (k < 1 || tokens > INT32_MAX) throw std::invalid_argument("k must be positive, tokens below 2^31");
    const CovTokens columns = {cov_inputs(log_probs, old_log_probs, advantages), pointer<const int64_t>(keys), nullptr,
                               tokens};
    const CovLimits limits = {bounds[0], bounds[1], nearness, clip_bounds[0], clip_bounds[1], by_covariance};
    CovSelection selection(columns, {}, limits, parse_isa(isa));
    selection.set_means(mean_advantage, mean_log_prob);
#pragma omp parallel num_threads(threads) if (worth_threads(threads, tokens))
    selection.mark(k, pointer<uint8_t>(chosen));
    const CovCounts counts = selection.counts();
    return {counts.candidates, counts.near, counts.marked};
}

// Sums [columns, rows] of consecutive rows of every column: row r has lengths[r] values.
void python_row_sums(const std::vector<uintptr_t>& columns, uintptr_t lengths, int64_t rows, uintptr_t sums,
                     int threads, const char* isa) {
    std::vector<const float*> values;
    for (const uintptr_t column : columns) values.push_back(pointer<const float>(column));
    const int64_t* sizes = pointer<const int64_t>(lengths);
    const std::vector<int64_t> each(sizes, sizes + rows);
    const int64_t tokens = std::accumulate(each.begin(), each.end(), int64_t{0});
    RowSums found(values, each, cov_kernels_for(parse_isa(isa)));
#pragma omp parallel num_threads(threads) if (worth_threads(threads, tokens))
    found.add_blocks();
    double* out = pointer<double>(sums);
    for (size_t column = 0; column < values.size(); ++column) {
        const std::vector<double> of_rows = found.of_column(column);
        out = std::copy(of_rows.begin(), of_rows.end(), out);
    }
}

// A whole selection among rows that lie back to back: means, k = max(floor(ratio * tokens), 1), marks. Returns (k, mean
// advantage, mean log-prob, candidates, tokens near a bound, tokens marked).
std::tuple<int64_t, double, double, int64_t, int64_t, int64_t> cov_select(
    uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages, uintptr_t keys,
    const std::vector<int64_t>& lengths, double ratio, const Bounds& bounds, double nearness,
    const Bounds& clip_bounds, bool by_covariance, uintptr_t chosen, int threads, const char* isa) {
    const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    if (!(ratio > 0) || tokens < 1 || tokens > INT32_MAX) {
        throw std::invalid_argument("the ratio must be positive, tokens from 1 to below 2^31");
    }
    const CovTokens columns = {cov_inputs(log_probs, old_log_probs, advantages), pointer<const int64_t>(keys), nullptr,
                               tokens};
    const CovLimits limits = {bounds[0], bounds[1], nearness, clip_bounds[0], clip_bounds[1], by_covariance};
    const int64_t k = std::max(floor_share(ratio, tokens), int64_t{1});
    CovSelection selection(columns, lengths, limits, parse_isa(isa));
#pragma omp parallel num_threads(threads) if (worth_threads(threads, tokens))
    {
        selection.find_means();
        selection.mark(k, pointer<uint8_t>(chosen));
    }
    const CovCounts counts = selection.counts();
    return {k,           selection.mean_advantage(), selection.mean_log_prob(), counts.candidates, counts.near,
            counts.marked};
}

void token_keys(uint64_t base, int64_t count, uintptr_t keys) {
    int64_t* out = pointer<int64_t>(keys);
    for (int64_t i = 0; i < count; ++i) out[i] = token_key(base, static_cast<uint64_t>(i));
}

}  // namespace
}  // namespace spear

void register_cov_select(py::module_& module) {
    using py::arg;
    using Guard = py::call_guard<py::gil_scoped_release>;
    module.def("cov_choose", &spear::cov_choose, Guard(), arg("log_probs"), arg("old_log_probs"), arg("advantages"),
               arg("keys"), arg("tokens"), arg("mean_advantage"), arg("mean_log_prob"), arg("bounds"),
               arg("nearness"), arg("clip_bounds"), arg("by_covariance"), arg("k"), arg("chosen"), arg("threads"),
               arg("isa"), "Marks the k smallest candidates, and those equal to the k-th; returns (candidates, tokens "
               "near a bound, tokens marked).");
    module.def("cov_select", &spear::cov_select, Guard(), arg("log_probs"), arg("old_log_probs"), arg("advantages"),
               arg("keys"), arg("lengths"), arg("ratio"), arg("bounds"), arg("nearness"), arg("clip_bounds"),
               arg("by_covariance"), arg("chosen"), arg("threads"), arg("isa"),
               "A whole selection among rows back to back; returns (k, mean advantage, mean log-prob, candidates, "
               "tokens near a bound, tokens marked).");
    module.def("row_sums", &spear::python_row_sums, Guard(), arg("columns"), arg("lengths"), arg("rows"), arg("sums"),
               arg("threads"), arg("isa"),
               "Sums in double of rows back to back, in an order that depends on nothing but the length.");
    module.def("token_keys", &spear::token_keys, Guard(), arg("base"), arg("count"), arg("keys"),
               "Keys of the positions 0 to count - 1 of a row.");
}
