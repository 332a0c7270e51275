// Rows of logits as laws: drawn from, asked for probabilities, redrawn from residuals. No row of
// probabilities leaves this file unless it is asked for: each is formed in a core's cache, read and forgotten.
//
// A row becomes weights exp((logit - best) / temperature), float32, of which sums are float64, by blocks. What
// is cut is set to 0. A token's probability is its weight over the sum of all, and by these very weights it is
// drawn: the block that holds the uniform, then the token in it.
//
// Shapes: N rows that are asked for, V vocabulary, C blocks of it, U edited tokens of a row, A tokens asked for.

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define BLOCK 128
#define FEW 2048        // tokens among which the last that stays is looked for at once
#define HOPED 512       // each token that top-p keeps is hoped to be this part of what may go, at least
#define EDGES 4         // weights that a look through a flat row compares with
#define SMALLEST 1.1754944e-38f
#define LOWEST -87.0f   // logits so far under the best have no weight: it would not be a normal number

#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t words __attribute__((vector_size(4 * LANES)));
typedef float half_floats __attribute__((vector_size(2 * LANES)));
typedef double doubles __attribute__((vector_size(4 * LANES)));  // half as many
typedef int64_t long_words __attribute__((vector_size(4 * LANES)));

typedef struct {
    const float *logits;
    int64_t request_stride, offset_stride, vocab;
    const int64_t *starts, *num_rows;                  // of packed rows, by request; NULL: a rectangle
    const double *temperature, *top_k, *top_p, *min_p;  // by request; no top_k: nothing is cut
    const float *draft;                                 // rows of which a part enters; NULL: none
    int64_t draft_request_stride, draft_offset_stride;
    const double *weight;  // of the row's own logits, by request
    const int64_t *num_drafts;
    const int64_t *edit_ids;    // (requests, U); NULL: nothing is edited
    const double *edit_values;  // (requests, offsets, U), what stands instead
    int64_t num_edits, edit_stride;
} rows;

typedef struct {
    float *weights;  // V, and zeros up to whole blocks
    double *sums;    // C
    float *tops;     // C, the largest weight of each block
    double mass;
    float *logits;   // V, where they are not read as they lie
    uint64_t *keys;  // V, of a cut
} space;

INLINE floats all(float value) { return value - (floats){0}; }
INLINE floats load(const float *at) {
    floats value;
    memcpy(&value, at, sizeof value);
    return value;
}
INLINE void store(float *at, floats value) { memcpy(at, &value, sizeof value); }
INLINE floats larger(floats a, floats b) {
    const words is_first = a > b;
    return (floats)(((words)a & is_first) | ((words)b & ~is_first));
}
INLINE doubles widened(const float *at) {
    half_floats value;
    memcpy(&value, at, sizeof value);
    return __builtin_convertvector(value, doubles);
}
INLINE double total(doubles values) {
    double sum = 0;
    for (int i = 0; i < LANES / 2; i++) sum += values[i];
    return sum;
}
INLINE float largest(floats values) {
    for (int step = LANES / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) values[i] = values[i] > values[i + step] ? values[i] : values[i + step];
    return values[0];
}
INLINE float sum_of(floats values) {
    for (int step = LANES / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) values[i] += values[i + step];
    return values[0];
}
INLINE double lower_of(double a, double b) { return a < b ? a : b; }
INLINE float larger_of(float a, float b) { return a > b ? a : b; }
INLINE int64_t num_blocks(int64_t vocab) { return (vocab + BLOCK - 1) / BLOCK; }
INLINE int64_t padded(int64_t vocab) { return num_blocks(vocab) * BLOCK; }

// Of numbers that are not positive; 0 under LOWEST. Cephes' polynomial: within two units in the last place.
INLINE floats exponential(floats x) {
    const words has_weight = x >= all(LOWEST);
    x = larger(x, all(LOWEST));
    const floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const floats shifted = x * 1.44269504088896341f + magic;
    const floats n = shifted - magic;
    floats r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    floats y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const words power = ((words)shifted << 23) + (words)all(1.0f);
    return (floats)((words)(y * (floats)power) & has_weight);
}

