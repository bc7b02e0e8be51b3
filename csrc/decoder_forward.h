// The decoder's forward pass as run by every thread of a team. Included once per instruction set.

#include "decoder_math.h"
#include "decoder_attention.h"
#include "decoder_sampling.h"

static void norm_rows(const Team& team, const DecoderCall& call, const float* weight) {
    const int64_t hidden = call.shape.hidden, width = round_up(hidden, kPanel);
    for (int64_t row = team.thread; row < call.batch.num_rows; row += team.size) {
        rms_norm(call.work.residual + row * width, weight, hidden, call.shape.norm_eps, call.work.normed + row * width);
    }
#pragma omp barrier
}

static void forward_layer(const Team& team, const DecoderCall& call, int64_t layer, float* scratch) {
    const DecoderShape& s = call.shape;
    const LayerWeights& w = call.weights.layers[layer];
    const int64_t rows = call.batch.num_rows, hidden = round_up(s.hidden, kPanel),
                  q_width = round_up(s.q_width(), kPanel);
    const int64_t qkv_width = round_up(s.qkv_width(), kPanel), inner = round_up(s.intermediate, kPanel);
    norm_rows(team, call, w.input_norm);
    product(team, call.work.normed, hidden, w.qkv, s.hidden, s.qkv_width(), call.work.qkv, qkv_width, rows, false);
#pragma omp barrier
    for (int64_t row = team.thread; row < rows; row += team.size) place_row(call, layer, row);
#pragma omp barrier
    for (int64_t item = team.thread; item < rows * s.kv_heads; item += team.size) {
        attend_heads(call, layer, item / s.kv_heads, item % s.kv_heads, scratch);
    }
#pragma omp barrier
    product(team, call.work.attention, q_width, w.output, s.q_width(), s.hidden, call.work.residual, hidden, rows,
            true);
#pragma omp barrier
    norm_rows(team, call, w.post_norm);
    gated_product(team, call.work.normed, hidden, w.gate_up, s.hidden, s.intermediate, call.work.activation, inner,
                  rows, scratch);
#pragma omp barrier
    product(team, call.work.activation, inner, w.down, s.intermediate, s.hidden, call.work.residual, hidden, rows,
            true);
#pragma omp barrier
}

void decoder_forward(const DecoderCall& call, int64_t thread, int64_t threads) {
    const Team team{thread, threads};
    const DecoderShape& s = call.shape;
    const DecoderBatch& batch = call.batch;
    const int64_t hidden = round_up(s.hidden, kPanel), vocab = round_up(s.vocab, kPanel);
    float* scratch = call.work.scratch + thread * call.work.scratch_stride;
    for (int64_t row = thread; row < batch.num_rows; row += threads) {
        __builtin_memcpy(call.work.residual + row * hidden, call.weights.embedding + batch.ids[row] * hidden,
                         sizeof(float) * hidden);
    }
#pragma omp barrier
    for (int64_t layer = 0; layer < s.layers; ++layer) forward_layer(team, call, layer, scratch);
    for (int64_t i = thread; i < batch.num_outputs; i += threads) {
        rms_norm(call.work.residual + batch.output_rows[i] * hidden, call.weights.final_norm, s.hidden, s.norm_eps,
                 call.work.normed + i * hidden);
    }
#pragma omp barrier
    product(team, call.work.normed, hidden, call.weights.head, s.hidden, s.vocab, call.work.logits, vocab,
            batch.num_outputs, false);
#pragma omp barrier
    double* partial_sums = call.work.partial_sums + thread * call.work.partial_sums_stride;
    for (int64_t i = thread; i < batch.num_outputs; i += threads) {
        const uint64_t position = static_cast<uint64_t>(batch.positions[batch.output_rows[i]]) + 1;
        const SampledToken sampled =
            sample_row(call.work.logits + i * vocab, s.vocab, batch.temperature[i], batch.top_k[i], batch.top_p[i],
                       batch.noise_key[i], position, partial_sums);
        batch.tokens[i] = sampled.token;
        batch.log_probs[i] = sampled.log_prob;
    }
}
