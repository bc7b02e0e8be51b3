#include "policy_loss.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "address.h"
#include "dtype.h"

namespace py = pybind11;

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

}  // namespace

PolicySum::PolicySum(const PolicyInputs& inputs, int64_t tokens, int mode, const PolicySettings& settings, Isa isa)
    : inputs_(inputs),
      tokens_(tokens),
      settings_(settings),
      kernel_(block_kernel(mode, inputs.mask != nullptr, isa)),
      blocks_(static_cast<size_t>((tokens + kBlockTokens - 1) / kBlockTokens)) {
    if (mode < kVanilla || mode > kKlCov) throw std::invalid_argument("unknown mode of the policy loss");
    if ((mode == kClipCov || mode == kKlCov) && tokens > 0 && !inputs.selected) {
        throw std::invalid_argument("this mode of the policy loss needs selected tokens");
    }
}

void PolicySum::add_blocks() {
    const int64_t count = static_cast<int64_t>(blocks_.size());
#pragma omp for schedule(static)
    for (int64_t block = 0; block < count; ++block) {
        const int64_t start = block * kBlockTokens, stop = std::min(start + kBlockTokens, tokens_);
        blocks_[static_cast<size_t>(block)] = kernel_(inputs_, start, stop, settings_);
    }
}

PolicyTotals PolicySum::totals() const {
    PolicyTotals all = {};
    for (const PolicyTotals& block : blocks_) {
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

namespace {

void policy_loss(uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages, uintptr_t weights,
                 uintptr_t selected, uintptr_t mask, int64_t tokens, int mode, double low, double high, double dual,
                 double coef, uintptr_t gradient, uintptr_t loss, uintptr_t sums, int threads, const char* isa) {
    const PolicyInputs inputs = {pointer<const float>(log_probs),  pointer<const float>(old_log_probs),
                                 pointer<const float>(advantages), pointer<const float>(weights),
                                 pointer<const uint8_t>(selected), pointer<const uint8_t>(mask),
                                 pointer<float>(gradient)};
    const PolicySettings settings = {static_cast<float>(low), static_cast<float>(high), static_cast<float>(dual),
                                     static_cast<float>(coef)};
    PolicySum sum(inputs, tokens, mode, settings, parse_isa(isa));
#pragma omp parallel num_threads(threads) if (threads > 1 && tokens > PolicySum::kBlockTokens)
    sum.add_blocks();
    const PolicyTotals all = sum.totals();
    const double values[6] = {all.loss, all.clipped, all.dual_clipped, all.log_ratio, all.ratio, all.max_ratio};
    std::copy(values, values + 6, pointer<double>(sums));
    *pointer<float>(loss) = static_cast<float>(all.loss);
}

}  // namespace
}  // namespace spear

void register_policy_loss(py::module_& module) {
    using py::arg;
    module.def("policy_loss", &spear::policy_loss, py::call_guard<py::gil_scoped_release>(), arg("log_probs"),
               arg("old_log_probs"), arg("advantages"), arg("weights"), arg("selected"), arg("mask"), arg("tokens"),
               arg("mode"), arg("low"), arg("high"), arg("dual"), arg("coef"), arg("gradient"), arg("loss"),
               arg("sums"), arg("threads"), arg("isa"),
               "Writes the gradient [tokens], the loss, and the sums [6]: loss, clipped, dual clipped, log-ratio, "
               "ratio and the largest ratio. `low` and `high` bound the ratio; addresses of selected and mask may be "
               "0.");
}
