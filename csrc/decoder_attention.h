// Rotary embedding, cache writes and paged attention of the decoder. Included once per instruction set.

constexpr int64_t kHeadTile = SPEAR_WIDTH == 4 ? 2 : 4;   // query heads that share the keys they load
constexpr int64_t kPageTile = SPEAR_WIDTH == 16 ? 4 : 1;  // pages whose scores are summed side by side
constexpr int64_t kValueTile = SPEAR_WIDTH == 16 ? 4 : kParts;

SPEAR_INLINE void rotate(float* x, const float* cos, const float* sin, int64_t half, float scale) {
    for (int64_t i = 0; i < half; i += kWidth) {
        const int64_t left = half - i;
        const Float a = load_first(x + i, left), b = load_first(x + half + i, left);
        const Float c = load_first(cos + i, left), s = load_first(sin + i, left);
        store_first(x + i, (a * c - b * s) * scale, left);
        store_first(x + half + i, (b * c + a * s) * scale, left);
    }
}

SPEAR_INLINE void add_bias(float* x, const float* bias, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) store(x + i, load(x + i) + load(bias + i));
}

// Bias, q/k norm and rope of one row, in place in its qkv; queries take 1/sqrt(head_dim); k and v go to the cache.
static void place_row(const DecoderCall& call, int64_t layer, int64_t row) {
    const DecoderShape& s = call.shape;
    const LayerWeights& w = call.weights.layers[layer];
    const int64_t width = round_up(s.qkv_width(), kPanel), half = s.head_dim / 2, position = call.batch.positions[row];
    const float *cos = call.rope_cos + position * half, *sin = call.rope_sin + position * half;
    float* q = call.work.qkv + row * width;
    float *k = q + s.q_width(), *v = k + s.kv_width();
    if (s.qkv_bias) add_bias(q, w.qkv_bias, width);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(s.head_dim));
    for (int64_t h = 0; h < s.heads; ++h) {
        if (s.qk_norm) rms_norm(q + h * s.head_dim, w.q_norm, s.head_dim, s.norm_eps, q + h * s.head_dim);
        rotate(q + h * s.head_dim, cos, sin, half, scale);
    }
    const int32_t* table = call.batch.block_table + call.batch.slots[row] * call.batch.pages_per_slot;
    const int64_t page = (layer * call.cache.num_pages + table[position / kPage]) * s.kv_heads, lane = position % kPage;
    for (int64_t h = 0; h < s.kv_heads; ++h) {
        float* key = k + h * s.head_dim;
        if (s.qk_norm) rms_norm(key, w.k_norm, s.head_dim, s.norm_eps, key);
        rotate(key, cos, sin, half, 1.0f);
        float* keys = call.cache.keys + (page + h) * s.head_dim * kPage + lane;
        for (int64_t d = 0; d < s.head_dim; ++d) keys[d * kPage] = key[d];
        float* values = call.cache.values + ((page + h) * kPage + lane) * s.value_width();
        for (int64_t d = 0; d < s.value_width(); ++d) values[d] = d < s.head_dim ? v[h * s.head_dim + d] : 0.0f;
    }
}

// Scores of G query heads with the kPage * P positions of P pages.
template <int64_t G, int64_t P>
SPEAR_INLINE void score_pages(const float* q, int64_t head_dim, const float* const* pages, float* scores,
                              int64_t stride) {
    Float sum[G][P * kParts] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
        Float keys[P * kParts];
        for (int64_t p = 0; p < P * kParts; ++p) keys[p] = load(pages[p / kParts] + d * kPage + p % kParts * kWidth);
        for (int64_t g = 0; g < G; ++g) {
            const Float x = broadcast(q[g * head_dim + d]);
            for (int64_t p = 0; p < P * kParts; ++p) sum[g][p] = x * keys[p] + sum[g][p];
        }
    }
    for (int64_t g = 0; g < G; ++g) {
        for (int64_t p = 0; p < P * kParts; ++p) store(scores + g * stride + p * kWidth, sum[g][p]);
    }
}

// scores[0..length) -> exp(score - max), zero up to the end of the page; returns 1 / sum.
SPEAR_INLINE float softmax_in_place(float* scores, int64_t length) {
    const Float lowest = broadcast(-__builtin_inff());
    const Int lane = lane_index();
    const int64_t end = round_up(length, kPage);
    Float best = lowest;
    for (int64_t i = 0; i < end; i += kWidth) {
        const Int inside = lane < static_cast<int32_t>(length - i);
        const Float score = select(inside, load(scores + i), lowest);
        store(scores + i, score);
        best = select(score > best, score, best);
    }
    const float top = max_lanes(best);
    Float sum[kParts] = {};
    for (int64_t i = 0; i < end; i += kPage) {
        for (int64_t p = 0; p < kParts; ++p) {
            const Float weight = exp_lanes(load(scores + i + p * kWidth) - top);
            store(scores + i + p * kWidth, weight);
            sum[p] += weight;
        }
    }
    return 1.0f / sum_parts(sum);
}

