// Data of the CPU decoder (Qwen2 / Qwen3, float32), shared by its kernels and its driver.
//
// Every number of a row (one token of one sequence) is computed by a chain of operations whose order depends on that
// row's own length only: never on how many other rows are in the call, on the thread that runs it, on the chunking of a
// prompt or on the page in which a key happens to lie. Results are therefore batch invariant by construction.
#pragma once

#include <cstdint>

namespace spear {

constexpr int64_t kPanel = 64;        // output columns of one packed weight panel, laid out [depth][kPanel]
constexpr int64_t kPage = 16;         // positions of one page of the key/value cache
constexpr int64_t kDepthBlock = 512;  // longest chain of a dot product; blocks are added in order
constexpr int64_t kRowChunk = 96;     // rows that one task takes through a panel
constexpr int64_t kSumChunk = 256;    // vocabulary entries of one partial sum of the sampler

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct DecoderShape {
    int64_t hidden, layers, heads, kv_heads, head_dim, intermediate, vocab;
    bool qkv_bias, qk_norm;
    float norm_eps;

    int64_t q_width() const { return heads * head_dim; }
    int64_t kv_width() const { return kv_heads * head_dim; }
    int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
    int64_t value_width() const { return round_up(head_dim, kPage); }
};

// Matrices are packed into panels; vectors are padded with zeros to a multiple of kPanel.
struct LayerWeights {
    float *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *output, *post_norm, *gate_up, *down;
};

struct DecoderWeights {
    float *embedding, *final_norm, *head;
    LayerWeights* layers;
};

// One page holds, for one layer and one key/value head, keys as [head_dim][kPage] and values as [kPage][value_width].
struct KeyValueCache {
    float *keys, *values;
    int64_t num_pages;
};

struct DecoderWorkspace {
    float *residual, *normed, *qkv, *attention, *activation, *logits;  // [rows][width rounded up to kPanel]
    float* scratch;                                                    // per thread
    double* partial_sums;                                              // per thread
    int64_t scratch_stride, partial_sums_stride, score_stride;
};

// What one forward pass is asked for. Row r is token ids[r] of slot slots[r] at positions[r].
struct DecoderBatch {
    int64_t num_rows, num_outputs, pages_per_slot;
    const int32_t *ids, *slots, *positions, *block_table;  // block_table: [slots][pages_per_slot]
    const int32_t* output_rows;                            // rows whose next token is sampled
    const float *temperature, *top_p;                      // [num_outputs]
    const int32_t* top_k;
    const uint64_t* noise_key;
    int32_t* tokens;   // out: sampled token, -1 where the logits are not finite
    float* log_probs;  // out
};

struct DecoderCall {
    DecoderShape shape;
    DecoderWeights weights;
    KeyValueCache cache;
    DecoderWorkspace work;
    DecoderBatch batch;
    const float *rope_cos, *rope_sin;  // [max_model_len][head_dim / 2]
};

struct SampledToken {
    int32_t token;
    float log_prob;
};

// Uniform in [0, 1) with 53 bits: Philox4x32-10 (Salmon et al. 2011) of (key, position).
double keyed_uniform(uint64_t key, uint64_t position);

// Draws from the distribution of logits[vocab] / temperature restricted to top_k and top_p, by its inverse CDF at
// `uniform`, most probable token first.
int32_t sample_restricted(const float* scaled, int64_t vocab, double log_sum, int32_t top_k, float top_p,
                          double uniform);

}  // namespace spear
