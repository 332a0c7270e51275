// Products of bfloat16 rows on the matrix unit of newer Intel processors (AMX), the weights read as they lie.
//
// A tile holds 16 rows of 64 bytes. Of a weight that is 16 outputs by 32 inputs, so weights need no copy; the rows
// they meet are laid out anew for each product, which is little: pairs of their numbers, 16 rows side by side.

// Elsewhere `matrix_rows` gives NULL, and nothing else is called.

#define STRIP 32  // outputs at a time

#if NUMBER_BF16 && defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16       // outputs, rows, and pairs of inputs of a tile
#define INPUTS 32     // numbers of a tile's row
#define LEAST_ROWS 3  // fewer are as fast by vectors

// Whether this process may use tiles: the first call asks the system for the state of tiles, its component 18.
static int has_tiles(void) {
    static int has = -1;
    if (has < 0) has = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM
    return has;
}

// Around the strips of each thread.
static void matrix_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_of_row[16];
        uint8_t rows[16];
    } form = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) form.bytes_of_row[tile] = 64, form.rows[tile] = SIDE;
    _tile_loadconfig(&form);
}

static void matrix_end(void) { _tile_release(); }

// Words (16, 16), whose rows lie `stride` words apart, the other way round; rows from `count` on are zeros.
INLINE void transposed(const void *from, int64_t stride, int count, __m512 to[16]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = i < count ? _mm512_loadu_ps((const float *)from + i * stride) : _mm512_setzero_ps();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int i = 0; i < 4; i++) {  // a[4 * q + i] has column 4 * lane + i of rows 4 * q..
        __m512 first = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), second = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
        __m512 third = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd), fourth = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
        to[i] = _mm512_shuffle_f32x4(first, second, 0x88);
        to[8 + i] = _mm512_shuffle_f32x4(first, second, 0xdd);
        to[4 + i] = _mm512_shuffle_f32x4(third, fourth, 0x88);
        to[12 + i] = _mm512_shuffle_f32x4(third, fourth, 0xdd);
    }
}

// Rows (N, width) as tiles take them: for each 16 rows (width / 2, 16) pairs, to be freed. NULL where tiles do not
// serve these rows, or without memory.
static number *matrix_rows(const number *x, int64_t rows, int64_t width) {
    if (rows < LEAST_ROWS || width % INPUTS || !has_tiles()) return NULL;
    int64_t blocks = (rows + SIDE - 1) / SIDE;
    number *pairs = aligned_alloc(64, (size_t)(blocks * SIDE * width) * sizeof(number));
    if (!pairs) return NULL;
    for (int64_t index = 0; index < blocks; index++) {
        int64_t count = rows - index * SIDE;
        const number *from = x + index * SIDE * width;
        float *to = (float *)(pairs + index * SIDE * width);
        for (int64_t at = 0; at < width / 2; at += SIDE) {
            __m512 columns[16];
            transposed((const float *)from + at, width / 2, count < 16 ? (int)count : 16, columns);
            for (int i = 0; i < 16; i++) _mm512_store_ps(to + (at + i) * SIDE, columns[i]);
        }
    }
    return pairs;
}

INLINE void put(const float *sums, int64_t rows, float *out, int64_t stride) {
    __m512 of_rows[16];
    transposed(sums, 16, 16, of_rows);
    for (int i = 0; i < 16 && i < rows; i++) _mm512_storeu_ps(out + i * stride, of_rows[i]);
}

// Sums of STRIP outputs and all rows: out (N, stride). The next outputs' weights are asked for ahead.
static void matrix_strip(const number *weight, const number *pairs, int64_t rows, int64_t width, float *out,
                         int64_t stride) {
    const number *lower = weight + SIDE * width;
    int64_t of_block = SIDE * width, bytes = width * (int64_t)sizeof(number);
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    int64_t passes = (rows + 2 * SIDE - 1) / (2 * SIDE);
    for (int64_t row = 0; row < rows; row += 2 * SIDE) {
        const number *first = pairs + row * width;
        int is_pair = rows - row > SIDE;
        _tile_zero(0);
        _tile_zero(1);
        if (is_pair) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t at = 0; at < width; at += INPUTS) {
            for (int64_t i = row / (2 * SIDE); i < STRIP; i += passes)
                __builtin_prefetch(weight + (STRIP + i) * width + at, 0, 2);
            _tile_loadd(4, weight + at, bytes);
            _tile_loadd(5, lower + at, bytes);
            _tile_loadd(6, first + at * SIDE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (is_pair) {
                _tile_loadd(7, first + of_block + at * SIDE, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        put(sums[0], rows - row, out + row * stride, stride);
        put(sums[1], rows - row, out + row * stride + SIDE, stride);
        if (is_pair) {
            float *to = out + (row + SIDE) * stride;
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
            put(sums[2], rows - row - SIDE, to, stride);
            put(sums[3], rows - row - SIDE, to + SIDE, stride);
        }
    }
}

#else

static number *matrix_rows(const number *x, int64_t rows, int64_t width) { return (void)x, (void)rows, (void)width, NULL; }
static void matrix_begin(void) {}
static void matrix_end(void) {}
static void matrix_strip(const number *weight, const number *pairs, int64_t rows, int64_t width, float *out,
                         int64_t stride) {
    (void)weight, (void)pairs, (void)rows, (void)width, (void)out, (void)stride;
}

#endif
