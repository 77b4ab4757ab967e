/* Products of rows with matrices that lie as PyTorch keeps them.
 *
 * y [M, N] is a sum of terms x w', with w [N, K] or, turned, [K, N]. Each product of a stage first
 * has its rows placed where a tile reads them; then groups of 16 columns are multiplied, their part
 * of w packed on the way, since a second, packed copy of the base would take as much memory again.
 * A result's sums run in one order whatever the threads, so they change no bit.
 */
#pragma once
#include "matrix_unit.h"

#define TALL 8        /* rows of a tile of vectors */
#define GROUP 3       /* panels of it */
#define STRETCH 192   /* inputs of it that stay in the nearest cache */
#define TERMS 6
#define ROW_NUMBERS (1 << 20) /* of placed rows that are multiplied before the next ones are */

/* Float32 vectors, pairs of bfloat16 by vectors, or pairs by the matrix unit. */
typedef enum { BY_FLOAT, BY_PAIRS, BY_UNIT } Way;

/* Element (i, j), of row or output i and input j: data[i stride + j], or data[j stride + i] where it
 * is turned. */
typedef struct {
    const void *data;
    int64_t stride;
    int narrow, turned; /* bfloat16; which way it lies */
    float scale;
} Matrix;

/* Rows of one or more products: [M, K]. */
typedef struct {
    Matrix x;
    int64_t M, K;
    void *place;
} Side;

typedef struct {
    const Side *side;
    Matrix w;
} Term;

/* What is done with the sums y [end - first, width] of `count` columns, and with those of a twin. */
typedef void (*Finish)(void *work, int64_t column, int64_t count, int64_t first, int64_t end,
                       const float *y, const float *twin, int64_t width);

typedef struct Product {
    Term term[TERMS];
    int terms;
    int64_t N;
    const struct Product *twin; /* of the same shape, multiplied with this one; or NULL */
    Finish finish;              /* instead of `out` */
    void *work;
    void *out; /* y + bias + added [M, N], or scale y turned, [N, M]; NULL: not wanted */
    int64_t apart; /* from one row of it, and of what is added, to the next */
    const void *bias, *added;
    int out_narrow, bias_narrow, added_narrow, out_turned;
    float out_scale;
} Product;

INLINE int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE int64_t padded(int64_t n) { return up_to(n, LANES); }
/* Inputs, with zeros up to what the unit takes at once. */
INLINE int64_t inputs_of(Way way, int64_t K) {
    return way == BY_UNIT ? up_to(K, UNIT_INPUTS) : way == BY_PAIRS ? up_to(K, 2) : K;
}
/* Placed inputs of a row: rows that lie a multiple of 1 KB apart would share few lines of a cache. */
INLINE int64_t apart_of(Way way, int64_t K) {
    const int64_t inputs = inputs_of(way, K);
    return way == BY_UNIT && inputs % 512 == 0 ? inputs + UNIT_INPUTS : inputs;
}
INLINE size_t side_bytes(Way way, int64_t M, int64_t K) {
    return up_to(M, 32) * apart_of(way, K) * (way == BY_FLOAT ? 4 : 2);
}
INLINE size_t sums_floats(int64_t M, int64_t N) { return up_to(M, 32) * padded(N); }

INLINE Matrix plain(const void *data, int64_t stride, int narrow) {
    return (Matrix){data, stride, narrow, 0, 1};
}
INLINE Matrix turned(const void *data, int64_t stride, int narrow) {
    return (Matrix){data, stride, narrow, 1, 1};
}

/* ---- numbers ---- */

INLINE float read_one(const void *data, int narrow, int64_t at) {
    return narrow ? one_from_bfloat16(((const uint16_t *)data)[at]) : ((const float *)data)[at];
}
INLINE vec read_vec(const void *data, int narrow, int64_t at) {
    return narrow ? from_bfloat16((const uint16_t *)data + at)
                  : *(const vec *)((const float *)data + at);
}