static float best_of(const float *x, int64_t count) {
    floats best[4];
    for (int i = 0; i < 4; i++) best[i] = all(-INFINITY);
    int64_t at = 0;
    for (; at + 4 * LANES <= count; at += 4 * LANES)
        for (int i = 0; i < 4; i++) best[i] = larger(load(x + at + i * LANES), best[i]);
    float found = largest(larger(larger(best[0], best[1]), larger(best[2], best[3])));
    for (; at < count; at++) found = x[at] > found ? x[at] : found;
    return found;
}

// The logits of a row: as they lie, or mixed and edited in space->logits, less a number that is the same of all.
static const float *logits_of(const rows *of, int64_t request, int64_t offset, space *space) {
    int64_t place = offset, vocab = of->vocab;
    if (of->starts) {
        const int64_t last = of->num_rows[request] - 1;
        place = of->starts[request] + (offset < last ? offset : last);
    }
    const float *own = of->logits + request * of->request_stride + place * of->offset_stride;
    const int is_mixed = of->draft && offset < of->num_drafts[request] && of->weight[request] < 1;
    if (!is_mixed && !of->edit_ids) return own;
    // Less the best: what rounding takes is least where weights are largest.
    const float own_best = best_of(own, vocab);
    double shift = own_best;
    float *out = space->logits;
    if (is_mixed) {
        const float *draft = of->draft + request * of->draft_request_stride + offset * of->draft_offset_stride;
        const float draft_best = best_of(draft, vocab);
        const double weight = of->weight[request];
        shift = weight * own_best + (1 - weight) * draft_best;
        for (int64_t i = 0; i < vocab; i++)
            out[i] = (float)(weight * ((double)own[i] - own_best) + (1 - weight) * ((double)draft[i] - draft_best));
    } else {
        for (int64_t i = 0; i < vocab; i++) out[i] = own[i] - own_best;
    }
    if (of->edit_ids) {
        const int64_t *ids = of->edit_ids + request * of->num_edits;
        const double *values = of->edit_values + request * of->edit_stride + offset * of->num_edits;
        for (int64_t i = 0; i < of->num_edits; i++) out[ids[i]] = (float)lower_of(values[i] - shift, 3e38);
    }
    return out;
}

static void sum_blocks(space *space, int64_t vocab) {
    space->mass = 0;
    for (int64_t block = 0; block < num_blocks(vocab); block++) {
        const float *weights = space->weights + block * BLOCK;
        doubles low = {0}, high = {0};
        floats top = {0};
        for (int i = 0; i < BLOCK; i += LANES) {
            low += widened(weights + i);
            high += widened(weights + i + LANES / 2);
            top = larger(load(weights + i), top);
        }
        space->sums[block] = total(low + high);
        space->tops[block] = largest(top);
        space->mass += space->sums[block];
    }
}

// What logits are multiplied by, finite also where a temperature is too small for float32.
INLINE double scale_of(double temperature) { return 1 / (temperature > SMALLEST ? temperature : SMALLEST); }

// Weights of logits that lie anywhere.
static void weigh_logits(const float *x, double temperature, int64_t vocab, space *space) {
    const int64_t end = num_blocks(vocab) * BLOCK;
    const float best = best_of(x, vocab);
    float *out = space->weights;
    if (temperature == 0) {  // ties go to the lowest id
        memset(out, 0, end * sizeof *out);
        for (int64_t i = 0; i < vocab; i++)
            if (x[i] == best) {
                out[i] = 1;
                break;
            }
        sum_blocks(space, vocab);
        return;
    }
    const float scale = (float)scale_of(temperature);
    int64_t at = 0;
    for (; at + LANES <= vocab; at += LANES) store(out + at, exponential((load(x + at) - best) * scale));
    if (at < vocab) {
        float rest[LANES];
        for (int i = 0; i < LANES; i++) rest[i] = at + i < vocab ? x[at + i] : -INFINITY;
        store(out + at, exponential((load(rest) - best) * scale));
        at += LANES;
    }
    memset(out + at, 0, (end - at) * sizeof *out);
    sum_blocks(space, vocab);
}

