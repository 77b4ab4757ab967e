/* Products of rows with packed weights, and the adapters of every row.
 *
 * The rows of x are placed so that a tile of panels.h reads one line a step; then groups of panels
 * are multiplied, each thread its own, and the adapters of their columns added.
 */
#pragma once
#include "matrix_unit.h"

#define FEW 16      /* rows that one tile takes; more go in tiles of TALL by GROUP panels */
#define TALL 8
#define GROUP 3     /* panels that are multiplied one stretch of inputs after the other */
#define STRETCH 288 /* inputs; a multiple of BLOCK */
#define STRIP 32    /* steps of rows that are placed at once */
#define MAX_SIBLINGS 8

typedef struct {
    const void *weight;
    const float *scale; /* of 8-bit integers: [panels][K/32][1 or 2][16], factors and offsets */
    const float *bias;  /* [N] or NULL */
    int64_t K, N;
    int32_t format;
    /* adapters: A [rows][siblings][K], B[s] [rows][size[s]]; siblings is 0 where there are none */
    int32_t siblings;
    int32_t active; /* whether adapters of the step at hand have a part here; for `forward` */
    int32_t narrow; /* A and B are bfloat16, not float32 */
    const void *a;
    const void *b[MAX_SIBLINGS];
    int64_t size[MAX_SIBLINGS];
} Product;

typedef struct {
    int64_t num_tokens;
    const int32_t *first; /* [N] where a token's rows begin in `rows` */
    const int32_t *count; /* [N] how many it has; 0 for the base */
    const int32_t *rows;
    int32_t most; /* the largest count */
} Adapters;

/* ---- a whole product, in parts that meet ---- */

typedef struct {
    const Product *P;
    const Adapters *A; /* NULL where no token has one */
    const float *x;
    int64_t M;
    float *y, *xt, *products;
    int tall, group, unpacks, by_unit;
    int format; /* the product's, or that of whole numbers */
    int64_t tiles, panels, groups;
    atomic_long next[3];
    atomic_int failed;
} Multiplication;

/* Whether the matrix unit computes a product, whatever its rows: how many there are changes no sum. */
static int uses_unit(const Product *P) {
#if HAS_MATRIX_UNIT
    return is_pairs(P->format) && P->K % UNIT_INPUTS == 0 && has_matrix_unit();
#else
    (void)P;
    return 0;
#endif
}

/* Whether a product is one of whole numbers. */
static int uses_integers(const Product *P) {
    return HAS_INTEGERS && is_q8(P->format) && is_pairs(P->format) && !uses_unit(P);
}

static Multiplication multiplication(const Product *P, const Adapters *A, const float *x, int64_t M,
                                     float *y) {
    Multiplication w = {.P = P, .x = x, .M = M, .y = y};
    const int few = M <= FEW;
    w.tall = !few ? TALL : M == 1 ? 1 : M <= 4 ? 4 : M <= 8 ? 8 : 16;
    w.group = w.tall == 1 ? together(1) : GROUP;
    w.by_unit = uses_unit(P);
    if (w.by_unit) w.tall = !few ? UNIT_ROWS : M ? M : 1, w.group = UNIT_PANELS;
    w.format = uses_integers(P) ? P->format - PAIRS_Q8 + INTEGERS : P->format;
    w.panels = (P->N + LANES - 1) / LANES;
    w.groups = (w.panels + w.group - 1) / w.group;
    w.tiles = (M + w.tall - 1) / w.tall;
    w.unpacks = (!few || w.by_unit) && w.format != F32 && w.format != PAIRS && !is_whole(w.format);
    w.A = A && P->siblings && A->most ? A : NULL;
    return w;
}

/* Floats of `xt`, `products` and a thread's unpacked weights. */
static int64_t placed_floats(const Multiplication *w) {
    return w->tiles * w->tall * steps_of(w->P->K, w->format);
}
static int64_t xt_floats(const Multiplication *w) {
    return placed_floats(w) + (is_whole(w->format) ? 2 * w->tiles * w->tall * w->P->K / BLOCK : 0);
}
/* Of whole numbers: the factors [tiles][blocks][tall] of the rows, and behind them the sums. */
static float *row_factors(const Multiplication *w, int64_t tile, int64_t block) {
    return w->xt + placed_floats(w) + (tile * (w->P->K / BLOCK) + block) * w->tall;
}
static float *row_sums(const Multiplication *w, int64_t tile, int64_t block) {
    return row_factors(w, w->tiles + tile, block);
}
static int64_t products_floats(const Multiplication *w) {
    return w->A ? w->A->num_tokens * w->P->siblings * w->A->most : 0;
}

