#include "cov_select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cov_math.h"
#include "dtype.h"

#define SPEAR_ROWS "cov_select_rows.h"
#include "foreach_isa.h"

namespace spear {
namespace {

constexpr size_t kFewWords = 1024;  // so few are sooner put in order than counted

float rounded_down(double value) {
    const float nearest = static_cast<float>(value);
    return nearest > value ? std::nextafter(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}

float rounded_up(double value) { return -rounded_down(-value); }

CovFilter cov_filter(const CovRule& rule) {
    const float advantage = static_cast<float>(rule.mean_advantage);
    const float log_prob = static_cast<float>(rule.mean_log_prob);
    const double off_advantage = 1.01 * std::fabs(advantage - rule.mean_advantage);
    const double off_log_prob = 1.01 * std::fabs(log_prob - rule.mean_log_prob);
    CovFilter filter;
    filter.mean_advantage = advantage;
    filter.mean_log_prob = log_prob;
    filter.spread_advantage = rounded_up(off_advantage);  // upwards, as it may be below the smallest float
    filter.spread_log_prob = rounded_up(off_log_prob);
    filter.spread = rounded_up(off_advantage * off_log_prob + 1e-30);
    filter.least = rounded_up(rule.near_lb[1]);
    filter.most = rounded_down(rule.near_ub[0]);
    // Bounds may be NaN, which holds nothing, or swapped.
    filter.lowest = rounded_down(std::fmin(rule.near_lb[0], rule.near_ub[0]));
    filter.highest = rounded_up(std::fmax(rule.near_lb[1], rule.near_ub[1]));
    filter.clip_low = rounded_up(rule.clip_low);      // for a float, x < bound is x < the float above it
    filter.clip_high = rounded_down(rule.clip_high);  // and x > bound is x > the float below it
    return filter;
}

// The word up to which words are among the k smallest, or equal to the k-th, from the words that are left.
uint64_t border(const WordSearch& search, std::vector<uint64_t>& left) {
    if (left.size() <= kFewWords) {
        const auto wanted = left.begin() + (search.rank - 1);
        std::nth_element(left.begin(), wanted, left.end());
        return *wanted;
    }
    std::vector<uint32_t> histogram(kDigits);
    return finished(search, left.data(), static_cast<int64_t>(left.size()), histogram.data()).last;
}

// Mean of a column from the sums of its rows, which are added exactly. NaN where one is not finite.
double mean_of(const std::vector<double>& sums, int64_t tokens) {
    ExactSum total;
    for (const double sum : sums) {
        if (!std::isfinite(sum)) return std::numeric_limits<double>::quiet_NaN();
        total.add(sum);
    }
    return total.rounded() / static_cast<double>(tokens);
}

}  // namespace

CovKernels cov_kernels_for(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::cov_kernels();
    if (isa == Isa::avx2) return avx2::cov_kernels();
#endif
    return generic::cov_kernels();
}

RowSums::RowSums(std::vector<const float*> columns, const std::vector<int64_t>& lengths, const CovKernels& kernels)
    : columns_(std::move(columns)), kernels_(kernels), rows_(lengths.size()) {
    int64_t start = 0;
    for (size_t row = 0; row < rows_; ++row) {
        for (int64_t end = start + lengths[row]; start < end; start += blocks_.back().size) {
            blocks_.push_back({start, std::min(end - start, int64_t{kSumBlock}), row});
        }
    }
    sums_.resize(columns_.size() * blocks_.size());
}

void RowSums::add_blocks() {
    const int64_t count = static_cast<int64_t>(blocks_.size());
#pragma omp for schedule(static)
    for (int64_t index = 0; index < count; ++index) {
        const size_t block = static_cast<size_t>(index);
        for (size_t column = 0; column < columns_.size(); ++column) {
            const float* values = columns_[column] + blocks_[block].start;
            sums_[column * blocks_.size() + block] = kernels_.sum(values, blocks_[block].size);
        }
    }
}

std::vector<double> RowSums::of_column(size_t column) const {
    std::vector<double> sums(rows_);
    for (size_t block = 0; block < blocks_.size(); ++block) {
        sums[blocks_[block].row] += sums_[column * blocks_.size() + block];
    }
    return sums;
}

CovSelection::CovSelection(const CovTokens& tokens, const std::vector<int64_t>& lengths, const CovLimits& limits,
                           Isa isa)
    : tokens_(tokens),
      limits_(limits),
      kernels_(cov_kernels_for(isa)),
      candidate_tokens_(new int32_t[static_cast<size_t>(tokens.count)]),
      words_(new uint64_t[static_cast<size_t>(tokens.count)]),
      blocks_(static_cast<size_t>((tokens.count + kBlockTokens - 1) / kBlockTokens)),
      histogram_(limits.by_covariance ? kDigits : kCoarseBins),
      sums_({tokens.inputs.advantages, tokens.inputs.log_probs}, lengths, kernels_),
      search_{~uint64_t{0}, 0, 0, 0, true, false} {  // every word: right where there are no more than k
    set_means(0, 0);
}

void CovSelection::set_means(double advantage, double log_prob) {
    const double lb = limits_.lb, ub = limits_.ub, nearness = limits_.nearness;
    rule_ = {advantage, log_prob, lb, ub, {lb - nearness, lb + nearness}, {ub - nearness, ub + nearness},
             limits_.clip_low, limits_.clip_high, {}};
    rule_.filter = cov_filter(rule_);
}

void CovSelection::find_means() {
    sums_.add_blocks();
#pragma omp single
    {
        const double advantage = mean_of(sums_.of_column(0), tokens_.count);
        const double log_prob = mean_of(sums_.of_column(1), tokens_.count);
        const double broken = std::numeric_limits<double>::quiet_NaN();
        const bool finite = !std::isnan(advantage) && !std::isnan(log_prob);
        set_means(finite ? advantage : broken, finite ? log_prob : broken);
    }
}

void CovSelection::mark(int64_t k, uint8_t* marks) {
    find_candidates(marks);
    if (k == 0) return;
#pragma omp single
    if (candidates_ > k) search_ = first_step(static_cast<uint32_t>(k));
    if (!search_.done) {
        gather_left();
#pragma omp single
        search_.last = border(search_, left_);
    }
    mark_candidates(marks);
}

WordSearch CovSelection::first_step(uint32_t k) const {
    if (limits_.by_covariance) return narrowed(word_search(k), histogram_.data());
    return coarse_search(k, histogram_.data());
}

// The words of the candidates of a block, and how many there are in every bin.
void CovSelection::count_words(const CovBlock& block, uint64_t* words, uint32_t* histogram) const {
    write_words(block, words);
    if (limits_.by_covariance) {
        const WordSearch search = word_search(1);
        for (int64_t i = 0; i < block.candidates; ++i) ++histogram[digit(search, words[i])];
    } else {
        for (int64_t i = 0; i < block.candidates; ++i) ++histogram[coarse_bin(words[i])];
    }
}

void CovSelection::write_words(const CovBlock& block, uint64_t* words) const {
    if (limits_.by_covariance) {
        for (int64_t i = 0; i < block.candidates; ++i) {
            words[i] = ordered_word(-covariance_of(tokens_.inputs, block.tokens[i], rule_));
        }
        return;
    }
    const int64_t* keys = tokens_.keys;
    const int32_t* places = tokens_.places;
    for (int64_t i = 0; i < block.candidates; ++i) {
        const int32_t token = block.tokens[i];
        words[i] = ordered_word(keys[places ? places[token] : token]);
    }
}

void CovSelection::find_candidates(uint8_t* marks) {
    std::vector<uint32_t> histogram(histogram_.size());
    int64_t candidates = 0, near = 0;
#pragma omp for schedule(static) nowait
    for (int64_t index = 0; index < num_blocks(); ++index) {
        const int64_t start = index * kBlockTokens, size = std::min(tokens_.count - start, kBlockTokens);
        CovBlock block = {candidate_tokens_.get() + start, 0, 0};
        kernels_.block(tokens_.inputs, start, start + size, rule_, block);
        uint64_t* words = words_.get() + start;
        count_words(block, words, histogram.data());
        if (!tokens_.places) std::memset(marks + start, 0, static_cast<size_t>(size));
        candidates += block.candidates;
        near += block.near;
        blocks_[static_cast<size_t>(index)] = block;
    }
#pragma omp critical
    {
        for (size_t i = 0; i < histogram.size(); ++i) histogram_[i] += histogram[i];
        candidates_ += candidates;
        near_ += near;
    }
#pragma omp barrier
}

// Gathers the words that the search has left.
void CovSelection::gather_left() {
    std::vector<uint64_t> own;
#pragma omp for schedule(static) nowait
    for (int64_t index = 0; index < num_blocks(); ++index) {
        const uint64_t* words = words_of(index);
        for (int64_t i = 0; i < blocks_[static_cast<size_t>(index)].candidates; ++i) {
            if (is_left(search_, words[i])) own.push_back(words[i]);
        }
    }
#pragma omp critical
    left_.insert(left_.end(), own.begin(), own.end());
#pragma omp barrier
}

// Marks the candidates with words up to the last one that the search has found.
void CovSelection::mark_candidates(uint8_t* marks) {
    const uint64_t last = search_.last;
    const int32_t* places = tokens_.places;
    int64_t marked = 0;
#pragma omp for schedule(static) nowait
    for (int64_t index = 0; index < num_blocks(); ++index) {
        // A copy: a byte that is written could be any part of what is read.
        const CovBlock block = blocks_[static_cast<size_t>(index)];
        const uint64_t* words = words_of(index);
        for (int64_t i = 0; i < block.candidates; ++i) {
            const uint8_t mark = words[i] <= last;
            const int32_t token = block.tokens[i];
            marks[places ? places[token] : token] = mark;
            marked += mark;
        }
    }
#pragma omp atomic
    marked_ += marked;
#pragma omp barrier
}

}  // namespace spear