// ---- what is cut ----

// Weights of one size or more stand in the order of their keys, of equal ones the lowest id first.
INLINE uint64_t key_of(float weight, int64_t id) {
    uint32_t bits;
    memcpy(&bits, &weight, 4);
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)id;
}
INLINE float weight_of(uint64_t key) {
    const uint32_t bits = (uint32_t)(key >> 32);
    float weight;
    memcpy(&weight, &bits, 4);
    return weight;
}

typedef struct {
    uint64_t last;  // key of the last token that stays
    double mass;    // of all that stay
} prefix;

// The fewest of the largest that are so many, or hold so much; `before` is what stands before all of these.
static prefix fewest(uint64_t *keys, int64_t count, double goal_count, double goal_mass, double count_before,
                     double mass_before) {
    uint64_t last = 0;
    while (count > 0) {
        const uint64_t a = keys[0], b = keys[count / 2], c = keys[count - 1];
        const uint64_t pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        int64_t num_larger = 0;
        double mass_larger = 0;
        for (int64_t i = 0; i < count; i++) {
            const uint64_t key = keys[i];
            const int is_larger = key > pivot;
            mass_larger += is_larger ? weight_of(key) : 0.0;
            keys[i] = keys[num_larger];
            keys[num_larger] = key;
            num_larger += is_larger;
        }
        if (num_larger > 0 && (count_before + num_larger >= goal_count || mass_before + mass_larger >= goal_mass)) {
            count = num_larger;
            continue;
        }
        count_before += num_larger + 1, mass_before += mass_larger + weight_of(pivot), last = pivot;
        if (count_before >= goal_count || mass_before >= goal_mass) break;
        int64_t at = num_larger;
        while (keys[at] != pivot) at++;
        keys[at] = keys[num_larger], keys[num_larger] = pivot;
        keys += num_larger + 1, count -= num_larger + 1;
    }
    return (prefix){last, mass_before};
}

// Which of LANES weights are at least so large, and under a bound: one bit each.
INLINE uint32_t between(const float *weights, float least, float below) {
#if defined(__AVX512F__)
    const __m512 each = _mm512_loadu_ps(weights);
    return _mm512_cmp_ps_mask(each, _mm512_set1_ps(least), _CMP_GE_OQ)
           & _mm512_cmp_ps_mask(each, _mm512_set1_ps(below), _CMP_LT_OQ);
#else
    uint32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= (uint32_t)(weights[i] >= least && weights[i] < below) << i;
    return found;
#endif
}

// Keys of these weights, in the order of their ids; it ends where they are more than `most`.
static int64_t keys_between(const space *space, int64_t vocab, float least, float below, int64_t most, uint64_t *keys) {
    int64_t count = 0;
    for (int64_t block = 0; block < num_blocks(vocab) && count <= most; block++) {
        if (space->tops[block] < least) continue;
        for (int64_t at = block * BLOCK; at < (block + 1) * BLOCK; at += LANES)
            for (uint32_t found = between(space->weights + at, least, below); found; found &= found - 1) {
                const int64_t id = at + __builtin_ctz(found);
                keys[count++] = key_of(space->weights[id], id);
            }
    }
    return count;
}

INLINE float float_of(int32_t bits) {
    float weight;
    memcpy(&weight, &bits, 4);
    return weight;
}
INLINE int32_t bits_of(float weight) {
    int32_t bits;
    memcpy(&bits, &weight, 4);
    return bits;
}

static double mass_at_least(const space *space, int64_t vocab, float least) {
    doubles sum = {0};
    for (int64_t at = 0; at < padded(vocab); at += LANES / 2) {
        const doubles weights = widened(space->weights + at);
        sum += (doubles)((long_words)weights & (weights >= (double)least));
    }
    return total(sum);
}

