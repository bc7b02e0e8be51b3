// Candidates of Clip-Cov and KL-Cov among tokens, and those of them that can be among the k smallest by key (or by
// minus covariance). Exact; neither threads nor the instruction set have an effect on a result.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cov_math.h"
#include "dtype.h"
#include "isa.h"
#include "key_select.h"

namespace py = pybind11;

namespace spear {
namespace {

constexpr int64_t kBlockTokens = 8192;

struct CovInputs {
    const float* log_probs;
    const float* old_log_probs;
    const float* advantages;
};

// A candidate's covariance is inside (lb, ub), and the token is not clipped: the clips bound the log-ratio.
struct CovRule {
    double mean_advantage;
    double mean_log_prob;
    double lb;
    double ub;
    double near_lb[2];
    double near_ub[2];
    double clip_low;
    double clip_high;
};

struct CovBlock {
    int64_t* places;  // room for the block's tokens
    int64_t candidates;
    int64_t near;
};

struct CovKernels {
    void (*block)(const CovInputs& inputs, int64_t start, int64_t stop, const CovRule& rule, CovBlock& block);
    double (*sum)(const float* values, int64_t count);
};

}  // namespace
}  // namespace spear

#define SPEAR_ROWS "cov_select_rows.h"
#include "foreach_isa.h"

namespace spear {
namespace {

CovKernels kernels_for(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::cov_kernels();
    if (isa == Isa::avx2) return avx2::cov_kernels();
#endif
    return generic::cov_kernels();
}

template <typename Element>
Element* pointer(uintptr_t address) {
    return reinterpret_cast<Element*>(address);
}

// Moves every block's candidates to the front of `places`; returns how many they are and how many tokens are near.
std::pair<int64_t, int64_t> packed(const std::vector<CovBlock>& blocks, int64_t* places) {
    int64_t candidates = 0, near = 0;
    for (const CovBlock& block : blocks) {
        const size_t bytes = static_cast<size_t>(block.candidates) * sizeof(int64_t);
        if (bytes) std::memmove(places + candidates, block.places, bytes);
        candidates += block.candidates;
        near += block.near;
    }
    return {candidates, near};
}

// Keeps the places whose word is among the `k` smallest, and any that equal the k-th; returns how many.
int64_t keep_smallest(int64_t* places, const std::vector<uint64_t>& words, uint32_t k) {
    std::vector<uint32_t> histogram(kDigits);
    const int64_t count = static_cast<int64_t>(words.size());
    const uint64_t last = kth_smallest(words.data(), count, k, histogram.data());
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        places[kept] = places[i];
        kept += words[static_cast<size_t>(i)] <= last;
    }
    return kept;
}

// `places` has room for all tokens. Returns (candidates, tokens near a bound, places written).
std::tuple<int64_t, int64_t, int64_t> cov_select(uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages,
                                                 uintptr_t keys, int64_t tokens, double mean_advantage,
                                                 double mean_log_prob, const std::array<double, 2>& bounds,
                                                 const std::array<double, 4>& near_bounds,
                                                 const std::array<double, 2>& clip_bounds, bool by_covariance,
                                                 int64_t k, uintptr_t places, int threads, const char* isa) {
    if (k < 1 || tokens > INT32_MAX) throw std::invalid_argument("k must be positive, tokens below 2^31");
    const CovKernels kernels = kernels_for(parse_isa(isa));
    const CovInputs inputs = {pointer<const float>(log_probs), pointer<const float>(old_log_probs),
                              pointer<const float>(advantages)};
    const CovRule rule = {mean_advantage, mean_log_prob, bounds[0], bounds[1], {near_bounds[0], near_bounds[1]},
                          {near_bounds[2], near_bounds[3]}, clip_bounds[0], clip_bounds[1]};
    int64_t* out = pointer<int64_t>(places);
    const int64_t count = (tokens + kBlockTokens - 1) / kBlockTokens;
    std::vector<CovBlock> blocks(static_cast<size_t>(count));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count > 1)
    for (int64_t index = 0; index < count; ++index) {
        const int64_t start = index * kBlockTokens, left = tokens - start;
        CovBlock block = {out + start, 0, 0};
        kernels.block(inputs, start, start + (left < kBlockTokens ? left : kBlockTokens), rule, block);
        blocks[static_cast<size_t>(index)] = block;
    }
    const auto [candidates, near] = packed(blocks, out);
    if (candidates <= k) return {candidates, near, candidates};
    std::vector<uint64_t> words(static_cast<size_t>(candidates));
    for (int64_t i = 0; i < candidates; ++i) {
        const int64_t place = out[i];
        const double advantage = inputs.advantages[place], log_prob = inputs.log_probs[place];
        const double covariance = (advantage - mean_advantage) * (log_prob - mean_log_prob);
        words[static_cast<size_t>(i)] =
            by_covariance ? ordered_word(-covariance) : ordered_word(pointer<const int64_t>(keys)[place]);
    }
    return {candidates, near, keep_smallest(out, words, static_cast<uint32_t>(k))};
}

// Sums of consecutive rows of `values`: row r has lengths[r] of them.
void row_sums(uintptr_t values, uintptr_t lengths, int64_t rows, uintptr_t sums, const char* isa) {
    const CovKernels kernels = kernels_for(parse_isa(isa));
    const float* source = pointer<const float>(values);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t length = pointer<const int64_t>(lengths)[row];
        pointer<double>(sums)[row] = kernels.sum(source, length);
        source += length;
    }
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
    module.def("cov_select", &spear::cov_select, Guard(), arg("log_probs"), arg("old_log_probs"), arg("advantages"),
               arg("keys"), arg("tokens"), arg("mean_advantage"), arg("mean_log_prob"), arg("bounds"),
               arg("near_bounds"), arg("clip_bounds"), arg("by_covariance"), arg("k"), arg("places"), arg("threads"),
               arg("isa"), "Writes the places of candidates that can be among the k smallest; returns (candidates, "
               "tokens near a bound, places).");
    module.def("row_sums", &spear::row_sums, Guard(), arg("values"), arg("lengths"), arg("rows"), arg("sums"),
               arg("isa"), "Sums in double of rows back to back, in an order that depends on nothing but the length.");
    module.def("token_keys", &spear::token_keys, Guard(), arg("base"), arg("count"), arg("keys"),
               "Keys of the positions 0 to count - 1 of a row.");
}
