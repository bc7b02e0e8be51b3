#include "drawn_loss.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "address.h"
#include "cov_math.h"

namespace py = pybind11;

namespace spear {
namespace {

// The tokens of a mask back to back, as if there were no others: no sum over them depends on what lies between.
class PackedTokens {
public:
    PackedTokens(const CovInputs& inputs, const uint8_t* mask, int64_t count)
        : inputs_(inputs), mask_(mask) {
        for (int64_t start = 0; start < count; start += kBlock) {
            starts_.push_back(used_);
            used_ += std::count_if(mask + start, mask + std::min(start + kBlock, count), is_used);
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
                next += is_used(mask_[place]);
            }
        }
    }

private:
    static constexpr int64_t kBlock = CovSelection::kBlockTokens;

    static bool is_used(uint8_t byte) { return byte != 0; }  // a view of bytes as booleans may hold others than 1

    float* column(int64_t index) const { return values_.get() + index * used_; }

    CovInputs inputs_;
    const uint8_t* mask_;
    int64_t used_ = 0;
    std::vector<int64_t> starts_;  // of the blocks' tokens among those that are used
    std::unique_ptr<float[]> values_;
    std::unique_ptr<int32_t[]> places_;
};

}  // namespace

bool drawn_loss(const DrawnColumns& columns, const DrawnSettings& settings, const DrawnResults& results, int threads,
                Isa isa) {
    if (settings.mode != kClipCov && settings.mode != kKlCov) {
        throw std::invalid_argument("this mode of the policy loss draws no tokens");
    }
    if (columns.tokens > INT32_MAX) throw std::invalid_argument("tokens must be below 2^31");
    const CovInputs inputs = {columns.log_probs, columns.old_log_probs, columns.advantages};
    const PolicyInputs policy = {columns.log_probs, columns.old_log_probs, columns.advantages, columns.weights,
                                 results.selected,  columns.mask,          results.gradient};
    std::unique_ptr<PackedTokens> packed;
    if (columns.mask) packed.reset(new PackedTokens(inputs, columns.mask, columns.tokens));
    if (packed && packed->count() == columns.tokens) packed.reset();
    if (packed) std::memset(results.selected, 0, static_cast<size_t>(columns.tokens));
    const CovTokens tokens =
        packed ? packed->tokens(columns.keys) : CovTokens{inputs, columns.keys, nullptr, columns.tokens};
    const bool selects = settings.ratio > 0 && tokens.count > 0;
    const int64_t k = selects ? std::max(floor_share(settings.ratio, tokens.count), int64_t{1}) : 0;
    const std::vector<int64_t> lengths = {tokens.count};
    CovSelection selection(tokens, lengths, settings.limits, isa);
    PolicySum sum(policy, columns.tokens, settings.mode, settings.policy, isa);
#pragma omp parallel num_threads(threads) if (threads > 1 && columns.tokens > CovSelection::kBlockTokens)
    {
        if (packed) packed->pack();
        selection.find_means();
        selection.mark(k, results.selected);
        sum.add_blocks();  // reads what the selection has marked
    }
    const CovCounts counts = selection.counts();
    const PolicyTotals all = sum.totals();
    const double sums[kDrawnSums] = {all.loss,
                                     all.clipped,
                                     all.dual_clipped,
                                     all.log_ratio,
                                     all.ratio,
                                     all.max_ratio,
                                     static_cast<double>(counts.candidates),
                                     static_cast<double>(counts.near),
                                     static_cast<double>(counts.marked)};
    std::copy(sums, sums + kDrawnSums, results.sums);
    *results.loss = static_cast<float>(all.loss);
    return counts.marked <= k;
}

bool widest_drawn_loss(const DrawnColumns& columns, const DrawnSettings& settings, const DrawnResults& results,
                       int threads) {
    return drawn_loss(columns, settings, results, threads, detected_isa());
}

namespace {

using Bounds = std::array<double, 2>;

bool python_drawn_loss(uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages, uintptr_t weights,
                       uintptr_t keys, uintptr_t mask, int64_t tokens, int mode, double low, double high, double coef,
                       double ratio, const Bounds& bounds, double nearness, const Bounds& clip_bounds,
                       uintptr_t gradient, uintptr_t selected, uintptr_t loss, uintptr_t sums, int threads,
                       const char* isa) {
    const DrawnColumns columns = {pointer<const float>(log_probs),  pointer<const float>(old_log_probs),
                                  pointer<const float>(advantages), pointer<const float>(weights),
                                  pointer<const int64_t>(keys),     pointer<const uint8_t>(mask),
                                  tokens};
    const DrawnSettings settings = {
        mode, {static_cast<float>(low), static_cast<float>(high), 0, static_cast<float>(coef)}, ratio,
        {bounds[0], bounds[1], nearness, clip_bounds[0], clip_bounds[1], mode == kKlCov}};
    const DrawnResults results = {pointer<float>(gradient), pointer<uint8_t>(selected), pointer<float>(loss),
                                  pointer<double>(sums)};
    return drawn_loss(columns, settings, results, threads, parse_isa(isa));
}

}  // namespace
}  // namespace spear

void register_drawn_loss(py::module_& module) {
    using py::arg;
    module.def("drawn_loss", &spear::python_drawn_loss, py::call_guard<py::gil_scoped_release>(), arg("log_probs"),
               arg("old_log_probs"), arg("advantages"), arg("weights"), arg("keys"), arg("mask"), arg("tokens"),
               arg("mode"), arg("low"), arg("high"), arg("coef"), arg("ratio"), arg("bounds"), arg("nearness"),
               arg("clip_bounds"), arg("gradient"), arg("selected"), arg("loss"), arg("sums"), arg("threads"),
               arg("isa"),
               "cov_select on the tokens of the mask and policy_loss in one call; writes the gradient and the selected "
               "tokens [tokens], the loss, and the sums [9]: those of policy_loss, candidates, tokens near a bound, "
               "selected tokens. Returns False where tokens tie at the border of the selection.");
    module.attr("drawn_loss_address") = reinterpret_cast<uintptr_t>(&spear::widest_drawn_loss);
    module.attr("headers") = SPEAR_HEADERS;
}
