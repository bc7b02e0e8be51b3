// The parts of sampling that no instruction set can hurry.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "decoder.h"

namespace spear {

double keyed_uniform(uint64_t key, uint64_t position) {
    uint32_t counter[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = 0xD2511F53ull * counter[0], b = 0xCD9E8D57ull * counter[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(a)};
        std::memcpy(counter, next, sizeof(counter));
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const uint64_t bits = (static_cast<uint64_t>(counter[0]) << 32) | counter[1];
    return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

int32_t sample_restricted(const float* scaled, int64_t vocab, double log_sum, int32_t top_k, float top_p,
                          double uniform) {
    // Entries with probability below (1 - top_p) / vocab together weigh less than 1 - top_p, so the smallest set that
    // reaches top_p never needs them. With top_k as well, top_p acts on the renormalised k entries: keep everything.
    const bool by_count = top_k > 0 && top_k < vocab;
    const double floor =
        by_count || top_p >= 1.0f ? -INFINITY : log_sum + std::log((1.0 - top_p) / static_cast<double>(vocab));
    std::vector<int32_t> kept;
    for (int64_t i = 0; i < vocab; ++i) {
        if (scaled[i] >= floor) kept.push_back(static_cast<int32_t>(i));
    }
    const auto before = [scaled](int32_t a, int32_t b) {
        return scaled[a] > scaled[b] || (scaled[a] == scaled[b] && a < b);
    };
    if (by_count) {
        std::partial_sort(kept.begin(), kept.begin() + top_k, kept.end(), before);
        kept.resize(static_cast<size_t>(top_k));
    } else {
        std::sort(kept.begin(), kept.end(), before);
    }
    std::vector<double> cumulative;
    double total = 0;
    for (int32_t i : kept) {
        total += std::exp(static_cast<double>(scaled[i]) - log_sum);
        cumulative.push_back(total);
    }
    const double mass = by_count ? total : 1.0;
    size_t count = 1;
    while (count < kept.size() && cumulative[count - 1] < static_cast<double>(top_p) * mass) ++count;
    const double target = uniform * cumulative[count - 1];
    size_t chosen = 0;
    while (chosen + 1 < count && cumulative[chosen] <= target) ++chosen;
    return kept[chosen];
}

}  // namespace spear
