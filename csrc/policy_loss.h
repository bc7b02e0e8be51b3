// Policy loss of many tokens: loss, its gradient by the log-probs and the sums that the trainer records, in one pass.
// Tokens are summed in blocks of a fixed size and the blocks in order, so that threads have no effect on a result.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "policy_math.h"

namespace spear {

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

// The loss of some tokens, carried out by the threads of the parallel region in which all of them call add_blocks.
class PolicySum {
public:
    static constexpr int64_t kBlockTokens = 4096;

    // Throws std::invalid_argument for a mode that does not exist or lacks selected tokens.
    PolicySum(const PolicyInputs& inputs, int64_t tokens, int mode, const PolicySettings& settings, Isa isa);

    void add_blocks();
    PolicyTotals totals() const;

private:
    PolicyInputs inputs_;
    int64_t tokens_;
    PolicySettings settings_;
    PolicyBlock kernel_;
    std::vector<PolicyTotals> blocks_;
};

}  // namespace spear
