// Decoder layers for a few rows: what stands between two attentions, in one pass over the weights as they lie, and
// attention over keys and values where they lie.
//
// Built once for each type of weights: NUMBER_BF16 is 1 for bfloat16, 0 for float32. Numbers of that type are
// rounded where the model's own modules round them: the output of a product, of a norm, of an activation, and
// the residual stream. Sums are float32.
//
// Shapes: N rows, W hidden width, H query heads, G key-value heads, D head width, I inner width of the MLP.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if NUMBER_BF16
typedef uint16_t number;
#else
typedef float number;
#endif

#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 6  // with TILE_OUT weights each, as many sums as registers hold
#elif defined(__AVX2__)
#define LANES 8
#define TILE_ROWS 2
#else
#define LANES 4
#define TILE_ROWS 4
#endif
#define TILE_OUT 4
#define AHEAD 4096  // bytes
#define PANEL (8 * TILE_ROWS)  // rows that meet a strip of weights while it is near

#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

typedef struct {
    const number *q, *k, *v, *o, *gate, *up, *down;                                // (out, in), rows one after another
    const number *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;  // NULL: none
    const number *norm_in, *norm_q, *norm_k, *norm_attention, *norm_mlp_in, *norm_mlp;  // NULL: none
} layer;

// x -> up(down(x)) for projections of the same rows, whose outputs stand side by side.
typedef struct {
    const number *down;  // (parts * rank, in)
    const number *up;    // (rank, out): transposed
} low_rank;

typedef struct {
    low_rank qkv, o, gate_up, down;
} updates;

// The rows of each text that get updates, those from `first` on. Spaces hold max(W, H * D, I) numbers and 3 * `rank`
// floats for each row.
typedef struct {
    int64_t first, rank;
    number *narrow_space;
    float *wide_space;
} updated_rows;

typedef struct {
    int64_t width, heads, key_heads, head_width, inner;
    int64_t norm_adds_one;  // a norm multiplies by 1 + weight, and rounds once
    int64_t activation;     // 0: silu, 1: gelu by tanh
    float epsilon;
    const number *norm_last;
} model;

INLINE float wide(number x) {
#if NUMBER_BF16
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
#else
    return x;
#endif
}

INLINE number narrow(float x) {
#if NUMBER_BF16
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    return (number)(x != x ? 0x7fc0 : rounded);
#else
    return x;
#endif
}

INLINE float rounded(float x) { return wide(narrow(x)); }

// ---- products ----

#if NUMBER_BF16 && defined(__AVX512BF16__)
#define STEP 32
typedef __m512bh some;
INLINE some load(const number *at) { return (some)_mm512_loadu_si512(at); }
INLINE floats dot(floats sum, some a, some b) { return (floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
#elif NUMBER_BF16
#define STEP (2 * LANES)
typedef words some;
INLINE some load(const number *at) {
    some value;
    memcpy(&value, at, sizeof value);
    return value;
}
INLINE floats dot(floats sum, some a, some b) {  // even numbers lie in the lower halves of words
    sum += (floats)(a << 16) * (floats)(b << 16);
    return sum + (floats)(a & 0xffff0000u) * (floats)(b & 0xffff0000u);
}
#else
#define STEP LANES
typedef floats some;
INLINE some load(const number *at) {
    some value;
    memcpy(&value, at, sizeof value);
    return value;
}
INLINE floats dot(floats sum, some a, some b) { return sum + a * b; }
#endif

// The sums of four vectors each, in their order.
INLINE void totals(floats a, floats b, floats c, floats d, float *out) {
#if defined(__AVX512F__)
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    const floats each[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += each[i][lane];
        out[i] = sum;
    }
#endif
}

// Sums of R rows with TILE_OUT weights, all of `width` numbers: out[r * stride + o]. What comes next is asked
// for ahead: weights of few numbers end before the processor sees where a run of them leads.
#define TILE(R)                                                                                                \
    static void tile_##R(const number *x, const number *w, int64_t width, float *out, int64_t stride) {        \
        floats sums[R][TILE_OUT];                                                                              \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)                                                    \
            _Pragma("GCC unroll 4") for (int o = 0; o < TILE_OUT; o++) sums[r][o] = (floats){0};               \
        int64_t at = 0;                                                                                        \
        for (; at + STEP <= width; at += STEP) {                                                               \
            some weights[TILE_OUT];                                                                            \
            _Pragma("GCC unroll 4") for (int o = 0; o < TILE_OUT; o++) {                                       \
                weights[o] = load(w + o * width + at);                                                         \
                __builtin_prefetch(w + (TILE_OUT + o) * width + at, 0, 3);                             \
            }                                                                                                  \
            _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                              \
                some row = load(x + r * width + at);                                                           \
                _Pragma("GCC unroll 4") for (int o = 0; o < TILE_OUT; o++)                                     \
                    sums[r][o] = dot(sums[r][o], weights[o], row);                                             \
            }                                                                                                  \
        }                                                                                                      \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)                                                    \
            totals(sums[r][0], sums[r][1], sums[r][2], sums[r][3], out + r * stride);                          \
        for (; at < width; at++)                                                                               \
            for (int r = 0; r < R; r++)                                                                        \
                for (int o = 0; o < TILE_OUT; o++)                                                             \
                    out[r * stride + o] += wide(x[r * width + at]) * wide(w[o * width + at]);                  \
    }