static int64_t plain_floats(const Multiplication *w) {
    if (!w->unpacks) return 0;
    return w->group * LANES * (w->by_unit ? unit_stretch(w->M, w->P->K) / 2 : STRETCH);
}

/* ---- rows to where a tile reads them ---- */

/* 16 steps of row m of a tile. */
INLINE vec steps_at(const Multiplication *w, int64_t tile, int64_t m, int64_t step) {
    const float *row = w->x + (tile * w->tall + m) * w->P->K;
    const int pairs = is_pairs(w->format);
#if HAS_INTEGERS
    if (is_whole(w->format)) {
        const int64_t block = step / (BLOCK / 2);
        float *sum = has_offset(w->format) ? row_sums(w, tile, block) + m : NULL;
        return whole_inputs(row + 2 * step, row_factors(w, tile, block) + m, sum);
    }
#endif
#ifdef __AVX512BF16__
    if (pairs) {
        const float *first = row + 2 * step;
        return (vec)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(first + LANES), _mm512_loadu_ps(first));
    }
#endif
    (void)pairs;
    return *(const vec *)(row + step);
}

/* One step of a row of K. */
INLINE float step_at(const float *row, int64_t K, int64_t step, int pairs) {
    if (!pairs) return row[step];
#ifdef __AVX512BF16__
    const __m512 two = {row[2 * step], 2 * step + 1 < K ? row[2 * step + 1] : 0};
    return ((vec)_mm512_cvtne2ps_pbh(two, two))[0];
#else
    return 0; /* there are no pairs of bfloat16 here */
#endif
}

static void place_strip(const Multiplication *w, int64_t tile, int64_t from, int64_t to) {
    const int64_t K = w->P->K, steps = steps_of(K, w->format), first = tile * w->tall;
    const int tall = w->tall, pairs = is_pairs(w->format);
    const int64_t rows = w->M - first < tall ? w->M - first : tall;
    const float *x = w->x + first * K;
    float *out = w->xt + first * steps;
#if HAS_MATRIX_UNIT
    if (w->by_unit) { /* a strip is UNIT_INPUTS pairs, the last may be half of it */
        for (int64_t m = 0; m < tall; m++)
            for (int64_t s = from; s < to; s += LANES) {
                uint16_t *place = (uint16_t *)(out + m * steps + s);
                if (m < rows) narrow_inputs(x + m * K + 2 * s, place);
                else memset(place, 0, UNIT_INPUTS * sizeof *place);
            }
        return;
    }
#endif
    if (is_whole(w->format) && (tall < 8 || to - from < STRIP)) {
        for (int64_t m = 0; m < tall; m++)
            for (int64_t s = from; s < to; s += LANES) {
                const vec r = m < rows ? steps_at(w, tile, m, s) : (vec){0};
                for (int64_t i = 0; i < LANES; i++) out[(s + i) * tall + m] = r[i];
            }
        return;
    }
    if (tall < 8 || to - from < STRIP || to * (1 + pairs) > K) {
        for (int64_t m = 0; m < tall; m++)
            for (int64_t s = from; s < to; s++)
                out[s * tall + m] = m < rows ? step_at(x + m * K, K, s, pairs) : 0;
        return;
    }
    for (int64_t block = 0; block < tall / 8; block++) { /* 16 steps of 16 rows, or 32 of 8 */
        vec r[LANES];
        for (int m = 0; m < LANES; m++) {
            const int64_t step = from + (tall == LANES ? block : m / 8) * LANES;
            r[m] = m % tall < rows ? steps_at(w, tile, m % tall, step) : (vec){0};
        }
        transpose(r);
        float *place = out + (from + block * LANES) * tall;
        for (int s = 0; s < LANES; s++) {
            if (tall == LANES) {
                ((vec *)place)[s] = r[s];
                continue;
            }
            const union { vec whole; float half[2][8]; } u = {r[s]};
            memcpy(place + s * 8, u.half[0], sizeof u.half[0]);
            memcpy(place + (LANES + s) * 8, u.half[1], sizeof u.half[1]);
        }
    }
}

/* Rows of x to `xt`, [tiles][K][tall] or pairs of it, so that a tile reads one line a step. A piece
 * of work is a stretch of the inputs of all rows of a tile: threads that shared the lines of one
 * would take longer to pass them to and fro than the product takes. */
