// Row arithmetic of the decoder: exp, RMSNorm, packed matrix products. Included once per instruction set.

// Every horizontal sum runs over 16 lanes whatever the width of a vector, so all instruction sets add in one order.
constexpr int64_t kParts = kPage / kWidth;
constexpr int64_t kTileRows = SPEAR_WIDTH == 4 ? 4 : 6;
constexpr int64_t kTileVectors = SPEAR_WIDTH == 16 ? 4 : 2;

SPEAR_INLINE Float load_first(const float* source, int64_t count) {
    float lanes[kWidth] = {};
    __builtin_memcpy(lanes, source, sizeof(float) * (count < kWidth ? count : kWidth));
    return load(lanes);
}

SPEAR_INLINE void store_first(float* target, Float value, int64_t count) {
    __builtin_memcpy(target, &value, sizeof(float) * (count < kWidth ? count : kWidth));
}

SPEAR_INLINE Int lane_index() {
    Int index;
    for (int64_t lane = 0; lane < kWidth; ++lane) index[lane] = static_cast<int32_t>(lane);
    return index;
}

SPEAR_INLINE Float select(Int mask, Float yes, Float no) { return (Float)((mask & (Int)yes) | (~mask & (Int)no)); }

// exp(x), relative error below 2e-7 (Cephes expf); exactly 0 below -87, saturates above 88.
SPEAR_INLINE Float exp_lanes(Float x) {
    const Int tiny = x < broadcast(-87.0f);
    const Float high = broadcast(88.0f), low = broadcast(-87.0f), magic = broadcast(12582912.0f);
    x = select(x > high, high, x);
    x = select(tiny, low, x);
    const Float shifted = x * 1.44269504f + magic;
    const Float n = shifted - magic;
    Float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Float p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Float scale = (Float)(((Int)shifted + 127) << 23);
    return select(tiny, Float{}, p * scale);
}

SPEAR_INLINE float sum_parts(const Float* parts) {
    float lanes[kPage], sum = 0;
    for (int64_t p = 0; p < kParts; ++p) store(lanes + p * kWidth, parts[p]);
    for (int64_t lane = 0; lane < kPage; ++lane) sum += lanes[lane];
    return sum;
}

SPEAR_INLINE float sum_of_squares(const float* x, int64_t count) {
    Float parts[kParts] = {};
    for (int64_t i = 0; i < count; i += kPage) {
        for (int64_t p = 0; p < kParts; ++p) {
            const int64_t left = count - i - p * kWidth;
            const Float v =
                left >= kWidth ? load(x + i + p * kWidth) : load_first(x + i + p * kWidth, left > 0 ? left : 0);
            parts[p] += v * v;
        }
    }
    return sum_parts(parts);
}

// y = x / sqrt(mean(x^2) + eps) * weight; x and y may be the same.
static void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* y) {
    const float inverse = 1.0f / __builtin_sqrtf(sum_of_squares(x, count) / static_cast<float>(count) + eps);
    for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t left = count - i;
        if (left >= kWidth) {
            store(y + i, load(x + i) * inverse * load(weight + i));
        } else {
            store_first(y + i, load_first(x + i, left) * inverse * load_first(weight + i, left), left);
        }
    }
}

// One tile: R rows of a (row stride lda) times `depth` rows of a panel. c = product, or c += product.
template <int64_t R>
SPEAR_INLINE void tile_product(const float* a, int64_t lda, const float* panel, int64_t depth, float* c, int64_t ldc,
                               bool add) {
    for (int64_t column = 0; column < kPanel; column += kTileVectors * kWidth) {
        Float sum[R][kTileVectors] = {};
        const float* b = panel + column;
#pragma GCC unroll 4
        for (int64_t k = 0; k < depth; ++k, b += kPanel) {
            Float weights[kTileVectors];
            for (int64_t v = 0; v < kTileVectors; ++v) weights[v] = load(b + v * kWidth);
            for (int64_t r = 0; r < R; ++r) {
                const Float x = broadcast(a[r * lda + k]);
                for (int64_t v = 0; v < kTileVectors; ++v) sum[r][v] = x * weights[v] + sum[r][v];
            }
        }
        for (int64_t r = 0; r < R; ++r) {
            for (int64_t v = 0; v < kTileVectors; ++v) {
                float* target = c + r * ldc + column + v * kWidth;
                store(target, add ? load(target) + sum[r][v] : sum[r][v]);
            }
        }
    }
}