/* To bfloat16, to nearest even. */
INLINE uint16_t narrowed(float value) {
    const union { float value; uint32_t bits; } u = {.value = value};
    return value == value ? (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16 : 0x7fc0;
}
INLINE void write_one(void *data, int narrow, int64_t at, float value) {
    if (narrow) ((uint16_t *)data)[at] = narrowed(value);
    else ((float *)data)[at] = value;
}
INLINE void write_vec(void *data, int narrow, int64_t at, vec value) {
    if (!narrow) {
        *(vec *)((float *)data + at) = value;
        return;
    }
#ifdef __AVX512BF16__
    const __m256bh half = _mm512_cvtneps_pbh((__m512)value);
    memcpy((uint16_t *)data + at, &half, sizeof half);
#else
    for (int i = 0; i < LANES; i++) ((uint16_t *)data)[at + i] = narrowed(value[i]);
#endif
}

#define SWAP(I, J, LOW, HIGH)                                                                     \
    do {                                                                                          \
        const vec low = __builtin_shufflevector(r[I], r[J], LOW);                                 \
        r[J] = __builtin_shufflevector(r[I], r[J], HIGH), r[I] = low;                             \
    } while (0)

INLINE void transpose(vec r[16]) {
    for (int i = 0; i < 8; i++) SWAP(i, i + 8, EIGHTS, OTHER_EIGHTS);
    for (int i = 0; i < 8; i++) SWAP(i + i / 4 * 4, i + i / 4 * 4 + 4, FOURS, OTHER_FOURS);
    for (int i = 0; i < 8; i++) SWAP(i + i / 2 * 2, i + i / 2 * 2 + 2, TWOS, OTHER_TWOS);
    for (int i = 0; i < 8; i++) SWAP(2 * i, 2 * i + 1, ONES, OTHER_ONES);
}

/* 16 rows from i by 16 inputs from j, zeros beyond rows and inputs; r[k] is a row, or an input where
 * the matrix is turned. */
INLINE void read_block(const Matrix *m, int64_t i, int64_t rows, int64_t j, int64_t inputs, vec r[16]) {
    const int64_t first = m->turned ? j : i, across = m->turned ? i : j;
    const int64_t lines = m->turned ? inputs - j : rows - i, width = m->turned ? rows - i : inputs - j;
    for (int k = 0; k < LANES; k++) {
        r[k] = (vec){0};
        if (k >= lines) continue;
        const int64_t at = (first + k) * m->stride + across;
        if (width >= LANES) r[k] = read_vec(m->data, m->narrow, at);
        else
            for (int l = 0; l < width; l++) r[k][l] = read_one(m->data, m->narrow, at + l);
        if (m->scale != 1) r[k] *= m->scale;
    }
}

#ifdef __AVX512BF16__
/* Lanes of two vectors, rounded, each beside the other. */
INLINE vec beside(vec first, vec second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    return (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
/* 32 inputs in a row: those of one vector, then of the other. */
INLINE vec behind(vec first, vec second) {
    return (vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
/* Which 16-bit numbers of two lines of 32 columns make the pairs of the first 16, and the others. */
static const uint16_t FIRST_PAIRS[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
static const uint16_t OTHER_PAIRS[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21,
                                         53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                         27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
#endif

/* ---- rows to where a tile reads them ---- */

/* Rows from m, 16 of them: [K][8] twice, pairs so, or [m][K] in bfloat16. */
static void place_rows(const Side *s, Way way, int64_t m) {
    const int64_t K = s->K, apart = apart_of(way, K);
    vec r[LANES];
    if (way == BY_FLOAT) {
        float *low = (float *)s->place + m * apart, *high = low + TALL * apart;
        for (int64_t k = 0; k < K; k += LANES) {
            read_block(&s->x, m, s->M, k, K, r);
            if (!s->x.turned) transpose(r);
            for (int64_t i = 0; i < LANES && k + i < K; i++) {
                const union { vec whole; float half[2][8]; } u = {r[i]};
                memcpy(low + (k + i) * TALL, u.half[0], sizeof u.half[0]);
                memcpy(high + (k + i) * TALL, u.half[1], sizeof u.half[1]);
            }
        }
        return;
    }
#ifdef __AVX512BF16__
    vec other[LANES];
    for (int64_t k = 0; k < apart; k += 2 * LANES) {
        read_block(&s->x, m, s->M, k, K, r);
        read_block(&s->x, m, s->M, k + LANES, K, other);
        if (way == BY_UNIT) {
            if (s->x.turned) transpose(r), transpose(other);
            for (int i = 0; i < LANES; i++) {
                const vec line = behind(r[i], other[i]);
                memcpy((uint16_t *)s->place + (m + i) * apart + k, &line, sizeof line);
            }
            continue;
        }
        vec pairs[LANES];
        for (int i = 0; i < LANES; i++) {
            if (!s->x.turned) pairs[i] = behind(r[i], other[i]);
            else pairs[i] = i < 8 ? beside(r[2 * i], r[2 * i + 1])
                                  : beside(other[2 * i - LANES], other[2 * i - LANES + 1]);
        }
        vec *q = pairs;
        if (!s->x.turned) {
            for (int i = 0; i < LANES; i++) r[i] = pairs[i];
            transpose(r);
            q = r;
        }
        float *low = (float *)s->place + m * apart / 2, *high = low + TALL * apart / 2;
        for (int64_t i = 0; i < LANES && k + 2 * i < apart; i++) {
            const union { vec whole; float half[2][8]; } u = {q[i]};
            memcpy(low + (k / 2 + i) * TALL, u.half[0], sizeof u.half[0]);
            memcpy(high + (k / 2 + i) * TALL, u.half[1], sizeof u.half[1]);
        }
    }
#endif
}

/* ---- columns of a matrix to a panel ---- */

/* Inputs from..to of 16 outputs from n, [inputs][16] or [inputs / 2][16][2]; zeros beyond N and K.
 * `from` is a multiple of 32, and so is the count of pairs. */
static void pack_panel(const Matrix *w, int64_t N, int64_t K, int64_t n, Way way, int64_t from,
                       int64_t to, float *out) {
    vec r[LANES];
    if (way == BY_FLOAT) {
        for (int64_t k = from; k < to; k += LANES) {
            read_block(w, n, N, k, K, r);
            if (!w->turned) transpose(r);
            for (int64_t i = 0; i < LANES && k + i < to; i++)
                *(vec *)(out + (k - from + i) * LANES) = r[i];
        }
        return;
    }
#ifdef __AVX512BF16__
    const int is_whole = n + LANES <= N, is_raw = w->narrow && w->scale == 1 && is_whole;
    const uint16_t *data = w->data;
    vec other[LANES];
    for (int64_t k = from; k < to; k += 2 * LANES) {
        float *place = out + (k - from) / 2 * LANES;
        const int64_t steps = to - k < 2 * LANES ? (to - k) / 2 : LANES;
        if (is_raw && k + 2 * LANES <= K) {
            if (w->turned) {
                for (int i = 0; i < LANES; i++) {
                    const uint16_t *line = data + (k + 2 * i) * w->stride + n;
                    const __m512i low = _mm512_cvtepu16_epi32(*(const __m256i_u *)line);
                    const __m512i high = _mm512_cvtepu16_epi32(*(const __m256i_u *)(line + w->stride));
                    ((vec *)place)[i] = (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                }
                continue;
            }
            for (int i = 0; i < LANES; i++) r[i] = *(const vec *)(data + (n + i) * w->stride + k);
            transpose(r);
            for (int i = 0; i < LANES; i++) ((vec *)place)[i] = r[i];
            continue;
        }
        read_block(w, n, N, k, K, r);
        read_block(w, n, N, k + LANES, K, other);
        if (w->turned) {
            for (int i = 0; i < steps; i++)
                ((vec *)place)[i] = i < 8 ? beside(r[2 * i], r[2 * i + 1])
                                          : beside(other[2 * i - LANES], other[2 * i - LANES + 1]);
            continue;
        }
        for (int i = 0; i < LANES; i++) r[i] = behind(r[i], other[i]);
        transpose(r);
        for (int i = 0; i < steps; i++) ((vec *)place)[i] = r[i];
    }
#endif
}

/* Two panels at once of a turned matrix in bfloat16, which is how the base lies in a backward pass. */
static int pack_two(const Matrix *w, int64_t N, int64_t K, int64_t n, int64_t to, float *out,
                    float *second) {
#ifdef __AVX512BF16__
    if (!w->turned || !w->narrow || w->scale != 1 || n + 2 * LANES > N) return 0;
    const __m512i first = _mm512_loadu_si512(FIRST_PAIRS), others = _mm512_loadu_si512(OTHER_PAIRS);
    const __m512i none = _mm512_setzero_si512();
    const uint16_t *line = (const uint16_t *)w->data + n;
    const int64_t stride = w->stride;
    for (int64_t k = 0; k < to; k += 2, line += 2 * stride) {
        const __m512i low = k < K ? _mm512_loadu_si512(line) : none;
        const __m512i high = k + 1 < K ? _mm512_loadu_si512(line + stride) : none;
        ((vec *)out)[k / 2] = (vec)_mm512_permutex2var_epi16(low, first, high);
        ((vec *)second)[k / 2] = (vec)_mm512_permutex2var_epi16(low, others, high);
    }
    return 1;
#else
    (void)w, (void)N, (void)K, (void)n, (void)to, (void)out, (void)second;
    return 0;
#endif
}

/* ---- what is multiplied next, asked for meanwhile ---- */

#define LINE 64

/* Where in the columns of a product the asking has come to: lines along the inputs, or across the
 * outputs of a matrix that is turned. */
typedef struct {
    const Product *p; /* NULL: nothing comes next */
    int64_t column, width; /* outputs */
    int term;
    const char *row;
    int64_t part, along, apart, rows; /* bytes; rows that are left */
    int64_t quota; /* lines that are asked for at once */
} Ahead;

INLINE int64_t bytes_along(const Ahead *a, const Term *t) {
    return (t->w.turned ? a->width : t->side->K) * (t->w.narrow ? 2 : 4);
}
INLINE int64_t rows_along(const Ahead *a, const Term *t) {
    return t->w.turned ? t->side->K : a->width;
}

/* Ask for columns of a product in so many turns. */
static Ahead ahead_of(const Product *p, int64_t column, int64_t width, int64_t turns) {
    Ahead a = {.p = p, .column = column, .width = width};
    if (!p) return a;
    if (width > p->N - column) a.width = p->N - column;
    int64_t all = 0;
    for (int t = 0; t < p->terms; t++)
        all += (bytes_along(&a, &p->term[t]) + LINE - 1) / LINE * rows_along(&a, &p->term[t]);
    a.quota = all / turns + 1;
    return a;
}

static int next_term(Ahead *a) {
    if (!a->p || a->term == a->p->terms) return 0;
    const Term *t = &a->p->term[a->term++];
    const int64_t bytes = t->w.narrow ? 2 : 4;
    a->along = bytes_along(a, t), a->rows = rows_along(a, t), a->apart = t->w.stride * bytes;
    a->row = (const char *)t->w.data + a->column * (t->w.turned ? bytes : a->apart), a->part = 0;
    return 1;
}

INLINE void fetch_ahead(Ahead *a) {
    for (int64_t left = a->quota; left > 0; left--) {
        if (!a->rows && !next_term(a)) return;
        __builtin_prefetch(a->row + a->part, 0, 2);
        a->part += LINE;
        if (a->part >= a->along) a->part = 0, a->row += a->apart, a->rows--;
    }
}

/* ---- some columns of a product ---- */

/* Around all stages of a thread. */
static void enter_way(Way way) {
#if HAS_MATRIX_UNIT
    if (way == BY_UNIT) enter_matrix_unit(UNIT_ROWS);
#endif
    (void)way;
}
static void leave_way(Way way) {
#if HAS_MATRIX_UNIT
    if (way == BY_UNIT) leave_matrix_unit();
#endif
    (void)way;
}

/* y [8, panels 16] = or += x w' of a stretch: x [steps][8], w [panels][steps][16], in float32, or pairs
 * of bfloat16. */
INLINE void vector_sums(const int panels, const int is_pairs, const float *x, const float *w,
                        int64_t steps, float *y, int64_t N, int adds) {
    vec acc[TALL][GROUP];
#pragma GCC unroll 8
    for (int m = 0; m < TALL; m++)
#pragma GCC unroll 3
        for (int p = 0; p < panels; p++)
            acc[m][p] = adds ? *(const vec *)(y + m * N + p * LANES) : (vec){0};
    const float *second = w + steps * LANES, *third = second + steps * LANES;
    for (int64_t k = 0; k < steps; k++, x += TALL, w += LANES, second += LANES, third += LANES) {
        vec columns[GROUP] = {*(const vec *)w};
        if (panels > 1) columns[1] = *(const vec *)second;
        if (panels > 2) columns[2] = *(const vec *)third;
#pragma GCC unroll 8
        for (int m = 0; m < TALL; m++)
#pragma GCC unroll 3
            for (int p = 0; p < panels; p++) {
#ifdef __AVX512BF16__
                if (is_pairs) {
                    const __m512bh both = (__m512bh)_mm512_set1_ps(x[m]);
                    acc[m][p] = (vec)_mm512_dpbf16_ps((__m512)acc[m][p], both, (__m512bh)columns[p]);
                    continue;
                }
#endif
                acc[m][p] += columns[p] * x[m];
            }
    }
#pragma GCC unroll 8
    for (int m = 0; m < TALL; m++)
#pragma GCC unroll 3
        for (int p = 0; p < panels; p++) *(vec *)(y + m * N + p * LANES) = acc[m][p];
    (void)is_pairs, (void)second, (void)third;
}

#define VECTORS(PANELS)                                                                           \
    if (way == BY_FLOAT) vector_sums(PANELS, 0, x, w, steps, y, N, adds);                         \
    else vector_sums(PANELS, 1, x, w, steps, y, N, adds)

static void vector_tile(Way way, int panels, const float *x, const float *w, int64_t steps, float *y,
                        int64_t N, int adds) {
    if (panels == 3) {
        VECTORS(3);
    } else if (panels == 2) {
        VECTORS(2);
    } else {
        VECTORS(1);
    }
}

/* By vectors: panels from `panel`, rows from `first` to `end`, to y [rows, N] or added to it. */
static void multiply_columns(const Product *p, Way way, int64_t panel, int some, int64_t first,
                             int64_t end, float *packed, Ahead *ahead, float *y, int64_t N, int adds) {
    const int step = way == BY_FLOAT ? 1 : 2;
    int is_first = !adds;
    for (int t = 0; t < p->terms; t++) {
        const Side *s = p->term[t].side;
        const int64_t K = inputs_of(way, s->K), apart = apart_of(way, s->K);
        for (int64_t from = 0; from < K; from += STRETCH, is_first = 0) {
            const int64_t to = from + STRETCH < K ? from + STRETCH : K, steps = (to - from) / step;
            for (int i = 0; i < some; i++)
                pack_panel(&p->term[t].w, p->N, s->K, (panel + i) * LANES, way, from, to,
                           packed + i * steps * LANES);
            for (int64_t m = first; m < end; m += TALL) {
                fetch_ahead(ahead);
                vector_tile(way, some, (const float *)s->place + m * (apart / step) + from / step * TALL,
                            packed, steps, y + (m - first) * N, N, !is_first);
            }
        }
    }
}

#if HAS_MATRIX_UNIT
typedef struct {
    const uint16_t *x; /* of the first row */
    int64_t apart, K;
    const char *panel;
} Reach;

/* 16 or 32 rows by one or two panels; both are constants after inlining. */
INLINE void unit_sums(const Reach *reach, int terms, int64_t m, const int tall, const int wide,
                      int64_t across, float *y, int64_t N, Ahead *ahead, int adds) {
    const int64_t bytes = N * sizeof(float);
    Ahead asked = *ahead;
    BARRIER;
    if (adds) {
        _tile_loadd(0, y, bytes);
        if (tall > 1) _tile_loadd(1, y + UNIT_ROWS * N, bytes);
        if (wide > 1) _tile_loadd(2, y + LANES, bytes);
        if (tall > 1 && wide > 1) _tile_loadd(3, y + UNIT_ROWS * N + LANES, bytes);
    } else {
        _tile_zero(0);
        if (tall > 1) _tile_zero(1);
        if (wide > 1) _tile_zero(2);
        if (tall > 1 && wide > 1) _tile_zero(3);
    }
    for (int t = 0; t < terms; t++) {
        const int64_t stride = reach[t].apart * 2;
        const uint16_t *x = reach[t].x + m * reach[t].apart, *lower = x + UNIT_ROWS * reach[t].apart;
        const char *w = reach[t].panel;
        for (int64_t k = 0; k < reach[t].K; k += UNIT_INPUTS, w += UNIT_INPUTS * 32) {
            fetch_ahead(&asked);
            _tile_loadd(6, w, 64);
            _tile_loadd(4, x + k, stride);
            _tile_dpbf16ps(0, 4, 6);
            if (tall > 1) {
                _tile_loadd(5, lower + k, stride);
                _tile_dpbf16ps(1, 5, 6);
            }
            if (wide > 1) {
                _tile_loadd(7, w + across, 64);
                _tile_dpbf16ps(2, 4, 7);
                if (tall > 1) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    *ahead = asked;
    _tile_stored(0, y, bytes);
    if (tall > 1) _tile_stored(1, y + UNIT_ROWS * N, bytes);
    if (wide > 1) _tile_stored(2, y + LANES, bytes);
    if (tall > 1 && wide > 1) _tile_stored(3, y + UNIT_ROWS * N + LANES, bytes);
    BARRIER;
}

/* The same by the unit: one or two panels. */
static void unit_columns(const Product *p, int64_t panel, int some, int64_t first, int64_t end,
                         float *packed, Ahead *ahead, float *y, int64_t N, int adds) {
    Reach reach[TERMS];
    int64_t all = 0;
    for (int t = 0; t < p->terms; t++) all += inputs_of(BY_UNIT, p->term[t].side->K);
    const int64_t across = all / 2 * LANES;
    float *place = packed;
    for (int t = 0; t < p->terms; t++) {
        const Side *s = p->term[t].side;
        const int64_t K = inputs_of(BY_UNIT, s->K);
        const Matrix *w = &p->term[t].w;
        if (some < 2 || !pack_two(w, p->N, s->K, panel * LANES, K, place, place + across))
            for (int i = 0; i < some; i++)
                pack_panel(w, p->N, s->K, (panel + i) * LANES, BY_UNIT, 0, K, place + i * across);
        reach[t] = (Reach){s->place, apart_of(BY_UNIT, s->K), K, (const char *)place};
        place += K / 2 * LANES;
    }
    for (int64_t m = first; m < end; m += 2 * UNIT_ROWS, y += 2 * UNIT_ROWS * N) {
        const int is_tall = end - m > UNIT_ROWS;
        if (is_tall && some > 1) unit_sums(reach, p->terms, m, 2, 2, across * 4, y, N, ahead, adds);
        else if (is_tall) unit_sums(reach, p->terms, m, 2, 1, across * 4, y, N, ahead, adds);
        else if (some > 1) unit_sums(reach, p->terms, m, 1, 2, across * 4, y, N, ahead, adds);
        else unit_sums(reach, p->terms, m, 1, 1, across * 4, y, N, ahead, adds);
    }
}
#endif

/* The sums y [end - first, width] of some columns to where they go. */
static void hand_out(const Product *p, int64_t M, int64_t column, int64_t first, int64_t end,
                     const float *y, int64_t width) {
    const int64_t apart = p->apart, count = p->N - column < width ? p->N - column : width;
    const int narrow = p->out_narrow, added_narrow = p->added_narrow, bias_narrow = p->bias_narrow;
    const float scale = p->out_scale;
    const void *bias = p->bias, *added = p->added;
    void *out = p->out;
    if (p->out_turned) {
        for (int64_t n = 0; n < count; n += LANES)
            for (int64_t m = first; m < end; m += LANES) {
                vec r[LANES]; /* y is padded to whole blocks */
                for (int i = 0; i < LANES; i++)
                    r[i] = *(const vec *)(y + (m - first + i) * width + n) * scale;
                transpose(r);
                for (int64_t i = 0; i < LANES && n + i < count; i++) {
                    const int64_t at = (column + n + i) * M + m;
                    if (m + LANES <= end) write_vec(out, narrow, at, r[i]);
                    else
                        for (int64_t j = 0; m + j < end; j++) write_one(out, narrow, at + j, r[i][j]);
                }
            }
        return;
    }
    for (int64_t m = first; m < end; m++, y += width) {
        const int64_t at = m * apart + column;
        int64_t n = 0;
        for (; n + LANES <= count; n += LANES) {
            vec sum = *(const vec *)(y + n);
            if (bias) sum += read_vec(bias, bias_narrow, column + n);
            if (added) sum += read_vec(added, added_narrow, at + n);
            write_vec(out, narrow, at + n, sum);
        }
        for (; n < count; n++) {
            float sum = y[n];
            if (bias) sum += read_one(bias, bias_narrow, column + n);
            if (added) sum += read_one(added, added_narrow, at + n);
            write_one(out, narrow, at + n, sum);
        }
    }
}

/* ---- a stage: what is placed, then multiplied, at once ---- */

#define MOST 12

typedef struct {
    const Side *side[MOST];
    Product product[MOST];
    int sides, products;
    atomic_long placed, multiplied;
} Stage;

INLINE int64_t rows_of(const Product *p) { return p->term[0].side->M; }
INLINE int64_t all_inputs(const Product *p, Way way) {
    int64_t all = 0;
    for (int t = 0; t < p->terms; t++) all += inputs_of(way, p->term[t].side->K);
    return all;
}
INLINE int width_of(Way way) { return way == BY_UNIT ? 2 : GROUP; }
INLINE int64_t groups_of(const Product *p, Way way) {
    return (padded(p->N) / LANES + width_of(way) - 1) / width_of(way);
}
/* Rows that are multiplied before the next ones are: their inputs stay in the cache. */
INLINE int64_t block_of(const Product *p, Way way) {
    const int64_t rows = ROW_NUMBERS / all_inputs(p, way) / 32 * 32;
    return rows < 128 ? 128 : rows;
}
INLINE int64_t items_of(const Product *p, Way way) {
    const int64_t block = block_of(p, way);
    return groups_of(p, way) * ((rows_of(p) + block - 1) / block);
}

INLINE int64_t stretches_of(const Product *p, Way way) {
    int64_t all = 0;
    for (int t = 0; t < p->terms; t++)
        all += (inputs_of(way, p->term[t].side->K) + STRETCH - 1) / STRETCH;
    return all;
}

/* Room of a thread for packed columns and, twice, for their sums of so many rows. */
static float *room_for(const Product *p, Way way, int64_t rows, float **sums) {
    const int64_t width = width_of(way) * LANES;
    const int64_t packed = width * (way == BY_UNIT ? all_inputs(p, way) / 2 : STRETCH);
    const int64_t each = up_to(rows, 32) * width;
    float *room = scratch(1, packed + 2 * each);
    if (sums) sums[0] = room + packed, sums[1] = sums[0] + each;
    return room;
}

static int multiply_item(const Product *p, Way way, int64_t item, const Product *next,
                         int64_t next_item) {
    const int64_t M = rows_of(p), groups = groups_of(p, way), block = block_of(p, way);
    const int64_t panel = item % groups * width_of(way), left = padded(p->N) / LANES - panel;
    const int64_t first = item / groups * block, end = first + block < M ? first + block : M;
    const int some = left < width_of(way) ? (int)left : width_of(way);
    const int64_t columns = width_of(way) * LANES, tall = way == BY_UNIT ? 2 * UNIT_ROWS : TALL;
    const int64_t steps = way == BY_UNIT ? all_inputs(p, way) / UNIT_INPUTS : stretches_of(p, way);
    const int64_t turns = (end - first + tall - 1) / tall * steps;
    const int64_t next_column = next ? next_item % groups_of(next, way) * columns : 0;
    float *sums[2], *packed = room_for(p, way, end - first, sums);
    if (!packed) return 1;
    for (int i = 0; i < 1 + !!p->twin; i++) {
        const Product *own = i ? p->twin : p;
        Ahead ahead = ahead_of(next && i ? next->twin : next, next_column, columns, turns);
#if HAS_MATRIX_UNIT
        if (way == BY_UNIT) unit_columns(own, panel, some, first, end, packed, &ahead, sums[i], columns, 0);
        else
#endif
            multiply_columns(own, way, panel, some, first, end, packed, &ahead, sums[i], columns, 0);
        if (own->out) hand_out(own, M, panel * LANES, first, end, sums[i], columns);
    }
    if (!p->finish) return 0;
    const int64_t column = panel * LANES, count = p->N - column < columns ? p->N - column : columns;
    p->finish(p->work, column, count, first, end, sums[0], sums[1], columns);
    return 0;
}

/* The product that an item of a stage belongs to, or NULL beyond the last; the item becomes its own. */
static const Product *product_at(const Stage *s, Way way, int64_t *item) {
    for (int i = 0; i < s->products; i++) {
        const int64_t items = items_of(&s->product[i], way);
        if (*item < items) return &s->product[i];
        *item -= items;
    }
    return NULL;
}

/* Run a stage; all threads have met at its end. Returns 1 where memory ran out. */
static int run_stage(Stage *s, Way way, int parts) {
    int64_t from, to, total = 0, failed = 0;
    for (int i = 0; i < s->sides; i++) total += up_to(s->side[i]->M, LANES) / LANES;
    while (take(&s->placed, 1, total, &from, &to)) {
        int i = 0;
        for (int64_t tiles; from >= (tiles = up_to(s->side[i]->M, LANES) / LANES); i++) from -= tiles;
        place_rows(s->side[i], way, from * LANES);
    }
    meet(parts);
    total = 0;
    for (int i = 0; i < s->products; i++) total += items_of(&s->product[i], way);
    while (take(&s->multiplied, 1, total, &from, &to)) {
        int64_t next = from + parts; /* most likely */
        const Product *p = product_at(s, way, &from), *then = product_at(s, way, &next);
        failed |= multiply_item(p, way, from, then, next);
    }
    meet(parts);
    return (int)failed;
}
