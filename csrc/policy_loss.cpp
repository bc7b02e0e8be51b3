// Policy loss of many tokens: loss, its gradient by the log-probs and the sums that the trainer records, in one pass.
// Tokens are summed in blocks of a fixed size and the blocks in order, so that threads have no effect on a result.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"
#include "isa.h"
#include "policy_math.h"

namespace py = pybind11;

namespace spear {
namespace {

constexpr int64_t kBlockTokens = 4096;

struct PolicyInputs {
    const float* log_probs;
    const float* old_log_probs;
    const float* advantages;
    const float* weights;
    const uint8_t* selected;  // null in the modes that choose no tokens
    const uint8_t* mask;      // null: every token takes part
    float* gradient;
};

struct PolicyTotals {
    double loss;
    double clipped;
    double dual_clipped;
    double log_ratio;
    double ratio;
    double max_ratio;
};

using PolicySettings = PolicyRule<float>;
using PolicyBlock = PolicyTotals (*)(const PolicyInputs& inputs, int64_t start, int64_t stop,
                                     const PolicySettings& settings);

}  // namespace
}  // namespace spear

#define SPEAR_ROWS "policy_loss_rows.h"
#include "foreach_isa.h"

namespace spear {
namespace {

PolicyBlock block_kernel(int mode, bool masked, Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::policy_block_for(mode, masked);
    if (isa == Isa::avx2) return avx2::policy_block_for(mode, masked);
#endif
    return generic::policy_block_for(mode, masked);
}

PolicyTotals combined(const std::vector<PolicyTotals>& blocks) {
    PolicyTotals all = {};
    for (const PolicyTotals& block : blocks) {
        all.loss += block.loss;
        all.clipped += block.clipped;
        all.dual_clipped += block.dual_clipped;
        all.log_ratio += block.log_ratio;
        all.ratio += block.ratio;
        all.max_ratio = block.max_ratio > all.max_ratio ? block.max_ratio : all.max_ratio;
    }
    // The comparisons above pass over a NaN, the sum does not.
    if (all.ratio != all.ratio) all.max_ratio = std::numeric_limits<double>::quiet_NaN();
    return all;
}

template <typename Element>
Element* pointer(uintptr_t address) {
    return reinterpret_cast<Element*>(address);
}

void policy_loss(uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages, uintptr_t weights,
                 uintptr_t selected, uintptr_t mask, int64_t tokens, int mode, double low, double high, double dual,
                 double coef, uintptr_t gradient, uintptr_t sums, int threads, const char* isa) {
    if (mode < kVanilla || mode > kKlCov) throw std::invalid_argument("unknown mode of the policy loss");
    if ((mode == kClipCov || mode == kKlCov) && tokens > 0 && !selected) {
        throw std::invalid_argument("this mode of the policy loss needs selected tokens");
    }
    const PolicyBlock kernel = block_kernel(mode, mask != 0, parse_isa(isa));
    const PolicyInputs inputs = {pointer<const float>(log_probs),  pointer<const float>(old_log_probs),
                                 pointer<const float>(advantages), pointer<const float>(weights),
                                 pointer<const uint8_t>(selected), pointer<const uint8_t>(mask),
                                 pointer<float>(gradient)};
    const PolicySettings settings = {static_cast<float>(low), static_cast<float>(high), static_cast<float>(dual),
                                     static_cast<float>(coef)};
    const int64_t count = (tokens + kBlockTokens - 1) / kBlockTokens;
    std::vector<PolicyTotals> blocks(static_cast<size_t>(count));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count > 1)
    for (int64_t block = 0; block < count; ++block) {
        const int64_t start = block * kBlockTokens, left = tokens - start;
        const int64_t stop = start + (left < kBlockTokens ? left : kBlockTokens);
        blocks[static_cast<size_t>(block)] = kernel(inputs, start, stop, settings);
    }
    const PolicyTotals all = combined(blocks);
    double* out = pointer<double>(sums);
    const double values[6] = {all.loss, all.clipped, all.dual_clipped, all.log_ratio, all.ratio, all.max_ratio};
    for (int i = 0; i < 6; ++i) out[i] = values[i];
}

}  // namespace
}  // namespace spear

void register_policy_loss(py::module_& module) {
    using py::arg;
    module.def("policy_loss", &spear::policy_loss, py::call_guard<py::gil_scoped_release>(), arg("log_probs"),
               arg("old_log_probs"), arg("advantages"), arg("weights"), arg("selected"), arg("mask"), arg("tokens"),
               arg("mode"), arg("low"), arg("high"), arg("dual"), arg("coef"), arg("gradient"), arg("sums"),
               arg("threads"), arg("isa"),
               "Writes the gradient [tokens] and the sums [6]: loss, clipped, dual clipped, log-ratio, ratio and the "
               "largest ratio. `low` and `high` bound the ratio; addresses of selected and mask may be 0.");
}
