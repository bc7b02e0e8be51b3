// Keys of tokens, and the k-th smallest 64-bit word by histograms of its digits, for the host and for CUDA.
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace spear {

// Key of a position of a row: splitmix64 (Steele et al. 2014) of base + position. As in Python, keys compare as signed.
SPEAR_HOST_DEVICE inline int64_t token_key(uint64_t base, uint64_t position) {
    uint64_t word = base + position + 0x9E3779B97F4A7C15u;
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return static_cast<int64_t>(word ^ (word >> 31));
}

// Words whose unsigned order is the order of the keys.
SPEAR_HOST_DEVICE inline uint64_t ordered_word(int64_t key) { return static_cast<uint64_t>(key) ^ (uint64_t{1} << 63); }

// Words whose unsigned order is the order of the numbers (not NaN); both zeros give the same word.
SPEAR_HOST_DEVICE inline uint64_t ordered_word(double number) {
    union {
        double value;
        uint64_t bits;
    } view;
    view.value = number == 0 ? 0.0 : number;
    const uint64_t sign = uint64_t{1} << 63;
    return view.bits & sign ? ~view.bits : view.bits | sign;
}

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;  // bins of a histogram

// Where the k-th smallest word is: among those whose bits above `shift` + kDigitBits are those of `last`. Once done,
// `last` separates: words up to it are the k smallest, and any others that equal the k-th.
struct WordSearch {
    uint64_t last;
    uint64_t fixed;  // the bits known so far
    uint32_t rank;   // 1-based, among the words that are left
    int shift;
    bool done;
    bool tied;  // done, and more words equal `last` than are to be taken: `rank` of them are
};

// The search for the `k`-th smallest word, 1 <= k <= number of words.
SPEAR_HOST_DEVICE inline WordSearch word_search(uint32_t k) { return {0, 0, k, 64 - kDigitBits, false, false}; }

SPEAR_HOST_DEVICE inline bool is_left(const WordSearch& search, uint64_t word) {
    return (word & search.fixed) == search.last;
}

SPEAR_HOST_DEVICE inline uint32_t digit(const WordSearch& search, uint64_t word) {
    return static_cast<uint32_t>(word >> search.shift) & (kDigits - 1);
}

// The next step, where the k-th of the words that are left lies in `bin` with `inside` words, after `before` others.
// Digits of neighbouring steps may share bits at the low end, where 64 is no multiple of the digit: fixed ones then
// agree in all words left.
SPEAR_HOST_DEVICE inline WordSearch narrowed_to(WordSearch search, uint32_t bin, uint32_t before, uint32_t inside) {
    search.rank -= before;
    search.last |= static_cast<uint64_t>(bin) << search.shift;
    search.fixed |= static_cast<uint64_t>(kDigits - 1) << search.shift;
    search.tied = search.shift == 0 && inside != search.rank;
    search.done = search.shift == 0 || inside == search.rank;
    if (search.done) search.last |= ~search.fixed;
    search.shift = search.shift > kDigitBits ? search.shift - kDigitBits : 0;
    return search;
}

// The next step, from the histogram [kDigits] of the digits of the words that are left.
SPEAR_HOST_DEVICE inline WordSearch narrowed(const WordSearch& search, const uint32_t* histogram) {
    uint32_t bin = 0, before = 0;
    while (before + histogram[bin] < search.rank) before += histogram[bin++];
    return narrowed_to(search, bin, before, histogram[bin]);
}

// A first step over fewer bins, for words that are as likely in any of them, as keys are: threads have less to merge.
constexpr int kCoarseBits = 8;
constexpr int kCoarseBins = 1 << kCoarseBits;

inline uint32_t coarse_bin(uint64_t word) { return static_cast<uint32_t>(word >> (64 - kCoarseBits)); }

// The search for the `k`-th smallest word after that step, from the histogram [kCoarseBins] of all words.
inline WordSearch coarse_search(uint32_t k, const uint32_t* histogram) {
    uint32_t bin = 0, before = 0;
    while (before + histogram[bin] < k) before += histogram[bin++];
    const int shift = 64 - kCoarseBits;
    WordSearch search = {uint64_t{bin} << shift, ~uint64_t{0} << shift, k - before, shift - kDigitBits, false, false};
    search.done = histogram[bin] == search.rank;
    if (search.done) search.last |= ~search.fixed;
    return search;
}

// Takes a search to its end among `count` words on the host, of which some may be out already; `histogram` is scratch
// of kDigits.
inline WordSearch finished(WordSearch search, const uint64_t* words, int64_t count, uint32_t* histogram) {
    while (!search.done) {
        for (int i = 0; i < kDigits; ++i) histogram[i] = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (is_left(search, words[i])) ++histogram[digit(search, words[i])];
        }
        search = narrowed(search, histogram);
    }
    return search;
}

}  // namespace spear
