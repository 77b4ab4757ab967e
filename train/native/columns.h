/* Some columns of a product: their part of the weight is packed, and all rows are multiplied by it.
 *
 * A product y [M, N] is a sum of terms x w', with w [N, K] or, turned, [K, N].
 */
#pragma once
#include "packing.h"

#define GROUP 3     /* panels of a tile of vectors */
#define STRETCH 192 /* inputs of it that stay in the nearest cache */
#define TERMS 6

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
    const struct Product *twin; /* of as many rows and columns, multiplied with this one; or NULL */
    Finish finish;              /* after both have gone to their `out`; or NULL */
    void *work;
    void *out; /* y + bias + added [M, N], or scale y turned, [N, M]; NULL: not wanted */
    int64_t apart; /* from one row of it, and of what is added, to the next */
    const void *bias, *added;
    int out_narrow, bias_narrow, added_narrow, out_turned;
    float out_scale;
} Product;

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
                const float *x = (const float *)s->place + m * (apart / step) + from / step * TALL;
                vector_tile(way, some, x, packed, steps, y + (m - first) * N, N, !is_first);
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

