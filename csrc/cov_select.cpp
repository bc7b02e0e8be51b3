// The tokens that Clip-Cov and KL-Cov act on: the k candidates that are smallest by key (or by minus covariance).
// Exact; neither threads nor the instruction set have an effect on a result.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <tuple>
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

constexpr int64_t kBlockTokens = 2048;
constexpr size_t kFewWords = 256;  // so few are sooner put in order than counted

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

inline double covariance_of(const CovInputs& inputs, int64_t place, const CovRule& rule) {
    return (static_cast<double>(inputs.advantages[place]) - rule.mean_advantage) *
           (static_cast<double>(inputs.log_probs[place]) - rule.mean_log_prob);
}

struct CovBlock {
    int32_t* places;  // room for the block's tokens
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

uint64_t word_of(const CovInputs& inputs, const CovRule& rule, const int64_t* keys, int64_t place,
                 bool by_covariance) {
    if (!by_covariance) return ordered_word(keys[place]);
    return ordered_word(-covariance_of(inputs, place, rule));
}

// All candidates of a set of tokens: block b has its places and words from position b * kBlockTokens on. The histogram
// counts the first digits of the words.
struct CovCandidates {
    std::unique_ptr<int32_t[]> places;
    std::unique_ptr<uint64_t[]> words;
    std::vector<CovBlock> blocks;
    std::vector<uint32_t> histogram;
    int64_t count = 0;
    int64_t near = 0;

    // Not initialised: memory that holds no candidate is never touched.
    explicit CovCandidates(int64_t tokens)
        : places(new int32_t[static_cast<size_t>(tokens)]),
          words(new uint64_t[static_cast<size_t>(tokens)]),
          blocks(static_cast<size_t>((tokens + kBlockTokens - 1) / kBlockTokens)),
          histogram(kDigits) {}