TILE(2)
#if TILE_ROWS > 2
TILE(3) TILE(4)
#endif
#if TILE_ROWS > 4
TILE(5) TILE(6)
#endif

// One row meets each weight once, so the weights are best read as they lie.
static void tile_1(const number *x, const number *w, int64_t width, float *out, int64_t stride) {
    (void)stride;
    floats sums[TILE_OUT];
    int64_t whole = width - width % STEP;
    _Pragma("GCC unroll 4") for (int o = 0; o < TILE_OUT; o++) {
        const number *weight = w + o * width;
        floats even = {0}, odd = {0};
        int64_t at = 0;
        for (; at + 2 * STEP <= width; at += 2 * STEP) {
            __builtin_prefetch((const char *)(weight + at) + AHEAD, 0, 3);
            even = dot(even, load(weight + at), load(x + at));
            __builtin_prefetch((const char *)(weight + at + STEP) + AHEAD, 0, 3);
            odd = dot(odd, load(weight + at + STEP), load(x + at + STEP));
        }
        if (at < whole) even = dot(even, load(weight + at), load(x + at));
        sums[o] = even + odd;
    }
    totals(sums[0], sums[1], sums[2], sums[3], out);
    for (int64_t at = whole; at < width; at++)
        for (int o = 0; o < TILE_OUT; o++) out[o] += wide(x[at]) * wide(w[o * width + at]);
}

INLINE void tile(int64_t rows, const number *x, const number *w, int64_t width, float *out, int64_t stride) {
    switch (rows) {
        case 1: tile_1(x, w, width, out, stride); break;
        case 2: tile_2(x, w, width, out, stride); break;
#if TILE_ROWS > 2
        case 3: tile_3(x, w, width, out, stride); break;
        case 4: tile_4(x, w, width, out, stride); break;
#endif
#if TILE_ROWS > 4
        case 5: tile_5(x, w, width, out, stride); break;
        case 6: tile_6(x, w, width, out, stride); break;
#endif
    }
}

typedef struct {
    const number *weight, *bias;
    int64_t size;
} product;

// Sums of one product for outputs first.., TILE_OUT of them or fewer, and all rows.
static void block(product p, int64_t first, const number *x, int64_t rows, int64_t width, float *out,
                  int64_t stride) {
    const number *w = p.weight + first * width;
    if (p.size - first >= TILE_OUT) {
        int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        for (int64_t index = 0; index < tiles; index++) {  // of as equal sizes as may be
            int64_t row = index * rows / tiles, end = (index + 1) * rows / tiles;
            tile(end - row, x + row * width, w, width, out + row * stride + first, stride);
        }
        return;
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t o = 0; o < p.size - first; o++) {
            float sum = 0;
            for (int64_t at = 0; at < width; at++) sum += wide(x[row * width + at]) * wide(w[o * width + at]);
            out[row * stride + first + o] = sum;
        }
}