// Narrow bounds to the weights that lie in low..high - 1: of logits that were rounded many are the same.
static void tighten(const space *space, int64_t vocab, int32_t *low, int32_t *high) {
    floats least = all(float_of(*high)), most = all(float_of(*low));
    for (int64_t at = 0; at < padded(vocab); at += LANES) {
        const floats weights = load(space->weights + at);
        const words is_inside = (weights >= all(float_of(*low))) & (weights < all(float_of(*high)));
        const floats none = all(float_of(*high));
        const floats here = (floats)(((words)weights & is_inside) | ((words)none & ~is_inside));
        least = -larger(-least, -here);
        most = larger(most, (floats)((words)weights & is_inside));
    }
    const int32_t first = bits_of(-largest(-least)), last = bits_of(largest(most));
    if (first < *high) *low = first, *high = last + 1;
}

// As `fewest`, of a row that is too flat to look through: first between which weights the last that stays lies.
// No token under `least` stays.
static prefix fewest_of_all(space *space, int64_t vocab, double goal_count, double goal_mass, float least) {
    // As numbers that are not negative ascend, so do their bits. The last that stays lies in low..high - 1.
    int32_t low = bits_of(least), high = bits_of(1.0f) + 1;
    double count_low = (double)vocab, count_high = 0;
    tighten(space, vocab, &low, &high);
    while (count_low - count_high > FEW / 8 && high - low > 1) {
        float edges[EDGES];
        for (int i = 0; i < EDGES; i++) edges[i] = float_of(low + 1 + (int32_t)((int64_t)(high - low - 1) * i / EDGES));
        double masses[EDGES] = {0};
        words counts[EDGES] = {{0}};
        for (int64_t block = 0; block < num_blocks(vocab); block++) {
            floats sums[EDGES] = {{0}};
            for (int64_t at = block * BLOCK; at < (block + 1) * BLOCK; at += LANES) {
                const floats weights = load(space->weights + at);
                for (int i = 0; i < EDGES; i++) {
                    const words is_above = weights >= all(edges[i]);
                    sums[i] += (floats)((words)weights & is_above);
                    counts[i] -= is_above;
                }
            }
            for (int i = 0; i < EDGES; i++) masses[i] += sum_of(sums[i]);
        }
        int32_t next_high = high;
        for (int i = EDGES - 1; i >= 0; i--) {
            double count = 0;
            for (int lane = 0; lane < LANES; lane++) count += counts[i][lane];
            if (count >= goal_count || masses[i] >= goal_mass) {
                low = bits_of(edges[i]), count_low = count;
                break;
            }
            next_high = bits_of(edges[i]), count_high = count;
        }
        high = next_high;
        tighten(space, vocab, &low, &high);
    }
    const double mass_high = mass_at_least(space, vocab, float_of(high));
    const int64_t num_keys = keys_between(space, vocab, float_of(low), float_of(high), vocab, space->keys);
    if (high - low == 1 && num_keys > 0) {  // they weigh the same: so many of them, by their ids
        const double weight = float_of(low);
        const double wanted = lower_of(ceil((goal_mass - mass_high) / weight), goal_count - count_high);
        const int64_t kept = wanted < num_keys ? (wanted > 1 ? (int64_t)wanted : 1) : num_keys;
        return (prefix){space->keys[kept - 1], mass_high + kept * weight};
    }
    const prefix found = fewest(space->keys, num_keys, goal_count, goal_mass, count_high, mass_high);
    return found.last ? found : (prefix){key_of(float_of(low), vocab), found.mass};
}

// The k-th largest of the blocks' largest: at least k tokens are as large.
static float least_of_best(space *space, int64_t vocab, int64_t top_k) {
    const int64_t count = num_blocks(vocab);
    if (top_k > count) return 0;
    for (int64_t block = 0; block < count; block++) space->keys[block] = key_of(space->tops[block], block);
    return weight_of(fewest(space->keys, count, (double)top_k, INFINITY, 0, 0).last);
}