static void place_rows(Multiplication *w, int parts) {
    const int64_t steps = steps_of(w->P->K, w->format), strips = (steps + STRIP - 1) / STRIP;
    const int64_t total = w->tiles * strips;
    int64_t from, to;
    while (take(&w->next[0], piece_of(total, parts), total, &from, &to))
        for (int64_t i = from; i < to; i++) {
            const int64_t step = i % strips * STRIP, end = step + STRIP;
            place_strip(w, i / strips, step, end < steps ? end : steps);
        }
}

/* ---- the columns of a group of panels ---- */

static const float *scale_of(const Product *P, const float *scales, int64_t block) {
    return scales ? scales + block * (1 + has_offset(P->format)) * LANES : NULL;
}

/* The columns of a group of panels, one stretch of inputs after the other, so that its part of x
 * and of the weights stays in the nearest cache while all tiles and panels are multiplied. */
static void multiply_group(Multiplication *w, int64_t g, float *plain) {
    const Product *P = w->P;
    const int64_t panel = g * w->group, left = w->panels - panel, bytes = step_bytes(P->format);
    const int64_t steps = steps_of(P->K, w->format), blocks = (P->K + BLOCK - 1) / BLOCK;
    const int64_t stretch = w->tall == 1 ? steps : steps_of(STRETCH, w->format);
    const int some = left < w->group ? (int)left : w->group, width = together(w->tall);
    const char *weights = (const char *)P->weight + panel * steps * bytes;
    const float *scales = P->scale ? P->scale + panel * scale_floats(P->K, P->format) : NULL;
    Tile t = {.N = P->N, .blocks = blocks, .ahead_step = bytes, .ahead_apart = steps * bytes};
    for (int64_t from = 0; from < steps; from += t.steps) {
        t.steps = from + stretch < steps ? stretch : steps - from;
        t.is_first = from == 0, t.bias = from + t.steps == steps ? P->bias : NULL;
        const int64_t block = from / block_steps(P->format);
        for (int64_t p = 0; p < some && plain; p++)
            unpack(P->format, weights + (p * steps + from) * bytes,
                   scale_of(P, scales, p * blocks + block), t.steps, plain + p * t.steps * LANES);
        const char *next = weights + (from + t.steps < steps ? from + t.steps : some * steps) * bytes;
        for (int64_t i = 0; i < w->tiles; i++)
            for (int p = 0, panels; p < some; p += panels) {
                panels = some - p < width ? 1 : width;
                t.rows = w->M - i * w->tall < w->tall ? w->M - i * w->tall : w->tall;
                t.xt = w->xt + i * w->tall * steps + from * w->tall;
                if (is_whole(w->format))
                    t.factor = row_factors(w, i, block), t.sum = row_sums(w, i, block);
                t.y = w->y + i * w->tall * P->N, t.column = (panel + p) * LANES;
                t.ahead = i ? NULL : p + panels < some && !plain
                    ? weights + ((p + panels) * steps + from) * bytes : next;
                if (plain) {
                    t.weight = (const char *)(plain + p * t.steps * LANES), t.apart = t.steps;
                    multiply_tile(&t, w->tall, panels, is_pairs(P->format) ? PAIRS : F32);
                } else {
                    t.weight = weights + (p * steps + from) * bytes, t.apart = steps;
                    t.scale = scale_of(P, scales, p * blocks + block);
                    multiply_tile(&t, w->tall, panels, w->format);
                }
            }
    }
}

#if HAS_MATRIX_UNIT
/* The same by the matrix unit, all inputs at once. */
static void multiply_group_by_unit(Multiplication *w, int64_t g, float *plain) {
    const Product *P = w->P;
    const int64_t panel = g * w->group, left = w->panels - panel;
    const int64_t bytes = steps_of(P->K, P->format) * step_bytes(P->format);
    const int64_t floats = scale_floats(P->K, P->format);
    UnitTile t = {.x = (const uint16_t *)w->xt, .weight = (const char *)P->weight + panel * bytes,
                  .K = P->K, .N = P->N, .column = panel * LANES, .tall = w->tall, .y = w->y,
                  .bias = P->bias, .format = P->format, .plain = plain,
                  .scale = P->scale ? P->scale + panel * floats : NULL};
    multiply_by_unit(t, w->M, left < w->group ? (int)left : w->group);
}
#endif