// A row's sums of a product become its outputs first..end - 1.
INLINE void finish(const number *bias, int64_t first, int64_t end, float *row) {
    if (bias)
        for (int64_t o = first; o < end; o++) row[o] += wide(bias[o]);
    for (int64_t o = first; o < end; o++) row[o] = rounded(row[o]);
}

#include "amx.h"

// Products of the same rows (N, width), side by side: out (N, stride).
static void products(const product *parts, int num_parts, const number *x, int64_t rows, int64_t width, float *out,
                     int64_t stride, int threads) {
    int64_t strips = 0, panels = (rows + PANEL - 1) / PANEL, starts[4];
    for (int part = 0; part < num_parts; part++) {
        starts[part] = strips;
        strips += (parts[part].size + STRIP - 1) / STRIP;
    }
    number *pairs = matrix_rows(x, rows, width);
#pragma omp parallel num_threads(threads) if (threads > 1 && strips * STRIP * width > 1 << 15)
    {
        if (pairs) matrix_begin();
#pragma omp for schedule(static)
        for (int64_t index = 0; index < strips; index++) {
            int part = num_parts - 1;
            while (starts[part] > index) part--;
            float *to = out;
            for (int before = 0; before < part; before++) to += parts[before].size;
            product p = parts[part];
            int64_t first = (index - starts[part]) * STRIP, end = first + STRIP < p.size ? first + STRIP : p.size;
            if (pairs && end - first == STRIP)
                matrix_strip(p.weight + first * width, pairs, rows, width, to + first, stride);
            else
                for (int64_t panel = 0; panel < panels; panel++) {
                    int64_t row = panel * rows / panels, count = (panel + 1) * rows / panels - row;
                    for (int64_t o = first; o < end; o += TILE_OUT)
                        block(p, o, x + row * width, count, width, to + row * stride, stride);
                }
            for (int64_t n = 0; n < rows; n++) finish(p.bias, first, end, to + n * stride);
        }
        if (pairs) matrix_end();
    }
    free(pairs);
}

// ---- sums of rows by weights ----

INLINE floats load_wide(const number *at) {
#if NUMBER_BF16
    typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
    halves bits;
    memcpy(&bits, at, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
#else
    floats value;
    memcpy(&value, at, sizeof value);
    return value;
#endif
}

#define MIX_SOME(R, C)                                                                                          \
    for (; at + C * LANES <= d; at += C * LANES) {                                                              \
        floats sums[R][C];                                                                                      \
        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++)                                                     \
            _Pragma("GCC unroll 4") for (int c = 0; c < C; c++) sums[r][c] = (floats){0};                       \
        for (int64_t s = first; s < end; s++) {                                                                 \
            floats value[C];                                                                                    \
            _Pragma("GCC unroll 4") for (int c = 0; c < C; c++)                                                 \
                value[c] = load_wide(values + s * apart + at + c * LANES);                                      \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++)                                                 \
                _Pragma("GCC unroll 4") for (int c = 0; c < C; c++)                                             \
                    sums[r][c] += weights[r * stride + s] * value[c];                                           \
        }                                                                                                       \
        for (int r = 0; r < R; r++) memcpy(out + r * out_apart + at, sums[r], sizeof sums[r]);                  \
    }
#define MIX(R)                                                                                                  \
    static void mix_##R(const float *weights, int64_t stride, const number *values, int64_t apart, int64_t d,   \
                        int64_t first, int64_t end, float *out, int64_t out_apart) {                            \
        int64_t at = 0;                                                                                         \
        MIX_SOME(R, 4)                                                                                          \
        MIX_SOME(R, 2)                                                                                          \
        MIX_SOME(R, 1)                                                                                          \
        for (; at < d; at++)                                                                                    \
            for (int r = 0; r < R; r++) {                                                                       \
                float sum = 0;                                                                                  \
                for (int64_t s = first; s < end; s++) sum += weights[r * stride + s] * wide(values[s * apart + at]); \
                out[r * out_apart + at] = sum;                                                                  \
            }                                                                                                   \
    }