// Top-k, then top-p of what it left, then min-p: each keeps the first tokens of one order.
static void cut(const rows *of, int64_t request, space *space) {
    const int64_t vocab = of->vocab, top_k = (int64_t)of->top_k[request];
    const double top_p = of->top_p[request], min_p = of->min_p[request];
    const int has_k = top_k > 0 && top_k < vocab, has_p = top_p < 1;
    if (!has_k && !has_p && !(min_p > 0)) return;
    float edge = SMALLEST;  // what is less goes, and of what is equal all ids behind the last one
    int64_t last_id = vocab;
    if (has_k || has_p) {
        // What is less than its share of the mass that may go adds up to no more than that mass.
        const float safe = has_k ? SMALLEST : larger_of((float)((1 - top_p) / (2 * vocab) * space->mass), SMALLEST);
        const float hoped = has_k ? least_of_best(space, vocab, top_k) : (float)((1 - top_p) / HOPED * space->mass);
        const float least = larger_of(hoped, safe);
        const int64_t count = keys_between(space, vocab, least, INFINITY, FEW, space->keys);
        double held = 0;
        for (int64_t i = 0; i < count; i++) held += weight_of(space->keys[i]);
        const int is_flat = count > FEW || (has_k ? count < top_k : held < top_p * space->mass);
        const double goal_count = has_k ? (double)top_k : INFINITY;
        prefix kept = {0, space->mass};
        if (has_k)
            kept = is_flat ? fewest_of_all(space, vocab, goal_count, INFINITY, safe)
                           : fewest(space->keys, count, goal_count, INFINITY, 0, 0);
        const double goal = top_p * kept.mass;
        if (has_p)
            kept = is_flat ? fewest_of_all(space, vocab, goal_count, goal, safe)
                           : fewest(space->keys, count, goal_count, goal, 0, 0);
        if (kept.last) edge = weight_of(kept.last), last_id = (uint32_t)~(uint32_t)kept.last;
    }
    if (min_p > 0) {
        float top = 0;
        for (int64_t block = 0; block < num_blocks(vocab); block++) top = larger_of(space->tops[block], top);
        float least = (float)(min_p * top);
        if (least < min_p * top) least = float_of(bits_of(least) + 1);
        if (least > edge) edge = least, last_id = vocab;
    }
    words id;
    for (int i = 0; i < LANES; i++) id[i] = i;
    for (int64_t at = 0; at < padded(vocab); at += LANES, id += LANES) {
        const floats weights = load(space->weights + at);
        const words stays = (weights > all(edge)) | ((weights == all(edge)) & (id <= (int32_t)last_id));
        store(space->weights + at, (floats)((words)weights & stays));
    }
    sum_blocks(space, vocab);
}

// ---- what is asked for ----

// Kept by a thread from call to call, until it ends: the first for a target's row, the second for a draft's.
typedef struct {
    space of[2];
    int64_t sizes[2];
} spaces;

static pthread_key_t key_of_spaces;
static pthread_once_t has_key = PTHREAD_ONCE_INIT;

static void free_space(space *here) {
    free(here->weights), free(here->logits), free(here->sums), free(here->tops);
    free(here->keys);
}

static void free_spaces(void *held) {
    for (int which = 0; which < 2; which++) free_space(&((spaces *)held)->of[which]);
    free(held);
}

static int is_without_key = 0;

static void make_key(void) { is_without_key = pthread_key_create(&key_of_spaces, free_spaces) != 0; }

// Bytes of one space.
static int64_t bytes_for(const rows *of) {
    const int64_t size = padded(of->vocab);
    return size * (2 * sizeof(float) + sizeof(uint64_t)) + num_blocks(size) * (sizeof(double) + sizeof(float));
}

// This thread's; NULL where there is no memory for it.
static space *space_for(const rows *of, int which) {
    pthread_once(&has_key, make_key);
    if (is_without_key) return NULL;
    spaces *held = pthread_getspecific(key_of_spaces);
    if (!held) {
        held = calloc(1, sizeof *held);
        if (!held) return NULL;
        if (pthread_setspecific(key_of_spaces, held)) {
            free(held);
            return NULL;
        }
    }
    space *here = &held->of[which];
    if (held->sizes[which] < padded(of->vocab)) {
        free_space(here);
        memset(here, 0, sizeof *here);
        held->sizes[which] = 0;
        const int64_t size = padded(of->vocab);
        here->weights = aligned_alloc(64, size * sizeof(float));
        here->logits = aligned_alloc(64, size * sizeof(float));
        here->sums = malloc(num_blocks(size) * sizeof(double));
        here->tops = malloc(num_blocks(size) * sizeof(float));
        here->keys = malloc(size * sizeof(uint64_t));
        if (!here->weights || !here->logits || !here->sums || !here->tops || !here->keys) {
            free_space(here);
            memset(here, 0, sizeof *here);
            return NULL;
        }
        held->sizes[which] = size;
    }
    return here;
}

