// Clip-Cov and KL-Cov within one set of tokens: selection and policy loss in one parallel region, on columns that the
// selection leaves in the caches.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cov_math.h"
#include "cov_select.h"
#include "policy_loss.h"

namespace py = pybind11;

namespace spear {
namespace {

using Bounds = std::array<double, 2>;

template <typename Element>
Element* pointer(uintptr_t address) {
    return reinterpret_cast<Element*>(address);
}

// The tokens of a mask back to back, as if there were no others: no sum over them depends on what lies between.
class PackedTokens {
public:
    PackedTokens(const CovInputs& inputs, const uint8_t* mask, int64_t count)
        : inputs_(inputs), mask_(mask), count_(count) {
        for (int64_t start = 0; start < count; start += kBlock) {
            starts_.push_back(used_);
            used_ = std::accumulate(mask + start, mask + std::min(start + kBlock, count), used_);
        }
        values_.reset(new float[3 * static_cast<size_t>(used_)]);
        places_.reset(new int32_t[static_cast<size_t>(used_)]);
    }

    CovTokens tokens(const int64_t* keys) const {
        return {{column(0), column(1), column(2)}, keys, places_.get(), used_};
    }

    int64_t count() const { return used_; }

    // Called by all threads of a parallel region; ends with a barrier.
    void pack() {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < static_cast<int64_t>(starts_.size()); ++block) {
            const size_t next_block = static_cast<size_t>(block) + 1;
            const int64_t end = next_block < starts_.size() ? starts_[next_block] : used_;
            int64_t next = starts_[static_cast<size_t>(block)];
            for (int64_t place = block * kBlock; next < end; ++place) {
                column(0)[next] = inputs_.log_probs[place];
                column(1)[next] = inputs_.old_log_probs[place];
                column(2)[next] = inputs_.advantages[place];
                places_[static_cast<size_t>(next)] = static_cast<int32_t>(place);
                next += mask_[place];
            }
        }
    }

private:
    static constexpr int64_t kBlock = CovSelection::kBlockTokens;

    float* column(int64_t index) const { return values_.get() + index * used_; }

    CovInputs inputs_;
    const uint8_t* mask_;
    int64_t count_;
    int64_t used_ = 0;
    std::vector<int64_t> starts_;  // of the blocks' tokens among those that are used
    std::unique_ptr<float[]> values_;
    std::unique_ptr<int32_t[]> places_;
};

struct Drawn {
    int64_t tokens;
    int64_t k;
    CovCounts counts;
    PolicyTotals totals;
};

// `policy.selected` is where `marks` is: the loss reads what the selection writes.
Drawn draw_and_add(const PolicyInputs& policy, uint8_t* marks, const int64_t* keys, int64_t count, int mode,
                   const PolicySettings& settings, double ratio, const CovLimits& limits, int threads, Isa isa) {
    const CovInputs inputs = {policy.log_probs, policy.old_log_probs, policy.advantages};
    std::unique_ptr<PackedTokens> packed;
    if (policy.mask) packed.reset(new PackedTokens(inputs, policy.mask, count));
    if (packed && packed->count() == count) packed.reset();
    const CovTokens tokens = packed ? packed->tokens(keys) : CovTokens{inputs, keys, nullptr, count};
    if (packed) std::memset(marks, 0, static_cast<size_t>(count));
    const int64_t k = ratio > 0 && tokens.count ? std::max(floor_share(ratio, tokens.count), int64_t{1}) : 0;
    const std::vector<int64_t> lengths = {tokens.count};
    CovSelection selection(tokens, limits, isa);
    PolicySum sum(policy, count, mode, settings, isa);
#pragma omp parallel num_threads(threads) if (threads > 1 && count > CovSelection::kBlockTokens)
    {
        if (packed) packed->pack();
        selection.find_means(lengths);
        selection.mark(k, marks);
        sum.add_blocks();
    }
    return {tokens.count, k, selection.counts(), sum.totals()};
}

// Returns whether the selection is decided: not where tokens tie at its border.
bool drawn_loss(uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages, uintptr_t weights, uintptr_t keys,
                uintptr_t mask, int64_t tokens, int mode, double low, double high, double dual, double coef,
                double ratio, const Bounds& bounds, double nearness, const Bounds& clip_bounds, uintptr_t gradient,
                uintptr_t selected, uintptr_t loss, uintptr_t sums, int threads, const char* isa) {
    if (mode != kClipCov && mode != kKlCov) throw std::invalid_argument("this mode of the policy loss draws no tokens");
    if (tokens > INT32_MAX) throw std::invalid_argument("tokens must be below 2^31");
    const PolicyInputs inputs = {pointer<const float>(log_probs),  pointer<const float>(old_log_probs),
                                 pointer<const float>(advantages), pointer<const float>(weights),
                                 pointer<const uint8_t>(selected), pointer<const uint8_t>(mask),
                                 pointer<float>(gradient)};
    const PolicySettings settings = {static_cast<float>(low), static_cast<float>(high), static_cast<float>(dual),
                                     static_cast<float>(coef)};
    const CovLimits limits = {bounds[0], bounds[1], nearness, clip_bounds[0], clip_bounds[1], mode == kKlCov};
    const Drawn drawn = draw_and_add(inputs, pointer<uint8_t>(selected), pointer<const int64_t>(keys), tokens, mode,
                                     settings, ratio, limits, threads, parse_isa(isa));
    const PolicyTotals& all = drawn.totals;
    const double values[9] = {all.loss,
                              all.clipped,
                              all.dual_clipped,
                              all.log_ratio,
                              all.ratio,
                              all.max_ratio,
                              static_cast<double>(drawn.counts.candidates),
                              static_cast<double>(drawn.counts.near),
                              static_cast<double>(drawn.counts.marked)};
    std::copy(values, values + 9, pointer<double>(sums));
    *pointer<float>(loss) = static_cast<float>(all.loss);
    return drawn.counts.marked <= drawn.k;
}

}  // namespace
}  // namespace spear

void register_drawn_loss(py::module_& module) {
    using py::arg;
    module.def("drawn_loss", &spear::drawn_loss, py::call_guard<py::gil_scoped_release>(), arg("log_probs"),
               arg("old_log_probs"), arg("advantages"), arg("weights"), arg("keys"), arg("mask"), arg("tokens"),
               arg("mode"), arg("low"), arg("high"), arg("dual"), arg("coef"), arg("ratio"), arg("bounds"),
               arg("nearness"), arg("clip_bounds"), arg("gradient"), arg("selected"), arg("loss"), arg("sums"),
               arg("threads"), arg("isa"),
               "cov_select on the tokens of the mask and policy_loss in one call; writes the gradient and the selected "
               "tokens [tokens], the loss, and the sums [9]: those of policy_loss, candidates, tokens near a bound, "
               "selected tokens. Returns False where tokens tie at the border of the selection.");
}