MIX(1) MIX(2) MIX(3) MIX(4)

// Sums of values (S, D) by the weights (N, S) of each row, for s of first..end-1: out (N, D). Rows of weights, values
// and sums lie `stride`, `apart` and `out_apart` numbers apart.
static void mix(int64_t rows, const float *weights, int64_t stride, const number *values, int64_t apart, int64_t d,
                int64_t first, int64_t end, float *out, int64_t out_apart) {
    for (; rows >= 4; rows -= 4, weights += 4 * stride, out += 4 * out_apart)
        mix_4(weights, stride, values, apart, d, first, end, out, out_apart);
    switch (rows) {
        case 3: mix_3(weights, stride, values, apart, d, first, end, out, out_apart); break;
        case 2: mix_2(weights, stride, values, apart, d, first, end, out, out_apart); break;
        case 1: mix_1(weights, stride, values, apart, d, first, end, out, out_apart); break;
    }
}

// ---- low-rank updates ----

#define UPDATE_ROWS 4
#define UPDATE_WIDTH 256

// out (N, stride) += up(down(x)) for some rows of each text; `parts` are those of the products that gave `out`.
static void add_updates(const updated_rows *u, low_rank of, const product *parts, int num_parts, const number *x,
                        int64_t rows, int64_t rows_of_text, int64_t width, float *out, int64_t stride, int threads) {
    int64_t texts = rows / rows_of_text, count = rows_of_text - u->first, rank = u->rank, ranks = num_parts * rank;
    const product down = {of.down, 0, ranks};
    const number *of_rows = x + u->first * width;
    if (texts > 1 && u->first) {
        for (int64_t text = 0; text < texts; text++)
            memcpy(u->narrow_space + text * count * width, of_rows + text * rows_of_text * width,
                   (size_t)(count * width) * sizeof(number));
        of_rows = u->narrow_space;
    }
    products(&down, 1, of_rows, texts * count, width, u->wide_space, ranks, threads);
    int64_t groups = (count + UPDATE_ROWS - 1) / UPDATE_ROWS;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * rank * stride > 1 << 17)
    for (int64_t index = 0; index < texts * groups; index++) {
        int64_t text = index / groups, row = index % groups * UPDATE_ROWS;
        int64_t some_rows = count - row < UPDATE_ROWS ? count - row : UPDATE_ROWS;
        const float *inner = u->wide_space + (text * count + row) * ranks;
        float *to = out + (text * rows_of_text + u->first + row) * stride;
        const number *up = of.up;
        for (int part = 0; part < num_parts; to += parts[part].size, up += parts[part].size, inner += rank, part++)
            for (int64_t at = 0; at < parts[part].size; at += UPDATE_WIDTH) {
                float change[UPDATE_ROWS * UPDATE_WIDTH];
                int64_t d = parts[part].size - at < UPDATE_WIDTH ? parts[part].size - at : UPDATE_WIDTH;
                mix(some_rows, inner, ranks, up + at, stride, d, 0, rank, change, UPDATE_WIDTH);
                for (int64_t r = 0; r < some_rows; r++)
                    for (int64_t i = 0; i < d; i++) {
                        float *sum = to + r * stride + at + i;
                        *sum = rounded(*sum + rounded(change[r * UPDATE_WIDTH + i]));
                    }
            }
    }
}

// ---- what stands between products ----

INLINE float mean_square(const float *x, int64_t width) {
    floats sums = {0};
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES) {
        floats some_x;
        memcpy(&some_x, x + at, sizeof some_x);
        sums += some_x * some_x;
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    for (; at < width; at++) sum += x[at] * x[at];
    return sum / (float)width;
}

// Root-mean-square norm of one row, in place.
static void normed(const model *m, const number *weight, float *x, int64_t width) {
    float factor = 1.0f / __builtin_sqrtf(mean_square(x, width) + m->epsilon);
    if (m->norm_adds_one)
        for (int64_t i = 0; i < width; i++) x[i] = rounded(x[i] * factor * (1.0f + wide(weight[i])));
    else
        for (int64_t i = 0; i < width; i++) x[i] = rounded(wide(weight[i]) * rounded(x[i] * factor));
}