INLINE vec factors(const void *place, const int narrow, int64_t i) {
    return narrow ? from_bfloat16((const uint16_t *)place + i) : *(const vec *)((const float *)place + i);
}
INLINE float factor(const void *place, const int narrow, int64_t i) {
    return narrow ? one_from_bfloat16(((const uint16_t *)place)[i]) : ((const float *)place)[i];
}

/* Tokens from n on, up to `end`, that have the same rows, at most TOGETHER. */
#define TOGETHER 4
static int alike(const Adapters *A, int64_t n, int64_t end) {
    int count = 1;
    while (count < TOGETHER && n + count < end && A->first[n + count] == A->first[n] &&
           A->count[n + count] == A->count[n])
        count++;
    return count;
}

/* out[t][j] = A[row j] x[t] for some tokens and the rows of their adapter, four at a time. */
INLINE void multiply_rows(const float *x, const int tokens, const void *a, const int narrow,
                          const int32_t *rows, int32_t count, int64_t apart, int64_t first,
                          int64_t K, float *out, int64_t out_apart) {
    for (int32_t j = 0; j < count; j += 4) {
        const int some = count - j < 4 ? count - j : 4;
        int64_t place[4];
        for (int r = 0; r < 4; r++) place[r] = rows[j + (r < some ? r : 0)] * apart + first;
        vec sum[TOGETHER][4] = {{{0}}};
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) {
            vec own[TOGETHER];
            for (int t = 0; t < tokens; t++) own[t] = *(const vec *)(x + t * K + k);
            for (int r = 0; r < 4; r++) {
                const vec row = factors(a, narrow, place[r] + k);
                for (int t = 0; t < tokens; t++) sum[t][r] += own[t] * row;
            }
        }
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < some; r++) {
                float rest = 0;
                for (int64_t i = k; i < K; i++) rest += x[t * K + i] * factor(a, narrow, place[r] + i);
                out[t * out_apart + j + r] = sum_of(sum[t][r]) + rest;
            }
    }
}

/* y[t][from..to) += B' products[t], all rows of the adapter while a stretch of y is in registers. */
INLINE void add_rows(const float *products, int64_t apart, const int tokens, const void *b,
                     const int narrow, const int32_t *rows, int32_t count, int64_t size,
                     int64_t from, int64_t to, float *y, int64_t N) {
    int64_t c = from;
    for (; c + LANES <= to; c += LANES) {
        vec sum[TOGETHER];
        for (int t = 0; t < tokens; t++) sum[t] = *(const vec *)(y + t * N + c);
        for (int32_t j = 0; j < count; j++) {
            const vec row = factors(b, narrow, rows[j] * size + c);
            for (int t = 0; t < tokens; t++) sum[t] += products[t * apart + j] * row;
        }
        for (int t = 0; t < tokens; t++) *(vec *)(y + t * N + c) = sum[t];
    }
    for (; c < to; c++)
        for (int t = 0; t < tokens; t++)
            for (int32_t j = 0; j < count; j++)
                y[t * N + c] += products[t * apart + j] * factor(b, narrow, rows[j] * size + c);
}

#define BY_TOKENS(TOKENS, CALL)                                                                   \
    switch (TOKENS) {                                                                             \
        case 1: CALL(1); break;                                                                   \
        case 2: CALL(2); break;                                                                   \
        case 3: CALL(3); break;                                                                   \
        default: CALL(4);                                                                         \
    }

/* products[token][sibling][row of the token's adapter] = A x */
static void multiply_a(Multiplication *w, int parts) {
    const Product *P = w->P;
    const Adapters *A = w->A;
    const int64_t S = P->siblings, K = P->K, N = A->num_tokens, most = A->most;
    const int64_t each = N < FEW ? 1 : TOGETHER, total = (N + each - 1) / each * S;
    int64_t from, to;
    while (take(&w->next[2], piece_of(total, parts), total, &from, &to))
        for (int64_t i = from; i < to; i++) {
            const int64_t s = i % S, begin = i / S * each, end = begin + each < N ? begin + each : N;
            int tokens;
            for (int64_t n = begin; n < end; n += tokens) {
                tokens = alike(A, n, end);
                const int32_t *rows = A->rows + A->first[n], count = A->count[n];
                const float *x = w->x + n * K;
                float *out = w->products + (n * S + s) * most;
#define MULTIPLY(TOKENS)                                                                          \
    if (P->narrow)                                                                                \
        multiply_rows(x, TOKENS, P->a, 1, rows, count, S * K, s * K, K, out, S * most);           \
    else multiply_rows(x, TOKENS, P->a, 0, rows, count, S * K, s * K, K, out, S * most)
                BY_TOKENS(tokens, MULTIPLY)
            }
        }
}