// The weights of a row in a space; gives its logits.
static const float *weigh(const rows *of, int64_t request, int64_t offset, space *space) {
    const float *x = logits_of(of, request, offset, space);
    weigh_logits(x, of->temperature[request], of->vocab, space);
    if (of->top_k) cut(of, request, space);
    return x;
}

// Weights, or what is left of them where a part of others is taken away: the positive part of the difference.
typedef struct {
    const float *own, *less;  // no less: none is taken away
    double part;
} remains;

INLINE doubles left(const remains *of, int64_t at) {
    const doubles own = widened(of->own + at);
    if (!of->less) return own;
    const doubles rest = own - widened(of->less + at) * of->part;
    return (doubles)((long_words)rest & (rest > 0));
}

// By inverse CDF, never a token without weight: its id, what lies before it, and that with its own.
static int64_t draw(const remains *of, const double *sums, double goal, int64_t vocab, double *low, double *high) {
    const int64_t count = num_blocks(vocab);
    int64_t block = 0, last_block = 0, found = 0;
    double before = 0, before_last = 0;
    for (; block < count; block++) {
        if (sums[block] > 0) last_block = block, before_last = before;
        if (before + sums[block] > goal) break;
        before += sums[block];
    }
    if (block == count) block = last_block, before = before_last;  // rounding carried the goal onto the total
    *low = *high = before;
    for (int64_t at = block * BLOCK; at < (block + 1) * BLOCK; at += LANES / 2) {
        const doubles weights = left(of, at);
        for (int i = 0; i < LANES / 2; i++) {
            if (!(weights[i] > 0)) continue;
            found = at + i, *low = *high, *high += weights[i];
            if (*high > goal) return found;
        }
    }
    return found;
}

// The token that a uniform draws from a row in a space; figures as `rows_drawn` has them.
static int64_t draw_whole(const space *here, double uniform, int64_t vocab, double *found) {
    const remains whole = {here->weights, NULL, 0};
    const int64_t id = draw(&whole, here->sums, uniform * here->mass, vocab, &found[1], &found[2]);
    found[0] = here->weights[id] / here->mass;
    found[1] /= here->mass, found[2] /= here->mass, found[3] = 1;
    return id;
}

// Rows are named one by one, or they are the first `width` of every request.
INLINE int64_t request_of(const int64_t *requests, int64_t width, int64_t index) {
    return requests ? requests[index] : index / width;
}
INLINE int64_t offset_of(const int64_t *offsets, int64_t width, int64_t index) {
    return offsets ? offsets[index] : index % width;
}

// What follows returns 0; where a thread had no memory, the bytes that it asked for, and results mean nothing.

// All probabilities of N rows, float64 (N, V).
int64_t rows_dense(const rows *of, const int64_t *requests, const int64_t *offsets, int64_t width, int64_t count,
                   double *out, int threads) {
    int64_t lacking = 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < count; n++) {
        space *here = space_for(of, 0);
        if (!here) {
#pragma omp atomic write
            lacking = bytes_for(of);
            continue;
        }
        weigh(of, request_of(requests, width, n), offset_of(offsets, width, n), here);
        for (int64_t i = 0; i < of->vocab; i++) out[n * of->vocab + i] = here->weights[i] / here->mass;
    }
    return lacking;
}