static void norm_rows(const model *m, const number *weight, const number *x, int64_t rows, number *out) {
    float row[m->width];
    for (int64_t n = 0; n < rows; n++) {
        for (int64_t i = 0; i < m->width; i++) row[i] = wide(x[n * m->width + i]);
        normed(m, weight, row, m->width);
        for (int64_t i = 0; i < m->width; i++) out[n * m->width + i] = narrow(row[i]);
    }
}

// x (N, W) += what a part of the layer gives, after that part's own norm if it has one.
static void add_rows(const model *m, const number *weight, float *part, int64_t rows, number *x) {
    for (int64_t n = 0; n < rows; n++) {
        float *row = part + n * m->width;
        if (weight) normed(m, weight, row, m->width);
        for (int64_t i = 0; i < m->width; i++) x[n * m->width + i] = narrow(wide(x[n * m->width + i]) + row[i]);
    }
}

INLINE float power_of_e(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float whole = __builtin_rintf(x * 1.44269504f);
    float rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    float power = 1.0f / 720.0f;
    power = power * rest + 1.0f / 120.0f;
    power = power * rest + 1.0f / 24.0f;
    power = power * rest + 1.0f / 6.0f;
    power = power * rest + 0.5f;
    power = power * rest + 1.0f;
    power = power * rest + 1.0f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return power * scale;
}

INLINE float gelu(float x) {
    float inner = 0.797884561f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (2.0f - 2.0f / (power_of_e(2.0f * inner) + 1.0f));
}

INLINE float silu(float x) { return x / (1.0f + power_of_e(-x)); }

static void gate_rows(const model *m, const float *both, int64_t rows, number *out) {
    for (int64_t n = 0; n < rows; n++) {
        const float *gate = both + n * 2 * m->inner, *up = gate + m->inner;
        number *to = out + n * m->inner;
        if (m->activation)
            for (int64_t i = 0; i < m->inner; i++) to[i] = narrow(rounded(gelu(gate[i])) * up[i]);
        else
            for (int64_t i = 0; i < m->inner; i++) to[i] = narrow(rounded(silu(gate[i])) * up[i]);
    }
}

// One head: its norm, its rotation by halves (cosines and sines of D), and out.
static void head(const model *m, const number *weight, float *x, const number *cosines, const number *sines,
                 number *out) {
    int64_t half = m->head_width / 2;
    if (weight) normed(m, weight, x, m->head_width);
    for (int64_t i = 0; i < half; i++) {
        float low = x[i], high = x[i + half];
        out[i] = narrow(rounded(low * wide(cosines[i])) - rounded(high * wide(sines[i])));
        out[i + half] = narrow(rounded(high * wide(cosines[i + half])) + rounded(low * wide(sines[i + half])));
    }
}

static void queries_keys_values(const model *m, const layer *l, const updates *added, const updated_rows *u,
                                const number *x, int64_t rows, int64_t rows_of_text, const number *cosines,
                                const number *sines, number *q, number *k, number *v, number *narrow_space,
                                float *wide_space, int threads) {
    int64_t d = m->head_width, of_q = m->heads * d, of_k = m->key_heads * d, stride = of_q + 2 * of_k;
    norm_rows(m, l->norm_in, x, rows, narrow_space);
    const product parts[3] = {{l->q, l->q_bias, of_q}, {l->k, l->k_bias, of_k}, {l->v, l->v_bias, of_k}};
    products(parts, 3, narrow_space, rows, m->width, wide_space, stride, threads);
    if (added)
        add_updates(u, added->qkv, parts, 3, narrow_space, rows, rows_of_text, m->width, wide_space, stride, threads);
    for (int64_t n = 0; n < rows; n++) {
        int64_t text = n / rows_of_text, row = n % rows_of_text;
        float *from = wide_space + n * stride;
        for (int64_t h = 0; h < m->heads; h++)
            head(m, l->norm_q, from + h * d, cosines + n * d, sines + n * d,
                 q + ((text * m->heads + h) * rows_of_text + row) * d);
        for (int64_t h = 0; h < m->key_heads; h++) {
            int64_t to = ((text * m->key_heads + h) * rows_of_text + row) * d;
            head(m, l->norm_k, from + of_q + h * d, cosines + n * d, sines + n * d, k + to);
            for (int64_t i = 0; i < d; i++) v[to + i] = narrow(from[of_q + of_k + h * d + i]);
        }
    }
}