// c[rows][kPanel] (=|+=) a[rows][depth] @ panel, in tiles of nearly equal height.
static void panel_product(const float* a, int64_t lda, const float* panel, int64_t depth, float* c, int64_t ldc,
                          int64_t rows, bool add) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
        const int64_t block = depth - k < kDepthBlock ? depth - k : kDepthBlock;
        const bool adds = add || k > 0;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = rows * t / tiles, height = rows * (t + 1) / tiles - first;
            const float* x = a + first * lda + k;
            const float* w = panel + k * kPanel;
            float* y = c + first * ldc;
            switch (height) {
                case 1: tile_product<1>(x, lda, w, block, y, ldc, adds); break;
                case 2: tile_product<2>(x, lda, w, block, y, ldc, adds); break;
                case 3: tile_product<3>(x, lda, w, block, y, ldc, adds); break;
                case 4: tile_product<4>(x, lda, w, block, y, ldc, adds); break;
#if SPEAR_WIDTH > 4
                case 5: tile_product<5>(x, lda, w, block, y, ldc, adds); break;
                case 6: tile_product<6>(x, lda, w, block, y, ldc, adds); break;
#endif
                default: __builtin_unreachable();
            }
        }
    }
}

struct Team {
    int64_t thread, size;
};

// Calls task(panel, first_row, num_rows) for this thread's share of a product of `rows` rows.
template <typename Task>
SPEAR_INLINE void for_each_panel(const Team& team, int64_t rows, int64_t columns, Task task) {
    const int64_t panels = (columns + kPanel - 1) / kPanel;
    int64_t parts = (rows + kRowChunk - 1) / kRowChunk;
    if (panels < 4 * team.size) {
        const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
        const int64_t shares = tiles < team.size ? tiles : team.size;
        parts = parts > shares ? parts : shares;
    }
    const int64_t tasks = panels * parts;
    for (int64_t t = tasks * team.thread / team.size; t < tasks * (team.thread + 1) / team.size; ++t) {
        const int64_t first = rows * (t % parts) / parts;
        task(t / parts, first, rows * (t % parts + 1) / parts - first);
    }
}

// c[rows][columns] (=|+=) a[rows][depth] @ weights, with row strides lda and ldc (ldc a multiple of kPanel).
SPEAR_INLINE void product(const Team& team, const float* a, int64_t lda, const float* weights, int64_t depth,
                          int64_t columns, float* c, int64_t ldc, int64_t rows, bool add) {
    for_each_panel(team, rows, columns,
                   [&](int64_t panel, int64_t first, int64_t count) __attribute__((always_inline)) {
                       panel_product(a + first * lda, lda, weights + panel * depth * kPanel, depth,
                                     c + first * ldc + panel * kPanel, ldc, count, add);
                   });
}

// activation[rows][intermediate] = silu(gate) * up; a panel holds kPanel / 2 gate columns, then their up columns.
SPEAR_INLINE void gated_product(const Team& team, const float* a, int64_t lda, const float* weights, int64_t depth,
                                int64_t intermediate, float* activation, int64_t ld, int64_t rows, float* scratch) {
    constexpr int64_t half = kPanel / 2;
    for_each_panel(
        team, rows, round_up(intermediate, half) * 2,
        [&](int64_t panel, int64_t first, int64_t count) __attribute__((always_inline)) {
            panel_product(a + first * lda, lda, weights + panel * depth * kPanel, depth, scratch, kPanel, count, false);
            for (int64_t r = 0; r < count; ++r) {
                for (int64_t i = 0; i < half; i += kWidth) {
                    const Float gate = load(scratch + r * kPanel + i), up = load(scratch + r * kPanel + half + i);
                    store(activation + (first + r) * ld + panel * half + i, gate / (1.0f + exp_lanes(-gate)) * up);
                }
            }
        });
}