// Of N rows the token that a uniform draws (NULL: none is drawn), and A tokens that are asked for. Figures are
// float64 (N, 4 + A): the drawn token's probability, what lies before it, that with its own, and all; then the
// probabilities of those asked for. `logs`: theirs are natural logarithms, exact also where a probability is too
// small for float64, of rows that are neither cut, edited, mixed nor greedy.
int64_t rows_drawn(const rows *of, const int64_t *requests, const int64_t *offsets, int64_t width, int64_t count,
                   const double *uniforms, const int64_t *asked, int64_t num_asked, int logs, int64_t *ids,
                   double *figures, int threads) {
    int64_t lacking = 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < count; n++) {
        space *here = space_for(of, 0);
        if (!here) {
#pragma omp atomic write
            lacking = bytes_for(of);
            continue;
        }
        const int64_t request = request_of(requests, width, n);
        const float *x = weigh(of, request, offset_of(offsets, width, n), here);
        double *found = figures + n * (4 + num_asked);
        if (uniforms) ids[n] = draw_whole(here, uniforms[n], of->vocab, found);
        const double best = logs ? best_of(x, of->vocab) : 0, scale = scale_of(of->temperature[request]);
        for (int64_t i = 0; i < num_asked; i++) {
            const int64_t id = asked[n * num_asked + i];
            found[4 + i] = logs ? (x[id] - best) * scale - log(here->mass) : here->weights[id] / here->mass;
        }
    }
    return lacking;
}

// The token that a uniform draws from what a draft's row leaves of the target's, which stands in `here`. Figures
// are float64 (4,): its probability under the target, and as above of the residual, which is not normalised.
// -1 where there is no memory for the draft's row.
static int64_t redraw(const rows *draft, int64_t request, int64_t offset, double uniform, space *here, double *found) {
    space *there = space_for(draft, 1);
    if (!there) return -1;
    const int64_t vocab = draft->vocab;
    weigh(draft, request, offset, there);
    remains rest = {here->weights, there->weights, here->mass / there->mass};
    double mass = 0;
    for (int64_t block = 0; block < num_blocks(vocab); block++) {
        doubles sum = {0};
        for (int i = 0; i < BLOCK; i += LANES / 2) sum += left(&rest, block * BLOCK + i);
        there->sums[block] = total(sum);
        mass += there->sums[block];
    }
    const double *sums = there->sums;
    // Rounding can reject a token and leave no mass: draft and target are then equal.
    if (!(mass > 0)) sums = here->sums, mass = here->mass, rest.less = NULL;
    const int64_t id = draw(&rest, sums, uniform * mass, vocab, &found[1], &found[2]);
    found[0] = here->weights[id] / here->mass;
    found[1] /= here->mass, found[2] /= here->mass, found[3] = mass / here->mass;
    return id;
}

// Of each request its drafts against the first `num_rows` target rows, up to the first that its coin rejects:
// coin * draft_p < target_p accepts. The token behind those that are accepted, if one of these rows is its own,
// is drawn as above: from the residual of a rejected draft, or from the target. `target_p` (requests, K) is
// written as far as drafts are looked at.
int64_t rows_judged(const rows *of, const rows *draft, int64_t num_requests, int64_t num_drafts, int64_t num_rows,
                    const int64_t *drafted, const double *draft_p, const int64_t *counts, const double *coins,
                    int64_t coin_stride, const double *uniforms, double *target_p, int64_t *num_accepted, int64_t *ids,
                    double *figures, int threads) {
    int64_t lacking = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t request = 0; request < num_requests; request++) {
        space *here = space_for(of, 0);
        if (!here) {
#pragma omp atomic write
            lacking = bytes_for(of);
            continue;
        }
        int64_t offset = 0;
        for (; offset < num_rows; offset++) {
            weigh(of, request, offset, here);
            const int64_t place = request * num_drafts + offset;
            if (offset >= counts[request]) {
                ids[request] = draw_whole(here, uniforms[request], of->vocab, figures + request * 4);
                break;
            }
            target_p[place] = here->weights[drafted[place]] / here->mass;
            if (!(coins[request * coin_stride + offset] * draft_p[place] < target_p[place])) {
                ids[request] = redraw(draft, request, offset, uniforms[request], here, figures + request * 4);
                if (ids[request] < 0) {
#pragma omp atomic write
                    lacking = bytes_for(draft);
                }
                break;
            }
        }
        num_accepted[request] = offset;
    }
    return lacking;
}