static void after_attention(const model *m, const layer *l, const updates *added, const updated_rows *u, number *x,
                            const number *attention, int64_t rows, int64_t rows_of_text, number *narrow_space,
                            float *wide_space, int threads) {
    const product out = {l->o, l->o_bias, m->width};
    int64_t of_heads = m->heads * m->head_width;
    products(&out, 1, attention, rows, of_heads, wide_space, m->width, threads);
    if (added)
        add_updates(u, added->o, &out, 1, attention, rows, rows_of_text, of_heads, wide_space, m->width, threads);
    add_rows(m, l->norm_attention, wide_space, rows, x);
    norm_rows(m, l->norm_mlp_in, x, rows, narrow_space);
    const product both[2] = {{l->gate, l->gate_bias, m->inner}, {l->up, l->up_bias, m->inner}};
    products(both, 2, narrow_space, rows, m->width, wide_space, 2 * m->inner, threads);
    if (added)
        add_updates(u, added->gate_up, both, 2, narrow_space, rows, rows_of_text, m->width, wide_space, 2 * m->inner,
                    threads);
    gate_rows(m, wide_space, rows, narrow_space);
    const product down = {l->down, l->down_bias, m->width};
    products(&down, 1, narrow_space, rows, m->inner, wide_space, m->width, threads);
    if (added)
        add_updates(u, added->down, &down, 1, narrow_space, rows, rows_of_text, m->inner, wide_space, m->width, threads);
    add_rows(m, l->norm_mlp, wide_space, rows, x);
}

// From one attention to the next. `before` is the layer whose attention (N, H * D) is given, NULL before the first;
// `after` is the layer whose queries (B, H, R, D), keys and values (B, G, R, D) are made, NULL behind the last: then
// `last` (N, W) is the model's output. `x` (N, W) is the residual stream, `cosines` and `sines` are (N, D).
// Their updates are NULL where no row is updated. Spaces hold N * max(W, I) numbers, and N * max((H + 2 G) * D, 2 I, W)
// floats.
void between_attentions(const model *m, const layer *before, const layer *after, const updates *of_before,
                        const updates *of_after, const updated_rows *updated, number *x, const number *attention,
                        int64_t rows, int64_t rows_of_text, const number *cosines, const number *sines, number *q,
                        number *k, number *v, number *last, number *narrow_space, float *wide_space, int threads) {
    if (before)
        after_attention(m, before, of_before, updated, x, attention, rows, rows_of_text, narrow_space, wide_space,
                        threads);
    if (after)
        queries_keys_values(m, after, of_after, updated, x, rows, rows_of_text, cosines, sines, q, k, v, narrow_space,
                            wide_space, threads);
    else
        norm_rows(m, m->norm_last, x, rows, last);
}

// ---- attention ----

INLINE float total(const float *x, int64_t count) {
    floats sums = {0};
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) {
        floats some_x;
        memcpy(&some_x, x + at, sizeof some_x);
        sums += some_x;
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    for (; at < count; at++) sum += x[at];
    return sum;
}

INLINE float largest(const float *x, int64_t count) {  // NaN is passed over
    floats most = (floats){0} - __builtin_inff();
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) {
        floats some_x;
        memcpy(&some_x, x + at, sizeof some_x);
        words is_more = (words)(some_x > most);
        most = (floats)(((words)some_x & is_more) | ((words)most & ~is_more));
    }
    float found = -__builtin_inff();
    for (int lane = 0; lane < LANES; lane++) found = most[lane] > found ? most[lane] : found;
    for (; at < count; at++) found = x[at] > found ? x[at] : found;
    return found;
}