// out[G][V vectors] = sum over positions of weight * value, in the order of the positions.
template <int64_t G, int64_t V>
SPEAR_INLINE void weigh_values(const float* weights, int64_t stride, int64_t length, const float* base,
                               const int32_t* table, int64_t page_stride, int64_t value_width, const float* inverse,
                               float* out, int64_t out_stride, int64_t left) {
    Float sum[G][V] = {};
    for (int64_t position = 0; position < length; ++position) {
        const float* value = base + table[position / kPage] * page_stride + position % kPage * value_width;
        Float values[V];
        for (int64_t v = 0; v < V; ++v) values[v] = load(value + v * kWidth);
        for (int64_t g = 0; g < G; ++g) {
            const Float p = broadcast(weights[g * stride + position]);
            for (int64_t v = 0; v < V; ++v) sum[g][v] = p * values[v] + sum[g][v];
        }
    }
    for (int64_t g = 0; g < G; ++g) {
        for (int64_t v = 0; v < V; ++v) {
            if (left > v * kWidth)
                store_first(out + g * out_stride + v * kWidth, sum[g][v] * inverse[g], left - v * kWidth);
        }
    }
}

// Attention of one row for G query heads, from `head` on, that share one key/value head.
template <int64_t G>
static void attend(const DecoderCall& call, int64_t layer, int64_t row, int64_t head, float* scores) {
    const DecoderShape& s = call.shape;
    const int64_t length = call.batch.positions[row] + 1, stride = call.work.score_stride;
    const int64_t kv_head = head / (s.heads / s.kv_heads), first = layer * call.cache.num_pages * s.kv_heads + kv_head;
    const int32_t* table = call.batch.block_table + call.batch.slots[row] * call.batch.pages_per_slot;
    const float* q = call.work.qkv + row * round_up(s.qkv_width(), kPanel) + head * s.head_dim;
    const int64_t key_page = s.head_dim * kPage, pages = (length + kPage - 1) / kPage;
    const float* keys = call.cache.keys + first * key_page;
    int64_t page = 0;
    for (; page + kPageTile <= pages; page += kPageTile) {
        const float* tile[kPageTile];
        for (int64_t p = 0; p < kPageTile; ++p) tile[p] = keys + table[page + p] * s.kv_heads * key_page;
        score_pages<G, kPageTile>(q, s.head_dim, tile, scores + page * kPage, stride);
    }
    for (; page < pages; ++page) {
        const float* single = keys + table[page] * s.kv_heads * key_page;
        score_pages<G, 1>(q, s.head_dim, &single, scores + page * kPage, stride);
    }
    float inverse[G];
    for (int64_t g = 0; g < G; ++g) inverse[g] = softmax_in_place(scores + g * stride, length);
    const int64_t width = s.value_width(), value_page = kPage * width, page_stride = s.kv_heads * value_page;
    const float* values = call.cache.values + first * value_page;
    float* out = call.work.attention + row * round_up(s.q_width(), kPanel) + head * s.head_dim;
    int64_t d = 0;
    for (; d + kValueTile * kWidth <= width; d += kValueTile * kWidth) {
        weigh_values<G, kValueTile>(scores, stride, length, values + d, table, page_stride, width, inverse, out + d,
                                    s.head_dim, s.head_dim - d);
    }
    for (; d + 2 * kPage <= width; d += 2 * kPage) {
        weigh_values<G, 2 * kParts>(scores, stride, length, values + d, table, page_stride, width, inverse, out + d,
                                    s.head_dim, s.head_dim - d);
    }
    for (; d < width; d += kPage) {
        weigh_values<G, kParts>(scores, stride, length, values + d, table, page_stride, width, inverse, out + d,
                                s.head_dim, s.head_dim - d);
    }
}

static void attend_heads(const DecoderCall& call, int64_t layer, int64_t row, int64_t kv_head, float* scores) {
    const int64_t group = call.shape.heads / call.shape.kv_heads;
    for (int64_t g = 0; g < group;) {
        const int64_t head = kv_head * group + g, count = group - g < kHeadTile ? group - g : kHeadTile;
        switch (count) {
            case 1: attend<1>(call, layer, row, head, scores); break;
            case 2: attend<2>(call, layer, row, head, scores); break;
#if SPEAR_WIDTH > 4
            case 3: attend<3>(call, layer, row, head, scores); break;
            case 4: attend<4>(call, layer, row, head, scores); break;
#endif
            default: __builtin_unreachable();
        }
        g += count;
    }
}