    const uint64_t* words_of(int64_t block) const { return words.get() + block * kBlockTokens; }
    int64_t num_blocks() const { return static_cast<int64_t>(blocks.size()); }
};

// The three steps below are shared by the threads of the parallel region that calls them. Every step gives a thread the
// same blocks, so that what it wrote is near when it reads it again.

void find_candidates(CovCandidates& found, const CovInputs& inputs, const CovRule& rule, const int64_t* keys,
                     int64_t tokens, bool by_covariance, uint8_t* marks, const CovKernels& kernels) {
    const WordSearch start_of_search = word_search(1);
    std::vector<uint32_t> histogram(kDigits);
    int64_t candidates = 0, near = 0;
#pragma omp for schedule(static) nowait
    for (int64_t index = 0; index < found.num_blocks(); ++index) {
        const int64_t start = index * kBlockTokens, left = tokens - start;
        const int64_t size = left < kBlockTokens ? left : kBlockTokens;
        CovBlock block = {found.places.get() + start, 0, 0};
        kernels.block(inputs, start, start + size, rule, block);
        uint64_t* words = found.words.get() + start;
        for (int64_t i = 0; i < block.candidates; ++i) {
            words[i] = word_of(inputs, rule, keys, block.places[i], by_covariance);
            ++histogram[digit(start_of_search, words[i])];
        }
        std::memset(marks + start, 0, static_cast<size_t>(size));
        candidates += block.candidates;
        near += block.near;
        found.blocks[static_cast<size_t>(index)] = block;
    }
#pragma omp critical
    {
        for (int i = 0; i < kDigits; ++i) found.histogram[static_cast<size_t>(i)] += histogram[static_cast<size_t>(i)];
        found.count += candidates;
        found.near += near;
    }
#pragma omp barrier
}

// Gathers the words that `search` has left.
void gather_left(const CovCandidates& found, const WordSearch& search, std::vector<uint64_t>& left) {
    std::vector<uint64_t> own;
#pragma omp for schedule(static) nowait
    for (int64_t index = 0; index < found.num_blocks(); ++index) {
        const uint64_t* words = found.words_of(index);
        for (int64_t i = 0; i < found.blocks[static_cast<size_t>(index)].candidates; ++i) {
            if (is_left(search, words[i])) own.push_back(words[i]);
        }
    }
#pragma omp critical
    left.insert(left.end(), own.begin(), own.end());
#pragma omp barrier
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

// Marks the candidates with words up to `last`; returns how many this thread did.
int64_t mark_candidates(const CovCandidates& found, uint64_t last, uint8_t* marks) {
    int64_t marked = 0;
#pragma omp for schedule(static) nowait
    for (int64_t index = 0; index < found.num_blocks(); ++index) {
        // A copy: a byte that is written could be any part of what is read.
        const CovBlock block = found.blocks[static_cast<size_t>(index)];
        const uint64_t* words = found.words_of(index);
        for (int64_t i = 0; i < block.candidates; ++i) {
            const uint8_t mark = words[i] <= last;
            marks[block.places[i]] = mark;
            marked += mark;
        }
    }
    return marked;
}

struct CovCounts {
    int64_t candidates;
    int64_t near;
    int64_t marked;
};

// Marks the k smallest candidates in `marks` [tokens], and those whose words equal the k-th.
CovCounts choose(const CovInputs& inputs, const CovRule& rule, const int64_t* keys, int64_t tokens, bool by_covariance,
                 int64_t k, uint8_t* marks, const CovKernels& kernels, int threads) {
    CovCandidates found(tokens);
    WordSearch search = {~uint64_t{0}, 0, 0, 0, true, false};  // every word: right where there are no more than k
    std::vector<uint64_t> left;
    int64_t marked = 0;
#pragma omp parallel num_threads(threads) reduction(+ : marked) if (threads > 1 && found.num_blocks() > 1)
    {
        find_candidates(found, inputs, rule, keys, tokens, by_covariance, marks, kernels);
#pragma omp single
        if (found.count > k) search = narrowed(word_search(static_cast<uint32_t>(k)), found.histogram.data());
        if (!search.done) {
            gather_left(found, search, left);
#pragma omp single
            search.last = border(search, left);
        }
        marked += mark_candidates(found, search.last, marks);
    }
    return {found.count, found.near, marked};
}

CovRule cov_rule(double mean_advantage, double mean_log_prob, const std::array<double, 2>& bounds, double nearness,
                 const std::array<double, 2>& clip_bounds) {
    const double lb = bounds[0], ub = bounds[1];
    return {mean_advantage, mean_log_prob, lb, ub, {lb - nearness, lb + nearness}, {ub - nearness, ub + nearness},
            clip_bounds[0], clip_bounds[1]};
}

// Returns (candidates, tokens near a bound, tokens marked): more than k are marked where words equal the k-th.
std::tuple<int64_t, int64_t, int64_t> cov_choose(uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages,
                                                 uintptr_t keys, int64_t tokens, double mean_advantage,
                                                 double mean_log_prob, const std::array<double, 2>& bounds,
                                                 double nearness, const std::array<double, 2>& clip_bounds,
                                                 bool by_covariance, int64_t k, uintptr_t chosen, int threads,
                                                 const char* isa) {
    if (k < 1 || tokens > INT32_MAX) throw std::invalid_argument("k must be positive, tokens below 2^31");
    const CovInputs inputs = {pointer<const float>(log_probs), pointer<const float>(old_log_probs),
                              pointer<const float>(advantages)};
    const CovRule rule = cov_rule(mean_advantage, mean_log_prob, bounds, nearness, clip_bounds);
    const CovCounts counts = choose(inputs, rule, pointer<const int64_t>(keys), tokens, by_covariance, k,
                                    pointer<uint8_t>(chosen), kernels_for(parse_isa(isa)), threads);
    return {counts.candidates, counts.near, counts.marked};
}

// Mean of a column: rows are summed one by one, and their sums exactly. NaN where a sum is not finite.
double mean_of(const double* sums, int64_t rows, int64_t tokens) {
    ExactSum total;
    for (int64_t row = 0; row < rows; ++row) {
        if (!std::isfinite(sums[row])) return std::numeric_limits<double>::quiet_NaN();
        total.add(sums[row]);
    }
    return total.rounded() / static_cast<double>(tokens);
}

void sum_rows(const float* const* columns, int64_t num_columns, const int64_t* lengths, int64_t rows, double* sums,
              const CovKernels& kernels, int threads) {
    std::vector<int64_t> starts(static_cast<size_t>(rows + 1));
    std::partial_sum(lengths, lengths + rows, starts.begin() + 1);
    const int64_t items = rows * num_columns;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && starts.back() > kBlockTokens)
    for (int64_t item = 0; item < items; ++item) {
        const int64_t row = item % rows;
        sums[item] = kernels.sum(columns[item / rows] + starts[static_cast<size_t>(row)], lengths[row]);
    }
}

// Sums [columns, rows] of consecutive rows of every column: row r has lengths[r] values.
void row_sums(const std::vector<uintptr_t>& columns, uintptr_t lengths, int64_t rows, uintptr_t sums, int threads,
              const char* isa) {
    std::vector<const float*> values;
    for (const uintptr_t column : columns) values.push_back(pointer<const float>(column));
    sum_rows(values.data(), static_cast<int64_t>(values.size()), pointer<const int64_t>(lengths), rows,
             pointer<double>(sums), kernels_for(parse_isa(isa)), threads);
}

// A whole selection among rows that lie back to back: means, k = max(floor(ratio * tokens), 1), marks. Returns (k, mean
// advantage, mean log-prob, candidates, tokens near a bound, tokens marked).
std::tuple<int64_t, double, double, int64_t, int64_t, int64_t> cov_select(
    uintptr_t log_probs, uintptr_t old_log_probs, uintptr_t advantages, uintptr_t keys,
    const std::vector<int64_t>& lengths, double ratio, const std::array<double, 2>& bounds, double nearness,
    const std::array<double, 2>& clip_bounds, bool by_covariance, uintptr_t chosen, int threads, const char* isa) {
    const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    const int64_t rows = static_cast<int64_t>(lengths.size());
    if (!(ratio > 0) || tokens < 1 || tokens > INT32_MAX) {
        throw std::invalid_argument("the ratio must be positive, tokens from 1 to below 2^31");
    }
    const CovInputs inputs = {pointer<const float>(log_probs), pointer<const float>(old_log_probs),
                              pointer<const float>(advantages)};
    const CovKernels kernels = kernels_for(parse_isa(isa));
    const float* columns[2] = {inputs.advantages, inputs.log_probs};
    std::vector<double> sums(static_cast<size_t>(2 * rows));
    sum_rows(columns, 2, lengths.data(), rows, sums.data(), kernels, threads);
    double means[2] = {mean_of(sums.data(), rows, tokens), mean_of(sums.data() + rows, rows, tokens)};
    if (std::isnan(means[0]) || std::isnan(means[1])) means[0] = means[1] = std::numeric_limits<double>::quiet_NaN();
    const CovRule rule = cov_rule(means[0], means[1], bounds, nearness, clip_bounds);
    const int64_t k = std::max(floor_share(ratio, tokens), int64_t{1});
    const CovCounts counts = choose(inputs, rule, pointer<const int64_t>(keys), tokens, by_covariance, k,
                                    pointer<uint8_t>(chosen), kernels, threads);
    return {k, means[0], means[1], counts.candidates, counts.near, counts.marked};
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
    module.def("row_sums", &spear::row_sums, Guard(), arg("columns"), arg("lengths"), arg("rows"), arg("sums"),
               arg("threads"), arg("isa"),
               "Sums in double of rows back to back, in an order that depends on nothing but the length.");
    module.def("token_keys", &spear::token_keys, Guard(), arg("base"), arg("count"), arg("keys"),
               "Keys of the positions 0 to count - 1 of a row.");
}