// Softmax of one row's scores among the keys that it may see; the others weigh 0.
static void weigh(float *scores, const uint8_t *sees, int64_t first, int64_t end, float scaling, float cap) {
    float most;
    for (int64_t s = first; s < end; s++) {
        float score = scores[s] * scaling;
        if (cap > 0) score = cap - 2 * cap / (power_of_e(2 * score / cap) + 1);
        scores[s] = score;
    }
    for (int64_t s = first; s < end; s++) scores[s] = sees[s] ? scores[s] : -__builtin_inff();
    most = largest(scores + first, end - first);
    for (int64_t s = first; s < end; s++) scores[s] = sees[s] ? power_of_e(scores[s] - most) : 0.0f;
    float factor = 1.0f / total(scores + first, end - first);
    for (int64_t s = first; s < end; s++) scores[s] *= factor;
}

// Queries (B, H, R, D) over keys and values (B, G, S, D), whose texts and heads lie `text_stride` and `head_stride`
// numbers apart, under a mask (B, M, S) with M of 1, R, or R for each query head of a key head: out (B, R, H, D).
// Keys before the first and behind the last that any row of a text may see are not read. `cap` 0: none.
// The space holds, for each text and key head, H / G * R * (S rounded up to 4 + D) floats.
void attend(const model *m, const number *q, const number *keys, const number *values, int64_t texts, int64_t rows,
            int64_t num_keys, int64_t text_stride, int64_t head_stride, const uint8_t *mask, int64_t mask_rows,
            int64_t mask_stride, float scaling, float cap, float *space, number *out, int threads) {
    int64_t d = m->head_width, group = m->heads / m->key_heads, of_group = group * rows;
    int64_t stride = (num_keys + TILE_OUT - 1) / TILE_OUT * TILE_OUT;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && texts * of_group * num_keys > 4096)
    for (int64_t part = 0; part < texts * m->key_heads; part++) {
        int64_t text = part / m->key_heads, head_of_keys = part % m->key_heads;
        const uint8_t *sees = mask + text * mask_stride;
        int64_t first = num_keys, end = 0;
        for (int64_t row = 0; row < mask_rows && row < rows; row++) {
            const uint8_t *at = sees + row * num_keys;
            int64_t low = 0, high = num_keys;
            while (low < high && !at[low]) low++;
            while (high > low && !at[high - 1]) high--;
            first = low < first ? low : first;
            end = high > end ? high : end;
        }
        float *scores = space + part * of_group * (stride + d), *mixed = scores + of_group * stride;
        int64_t offset = text * text_stride + head_of_keys * head_stride;
        const product of_keys = {keys + offset, 0, num_keys};
        first = first / TILE_OUT * TILE_OUT;
        int64_t key = first;
        const number *queries = q + part * of_group * d;
        number *pairs = of_group > TILE_ROWS ? matrix_rows(queries, of_group, d) : NULL;
        if (pairs) {
            matrix_begin();
            for (; key < end && key + STRIP <= num_keys; key += STRIP)
                matrix_strip(keys + offset + key * d, pairs, of_group, d, scores + key, stride);
            matrix_end();
            free(pairs);
        }
        for (; key < end; key += TILE_OUT) block(of_keys, key, queries, of_group, d, scores, stride);
        for (int64_t row = 0; row < of_group; row++)
            weigh(scores + row * stride, sees + (mask_rows == 1 ? 0 : row % rows) * num_keys, first, end, scaling, cap);
        mix(of_group, scores, stride, values + offset, d, d, first, end, mixed, d);
        for (int64_t row = 0; row < of_group; row++) {
            int64_t head_index = head_of_keys * group + row / rows;
            number *to = out + ((text * rows + row % rows) * m->heads + head_index) * d;
            for (int64_t i = 0; i < d; i++) to[i] = narrow(mixed[row * d + i]);
        }
    }
}

// Rows (N, width) times a weight (size, width): out (N, size), rounded to the type of the weight.
void product_of_rows(const number *weight, const number *bias, int64_t size, const number *x, int64_t rows,
                     int64_t width, float *out, int threads) {
    const product only = {weight, bias, size};
    products(&only, 1, x, rows, width, out, size, threads);
}