INLINE void fetch_rows(const void *b, int64_t bytes, const int32_t *rows, int32_t count, int64_t size,
                       int64_t from, int64_t to) {
    for (int32_t j = 0; j < count; j++)
        for (int64_t at = from * bytes; at < to * bytes; at += 64)
            __builtin_prefetch((const char *)b + rows[j] * size * bytes + at, 0, 2);
}

/* The adapters' part of columns from..to of y; `fetches`: only have the cache read what it takes. */
static void add_b(const Multiplication *w, int64_t from, int64_t to, int fetches) {
    const Product *P = w->P;
    const Adapters *A = w->A;
    const int64_t S = P->siblings, most = A->most, N = P->N;
    int tokens;
    for (int64_t n = 0; n < A->num_tokens; n += tokens) {
        tokens = alike(A, n, A->num_tokens);
        const int32_t *rows = A->rows + A->first[n], count = A->count[n];
        if (!count) continue;
        int64_t begin = 0; /* of the sibling's columns */
        for (int64_t s = 0; s < S; begin += P->size[s++]) {
            const int64_t size = P->size[s];
            const int64_t low = from > begin ? from - begin : 0;
            const int64_t high = to < begin + size ? to - begin : size;
            if (low >= high) continue;
            if (fetches) {
                fetch_rows(P->b[s], P->narrow ? 2 : 4, rows, count, size, low, high);
                continue;
            }
            const float *products = w->products + (n * S + s) * most;
            float *y = w->y + n * N + begin;
#define ADD(TOKENS)                                                                               \
    if (P->narrow)                                                                                \
        add_rows(products, S * most, TOKENS, P->b[s], 1, rows, count, size, low, high, y, N);     \
    else add_rows(products, S * most, TOKENS, P->b[s], 0, rows, count, size, low, high, y, N)
            BY_TOKENS(tokens, ADD)
        }
    }
}

static void multiply_part(void *work, int part, int parts) {
    Multiplication *w = work;
    (void)part;
    if (w->xt != w->x) place_rows(w, parts);
    if (w->A) multiply_a(w, parts);
    if (w->A || w->xt != w->x) meet(parts);
    float *plain = w->unpacks ? scratch(2, plain_floats(w)) : NULL;
    if (w->unpacks && !plain) atomic_store(&w->failed, 1);
#if HAS_MATRIX_UNIT
    if (w->by_unit) enter_matrix_unit(w->tall);
#endif
    int64_t from, to;
    while (take(&w->next[1], piece_of(w->groups, parts), w->groups, &from, &to)) {
        const int64_t columns = w->group * LANES, first = from * columns;
        const int64_t end = to * columns < w->P->N ? to * columns : w->P->N;
        if (w->A && w->M <= FEW) add_b(w, first, end, 1); /* while the base's part is computed */
        for (int64_t g = from; g < to && !(w->unpacks && !plain); g++) {
#if HAS_MATRIX_UNIT
            if (w->by_unit) {
                multiply_group_by_unit(w, g, plain);
                continue;
            }
#endif
            multiply_group(w, g, plain);
        }
        if (w->A) add_b(w, first, end, 0);
    }
#if HAS_MATRIX_UNIT
    if (w->by_unit) leave_matrix_unit();
#endif
}

/* y [M, N] = x [M, K] * weight' + bias + adapters. Returns 0, or 1 where memory ran out. */
int multiply(const Product *P, const Adapters *A, const float *x, int64_t M, float *y, int threads) {
    Multiplication w = multiplication(P, A, x, M, y);
    w.xt = M == 1 && !is_pairs(P->format) ? (float *)x : scratch(0, xt_floats(&w));
    w.products = w.A ? scratch(1, products_floats(&w)) : NULL;
    if (!w.xt || (w.A && !w.products)) return 1;
    share(multiply_part, &w, threads);
    return atomic_load(&w.failed);
}

/* Whether 8-bit weights are multiplied as whole numbers here. */
int multiplies_integers(void) { return HAS_INTEGERS; }

/* Whether this processor multiplies bfloat16. */
int multiplies_bfloat16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
