// A selection by covariance: the tokens that Clip-Cov and KL-Cov act on are the k candidates that are smallest by key
// (or by minus covariance). Exact; neither threads nor the instruction set have an effect on a result.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "isa.h"
#include "key_select.h"

namespace spear {

struct CovInputs {
    const float* log_probs;
    const float* old_log_probs;
    const float* advantages;
};

// Tokens of a selection, rows back to back.
struct CovTokens {
    CovInputs inputs;
    const int64_t* keys;
    const int32_t* places;  // where a token stands in keys and marks; null: at its own index
    int64_t count;
};

// A candidate's covariance is inside (lb, ub), and the token is not clipped: the clips bound the log-ratio.
struct CovLimits {
    double lb;
    double ub;
    double nearness;
    double clip_low;
    double clip_high;
    bool by_covariance;  // the largest covariance comes first; false: the smallest key
};

// The rule in float, with what its rounding can do to a covariance: that of a token is within
// kShare * |cov| + spread_log_prob * |A - mean| + spread_advantage * |logp - mean| + spread of the one in double.
struct CovFilter {
    static constexpr float kShare = 4e-7f;  // six halves of a unit in the last place and some more
    float mean_advantage, mean_log_prob, spread_advantage, spread_log_prob, spread;
    float least, most;      // surely inside and not near a bound: between these
    float lowest, highest;  // surely outside and not near a bound: beyond these
    float clip_low, clip_high;
};

struct CovRule {
    double mean_advantage;
    double mean_log_prob;
    double lb;
    double ub;
    double near_lb[2];
    double near_ub[2];
    double clip_low;
    double clip_high;
    CovFilter filter;
};

inline double covariance_of(const CovInputs& inputs, int64_t token, const CovRule& rule) {
    return (static_cast<double>(inputs.advantages[token]) - rule.mean_advantage) *
           (static_cast<double>(inputs.log_probs[token]) - rule.mean_log_prob);
}

struct CovBlock {
    int32_t* tokens;  // room for the block's tokens; its candidates come first
    int64_t candidates;
    int64_t near;
};

// Block kernels of one instruction set.
struct CovKernels {
    void (*block)(const CovInputs& inputs, int64_t start, int64_t stop, const CovRule& rule, CovBlock& block);
    double (*sum)(const float* values, int64_t count);  // of at most kSumBlock values
};

CovKernels cov_kernels_for(Isa isa);

struct CovCounts {
    int64_t candidates;
    int64_t near;    // tokens near lb or ub
    int64_t marked;  // more than k where words equal the k-th
};

// Sums of rows that lie back to back, of every column. Shared by the threads of a parallel region, each of which sums
// blocks that lie together in all columns, and has them near for what comes next.
class RowSums {
public:
    RowSums(std::vector<const float*> columns, const std::vector<int64_t>& lengths, const CovKernels& kernels);

    // Called by all threads of the region; ends with a barrier.
    void add_blocks();

    // Sums of the rows of a column, once its blocks are added.
    std::vector<double> of_column(size_t column) const;

private:
    struct Block {
        int64_t start;
        int64_t size;
        size_t row;
    };

    std::vector<const float*> columns_;
    CovKernels kernels_;
    size_t rows_;
    std::vector<Block> blocks_;
    std::vector<double> sums_;  // [columns, blocks]
};

// One selection, carried out by the threads of the parallel region in which all of them call its methods; what it holds
// is shared. Every step gives a thread the same blocks, so that what it wrote is near when it reads it again.
class CovSelection {
public:
    static constexpr int64_t kBlockTokens = 2048;

    // Rows of these lengths lie back to back; they matter for the means alone.
    CovSelection(const CovTokens& tokens, const std::vector<int64_t>& lengths, const CovLimits& limits, Isa isa);

    void set_means(double advantage, double log_prob);

    // Means of the tokens; both NaN where a value is not finite.
    void find_means();

    // Marks the first k candidates, and all that equal the last of them; elsewhere stands 0, which the caller provides
    // where tokens have places of their own.
    void mark(int64_t k, uint8_t* marks);

    CovCounts counts() const { return {candidates_, near_, marked_}; }
    double mean_advantage() const { return rule_.mean_advantage; }
    double mean_log_prob() const { return rule_.mean_log_prob; }

private:
    int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }
    const uint64_t* words_of(int64_t block) const { return words_.get() + block * kBlockTokens; }
    void write_words(const CovBlock& block, uint64_t* words) const;
    void count_words(const CovBlock& block, uint64_t* words, uint32_t* histogram) const;
    WordSearch first_step(uint32_t k) const;
    void find_candidates(uint8_t* marks);
    void gather_left();
    void mark_candidates(uint8_t* marks);

    CovTokens tokens_;
    CovLimits limits_;
    CovKernels kernels_;
    CovRule rule_;
    // Block b has its candidates and their words from position b * kBlockTokens on. Not initialised: memory that holds
    // no candidate is never touched.
    std::unique_ptr<int32_t[]> candidate_tokens_;
    std::unique_ptr<uint64_t[]> words_;
    std::vector<CovBlock> blocks_;
    std::vector<uint32_t> histogram_;  // of the first bits of the words
    std::vector<uint64_t> left_;       // words that the search has left
    RowSums sums_;
    WordSearch search_;
    int64_t candidates_ = 0;
    int64_t near_ = 0;
    int64_t marked_ = 0;
};

}  // namespace spear
