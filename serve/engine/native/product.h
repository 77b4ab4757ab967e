/* Products of rows with packed weights, and the adapters of every row.
 *
 * Weights lie in panels of 16 output columns, [panels][K][16], so that one vector holds 16 columns
 * of one input. A panel's numbers are float32, bfloat16, or 8-bit integers with a float32 factor
 * (and offset) for each column and 32 inputs, [panels][K/32][1 or 2][16]; they become float32 on
 * the way to the registers, and all sums are float32.
 *
 * Products of bfloat16, where the processor has them, round both sides to bfloat16 first and sum in
 * float32. Their panels hold two inputs side by side, [panels][K/2][16][2], bfloat16 or 8-bit.
 */
#pragma once
#include "base.h"

#define BLOCK 32 /* inputs that share a factor */
#define FEW 16   /* rows that one tile takes; more go in tiles of TALL by GROUP panels */
#define TALL 8
#define GROUP 3    /* panels that are multiplied one stretch of inputs after the other */
#define STRETCH 288 /* inputs; a multiple of BLOCK */
#define STRIP 32 /* inputs that are placed at once; even */
#define MAX_SIBLINGS 8

enum { F32, BF16, Q8, Q8_OFFSET, PAIRS, PAIRS_Q8, PAIRS_Q8_OFFSET };

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

/* ---- numbers of a panel ---- */

INLINE int is_pairs(int format) { return format >= PAIRS; }
INLINE int is_q8(int format) {
    return format == Q8 || format == Q8_OFFSET || format == PAIRS_Q8 || format == PAIRS_Q8_OFFSET;
}
INLINE int has_offset(int format) { return format == Q8_OFFSET || format == PAIRS_Q8_OFFSET; }

/* Steps along the inputs: of one, or of two where they are pairs. */
INLINE int64_t steps_of(int64_t K, int format) { return is_pairs(format) ? (K + 1) / 2 : K; }
INLINE int64_t block_steps(int format) { return is_pairs(format) ? BLOCK / 2 : BLOCK; }
INLINE int64_t step_bytes(int format) {
    return format == F32 || format == PAIRS ? 64 : format == Q8 || format == Q8_OFFSET ? 16 : 32;
}
/* Floats of a panel's factors and offsets. */
INLINE int64_t scale_floats(int64_t K, int format) {
    return is_q8(format) ? (K + BLOCK - 1) / BLOCK * (1 + has_offset(format)) * LANES : 0;
}

typedef struct {
    vec factor, offset; /* by column; of pairs: of the first 8 columns, each twice */
    vec high_factor, high_offset;
} Scale;

INLINE vec twice_low(vec v) {
    return __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}
INLINE vec twice_high(vec v) {
    return __builtin_shufflevector(v, v, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
}

INLINE Scale scale_at(const float *scale, int format, int64_t block) {
    if (!is_q8(format)) return (Scale){{0}, {0}, {0}, {0}};
    const vec *place = (const vec *)scale + block * (1 + has_offset(format));
    vec factor = place[0], offset = {0};
    if (has_offset(format)) offset = place[1];
    if (!is_pairs(format)) return (Scale){factor, offset, factor, offset};
    return (Scale){twice_low(factor), twice_low(offset), twice_high(factor), twice_high(offset)};
}

INLINE vec widen(const void *place) {
#ifdef __AVX512F__ /* GCC makes scalar code of the portable form */
    ints wide = (ints)_mm512_cvtepi8_epi32(*(const __m128i_u *)place);
#else
    ints wide = __builtin_convertvector(*(const bytes *)place, ints);
#endif
    return __builtin_convertvector(wide, vec);
}

/* 16 columns of one input. */
INLINE vec load(const char *weight, int format, int64_t step, Scale scale) {
    if (format == F32) return ((const vec *)weight)[step];
    if (format == BF16) return from_bfloat16((const uint16_t *)weight + step * LANES);
    vec whole = widen(weight + step * LANES) * scale.factor;
    return format == Q8_OFFSET ? whole + scale.offset : whole;
}

#ifdef __AVX512BF16__
/* 16 columns of two inputs. */
INLINE __m512bh load_pairs(const char *weight, int format, int64_t step, Scale scale) {
    if (format == PAIRS) return *(const __m512bh *)(weight + step * 64);
    vec low = widen(weight + step * 32) * scale.factor;
    vec high = widen(weight + step * 32 + 16) * scale.high_factor;
    if (format == PAIRS_Q8_OFFSET) low += scale.offset, high += scale.high_offset;
    return _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
#endif

/* ---- one tile ---- */

/* A stretch of the inputs, for up to `tall` rows and some panels of 16 columns. */
typedef struct {
    const float *xt;    /* [steps][tall] */
    const char *weight; /* [panels][steps], panels `apart` steps from one to the next */
    const char *ahead;  /* what is multiplied next, read into the cache meanwhile; or NULL */
    int64_t ahead_step, ahead_apart; /* bytes of a step, and from one panel to the next */
    const float *scale; /* of the first panel's first block; panels `blocks` from one to the next */
    int64_t steps, apart, blocks;
    int64_t rows, column, N;
    float *y;          /* [rows, N] */
    int is_first;      /* whether y begins here; else this is added to it */
    const float *bias; /* added where this is the last stretch; or NULL */
} Tile;

INLINE void begin(const Tile *t, int tall, int panels, vec *acc) {
    for (int i = 0; i < tall * panels; i++) acc[i] = (vec){0};
    if (t->is_first) return;
    for (int p = 0; p < panels; p++) {
        const int64_t c = t->column + p * LANES, left = t->N - c;
        for (int64_t m = 0; m < t->rows; m++) {
            const float *place = t->y + m * t->N + c;
            if (left >= LANES) acc[p * tall + m] = *(const vec *)place;
            else
                for (int64_t i = 0; i < left; i++) acc[p * tall + m][i] = place[i];
        }
    }
}

INLINE void store(const Tile *t, int tall, int panels, const vec *acc) {
    for (int p = 0; p < panels; p++) {
        const int64_t c = t->column + p * LANES, left = t->N - c;
        if (left <= 0) return;
        for (int64_t m = 0; m < t->rows; m++) {
            vec sum = acc[p * tall + m];
            float *place = t->y + m * t->N + c;
            if (left >= LANES) {
                if (t->bias) sum += *(const vec *)(t->bias + c);
                *(vec *)place = sum;
            } else {
                for (int64_t i = 0; i < left; i++)
                    place[i] = sum[i] + (t->bias ? t->bias[c + i] : 0);
            }
        }
    }
}

/* acc[panels][tall] += xt' * weight; `tall`, `panels` and `format` are constants after inlining. */
INLINE void tile(const Tile *t, const int tall, const int panels, const int format, vec *acc) {
    const float *xt = t->xt;
    const char *weight = t->weight, *ahead = t->ahead;
    const int64_t steps = t->steps, apart = t->apart;
    for (int64_t from = 0, b = 0; from < steps; from += block_steps(format), b++) {
        int64_t to = from + block_steps(format);
        if (to > steps) to = steps;
        Scale scales[8];
        for (int p = 0; p < panels; p++) scales[p] = scale_at(t->scale, format, p * t->blocks + b);
        for (int64_t k = from; k < to; k++) {
            if (tall > 1 && ahead)
                for (int p = 0; p < panels; p++)
                    __builtin_prefetch(ahead + p * t->ahead_apart + k * t->ahead_step, 0, 3);
#ifdef __AVX512BF16__
            if (is_pairs(format)) {
                __m512bh w[8];
                for (int p = 0; p < panels; p++)
                    w[p] = load_pairs(weight, format, p * apart + k, scales[p]);
                for (int m = 0; m < tall; m++) {
                    const __m512bh x = (__m512bh)_mm512_set1_ps(xt[k * tall + m]);
                    for (int p = 0; p < panels; p++) {
                        vec *sum = &acc[p * tall + m];
                        *sum = (vec)_mm512_dpbf16_ps((__m512)*sum, x, w[p]);
                    }
                }
                continue;
            }
#endif
            vec w[8];
            for (int p = 0; p < panels; p++) w[p] = load(weight, format, p * apart + k, scales[p]);
            for (int m = 0; m < tall; m++)
                for (int p = 0; p < panels; p++) acc[p * tall + m] += w[p] * xt[k * tall + m];
        }
    }
}

#define RUN_FORMAT(HEIGHT, PANELS, FORMAT)                                                        \
    case FORMAT: tile(t, HEIGHT, PANELS, FORMAT, acc); break;
#ifdef __AVX512BF16__
#define RUN_PAIRS(HEIGHT, PANELS)                                                                 \
    RUN_FORMAT(HEIGHT, PANELS, PAIRS)                                                             \
    RUN_FORMAT(HEIGHT, PANELS, PAIRS_Q8)                                                          \
    RUN_FORMAT(HEIGHT, PANELS, PAIRS_Q8_OFFSET)
#else
#define RUN_PAIRS(HEIGHT, PANELS)
#endif
#define SHAPE(HEIGHT, PANELS)                                                                     \
    static void tile_##HEIGHT##_##PANELS(const Tile *t, int format) {                             \
        vec acc[HEIGHT * PANELS];                                                                 \
        begin(t, HEIGHT, PANELS, acc);                                                            \
        switch (format) {                                                                         \
            RUN_FORMAT(HEIGHT, PANELS, F32)                                                       \
            RUN_FORMAT(HEIGHT, PANELS, BF16)                                                      \
            RUN_FORMAT(HEIGHT, PANELS, Q8)                                                        \
            RUN_FORMAT(HEIGHT, PANELS, Q8_OFFSET)                                                 \
            RUN_PAIRS(HEIGHT, PANELS)                                                             \
        }                                                                                         \
        store(t, HEIGHT, PANELS, acc);                                                            \
    }

SHAPE(1, 1)
SHAPE(1, 6)
SHAPE(4, 1)
SHAPE(4, 3)
SHAPE(8, 1)
SHAPE(8, 3)
SHAPE(16, 1)

/* Panels that one tile takes at a height: 6 to 24 sums in registers. */
INLINE int together(int tall) { return tall == 1 ? 6 : tall == 16 ? 1 : 3; }

static void multiply_tile(const Tile *t, int tall, int panels, int format) {
    if (tall == 1 && panels == 6) tile_1_6(t, format);
    else if (tall == 4 && panels == 3) tile_4_3(t, format);
    else if (tall == 8 && panels == 3) tile_8_3(t, format);
    else if (tall == 1) tile_1_1(t, format);
    else if (tall == 4) tile_4_1(t, format);
    else if (tall == 8) tile_8_1(t, format);
    else tile_16_1(t, format);
}

/* ---- a whole product, in parts that meet ---- */

typedef struct {
    const Product *P;
    const Adapters *A; /* NULL where no token has one */
    const float *x;
    int64_t M;
    float *y, *xt, *products;
    int tall, group, unpacks;
    int64_t tiles, panels, groups;
    atomic_long next[3];
    atomic_int failed;
} Multiplication;

static Multiplication multiplication(const Product *P, const Adapters *A, const float *x, int64_t M,
                                     float *y) {
    Multiplication w = {.P = P, .x = x, .M = M, .y = y};
    const int few = M <= FEW;
    w.tall = !few ? TALL : M == 1 ? 1 : M <= 4 ? 4 : M <= 8 ? 8 : 16;
    w.group = w.tall == 1 ? together(1) : GROUP;
    w.panels = (P->N + LANES - 1) / LANES;
    w.groups = (w.panels + w.group - 1) / w.group;
    w.tiles = (M + w.tall - 1) / w.tall;
    w.unpacks = !few && P->format != F32 && P->format != PAIRS;
    w.A = A && P->siblings && A->most ? A : NULL;
    return w;
}

/* Floats of `xt` and `products`. */
static int64_t xt_floats(const Multiplication *w) {
    return w->tiles * w->tall * steps_of(w->P->K, w->P->format);
}
static int64_t products_floats(const Multiplication *w) {
    return w->A ? w->A->num_tokens * w->P->siblings * w->A->most : 0;
}

#ifdef __AVX512BF16__
/* Pairs of a row from k0 to stop, one every `tall` places. */
static void scatter_pairs(const float *row, int64_t k0, int64_t stop, int64_t tall, float *column) {
    uint32_t *out = (uint32_t *)column;
    int64_t k = k0;
    for (; k + LANES <= stop; k += LANES) {
        union { __m256bh half; uint32_t pair[8]; } u = {
            .half = _mm512_cvtneps_pbh(_mm512_loadu_ps(row + k))};
        for (int i = 0; i < 8; i++) out[(k / 2 + i) * tall] = u.pair[i];
    }
    for (; k < stop; k += 2) {
        float two[LANES] = {row[k], k + 1 < stop ? row[k + 1] : 0};
        union { __m256bh half; uint32_t pair[8]; } u = {
            .half = _mm512_cvtneps_pbh(_mm512_loadu_ps(two))};
        out[k / 2 * tall] = u.pair[0];
    }
}
#endif

/* Rows of x to `xt`, [tiles][K][tall] or pairs of it, so that a tile reads one line a step. A piece
 * of work is a stretch of the inputs of all rows of a tile: threads that shared the lines of one
 * would take longer to pass them to and fro than the product takes. */
static void place_rows(Multiplication *w, int parts) {
    const int64_t K = w->P->K, tall = w->tall, strips = (K + STRIP - 1) / STRIP;
    const int64_t total = w->tiles * strips, format = w->P->format, steps = steps_of(K, format);
    int64_t from, to;
    while (take(&w->next[0], piece_of(total, parts), total, &from, &to))
        for (int64_t i = from; i < to; i++) {
            const int64_t first = i / strips * tall, k0 = i % strips * STRIP;
            const int64_t stop = k0 + STRIP < K ? k0 + STRIP : K;
            float *tile = w->xt + first * steps;
            for (int64_t m = 0; m < tall; m++) {
                const float *row = w->x + (first + m) * K;
                if (first + m >= w->M) {
                    const int64_t begin = is_pairs(format) ? k0 / 2 : k0;
                    for (int64_t k = begin; k < steps_of(stop, format); k++) tile[k * tall + m] = 0;
                    continue;
                }
#ifdef __AVX512BF16__
                if (is_pairs(format)) {
                    scatter_pairs(row, k0, stop, tall, tile + m);
                    continue;
                }
#endif
                for (int64_t k = k0; k < stop; k++) tile[k * tall + m] = row[k];
            }
        }
}

/* A stretch of the panels' weights as the numbers that are multiplied: [panels][count][16]. */
static void unpack(const Product *P, const char *weights, const float *scales, int panels,
                   int64_t from, int64_t count, float *plain) {
    const int64_t steps = steps_of(P->K, P->format), blocks = (P->K + BLOCK - 1) / BLOCK;
    for (int64_t p = 0; p < panels; p++)
        for (int64_t k = 0; k < count; k++) {
            const int64_t step = p * steps + from + k;
            const int64_t block = p * blocks + (from + k) / block_steps(P->format);
            const Scale scale = scale_at(scales, P->format, block);
#ifdef __AVX512BF16__
            if (is_pairs(P->format)) {
                ((__m512bh *)plain)[p * count + k] = load_pairs(weights, P->format, step, scale);
                continue;
            }
#endif
            ((vec *)plain)[p * count + k] = load(weights, P->format, step, scale);
        }
}

/* The columns of a group of panels, one stretch of inputs after the other, so that its part of x
 * and of the weights stays in the nearest cache while all tiles and panels are multiplied. */
static void multiply_group(Multiplication *w, int64_t g, float *plain) {
    const Product *P = w->P;
    const int64_t panel = g * w->group, left = w->panels - panel, bytes = step_bytes(P->format);
    const int64_t steps = steps_of(P->K, P->format), blocks = (P->K + BLOCK - 1) / BLOCK;
    const int64_t stretch = w->tall == 1 ? steps : steps_of(STRETCH, P->format);
    const int some = left < w->group ? (int)left : w->group, width = together(w->tall);
    const char *weights = (const char *)P->weight + panel * steps * bytes;
    const float *scales = P->scale ? P->scale + panel * scale_floats(P->K, P->format) : NULL;
    Tile t = {.N = P->N, .blocks = blocks, .ahead_step = bytes, .ahead_apart = steps * bytes};
    for (int64_t from = 0; from < steps; from += t.steps) {
        t.steps = from + stretch < steps ? stretch : steps - from;
        t.is_first = from == 0, t.bias = from + t.steps == steps ? P->bias : NULL;
        if (plain) unpack(P, weights, scales, some, from, t.steps, plain);
        const char *next = weights + (from + t.steps < steps ? from + t.steps : some * steps) * bytes;
        for (int64_t i = 0; i < w->tiles; i++)
            for (int p = 0, panels; p < some; p += panels) {
                panels = some - p < width ? 1 : width;
                t.rows = w->M - i * w->tall < w->tall ? w->M - i * w->tall : w->tall;
                t.xt = w->xt + i * w->tall * steps + from * w->tall;
                t.y = w->y + i * w->tall * P->N, t.column = (panel + p) * LANES;
                t.ahead = i ? NULL : p + panels < some && !plain
                    ? weights + ((p + panels) * steps + from) * bytes : next;
                if (plain) {
                    t.weight = (const char *)(plain + p * t.steps * LANES), t.apart = t.steps;
                    multiply_tile(&t, w->tall, panels, is_pairs(P->format) ? PAIRS : F32);
                } else {
                    t.weight = weights + (p * steps + from) * bytes, t.apart = steps;
                    const int64_t block = p * blocks + from / block_steps(P->format);
                    t.scale = scales ? scales + block * (1 + has_offset(P->format)) * LANES : NULL;
                    multiply_tile(&t, w->tall, panels, P->format);
                }
            }
    }
}

INLINE vec factors(const void *place, const int narrow, int64_t i) {
    return narrow ? from_bfloat16((const uint16_t *)place + i) : *(const vec *)((const float *)place + i);
}
INLINE float factor(const void *place, const int narrow, int64_t i) {
    return narrow ? one_from_bfloat16(((const uint16_t *)place)[i]) : ((const float *)place)[i];
}

/* out[j] = A[row j] x for the rows of one adapter, four at a time, so that x is read once for them. */
INLINE void multiply_rows(const float *x, const void *a, const int narrow, const int32_t *rows,
                          int32_t count, int64_t apart, int64_t first, int64_t K, float *out) {
    for (int32_t j = 0; j < count; j += 4) {
        const int some = count - j < 4 ? count - j : 4;
        int64_t place[4];
        for (int r = 0; r < 4; r++) place[r] = rows[j + (r < some ? r : 0)] * apart + first;
        vec sum[4] = {{0}};
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) {
            const vec own = *(const vec *)(x + k);
            for (int r = 0; r < 4; r++) sum[r] += own * factors(a, narrow, place[r] + k);
        }
        for (int r = 0; r < some; r++) {
            float rest = 0;
            for (int64_t i = k; i < K; i++) rest += x[i] * factor(a, narrow, place[r] + i);
            out[j + r] = sum_of(sum[r]) + rest;
        }
    }
}

/* products[token][sibling][row of the token's adapter] = A x */
static void multiply_a(Multiplication *w, int parts) {
    const Product *P = w->P;
    const Adapters *A = w->A;
    const int64_t S = P->siblings, K = P->K, total = A->num_tokens * S;
    int64_t from, to;
    while (take(&w->next[2], piece_of(total, parts), total, &from, &to))
        for (int64_t i = from; i < to; i++) {
            const int64_t n = i / S, s = i % S;
            const int32_t *rows = A->rows + A->first[n], count = A->count[n];
            const float *x = w->x + n * K;
            float *out = w->products + i * A->most;
            if (P->narrow) multiply_rows(x, P->a, 1, rows, count, S * K, s * K, K, out);
            else multiply_rows(x, P->a, 0, rows, count, S * K, s * K, K, out);
        }
}

/* y[from..to) += B' products, all rows of the adapter while a stretch of y is in a register. */
INLINE void add_rows(const float *products, const void *b, const int narrow, const int32_t *rows,
                     int32_t count, int64_t size, int64_t from, int64_t to, float *y) {
    int64_t c = from;
    for (; c + LANES <= to; c += LANES) {
        vec sum = *(const vec *)(y + c);
        for (int32_t j = 0; j < count; j++) sum += products[j] * factors(b, narrow, rows[j] * size + c);
        *(vec *)(y + c) = sum;
    }
    for (; c < to; c++)
        for (int32_t j = 0; j < count; j++)
            y[c] += products[j] * factor(b, narrow, rows[j] * size + c);
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
    const int64_t S = P->siblings;
    for (int64_t n = 0; n < A->num_tokens; n++) {
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
            const float *products = w->products + (n * S + s) * A->most;
            float *y = w->y + n * P->N + begin;
            if (P->narrow) add_rows(products, P->b[s], 1, rows, count, size, low, high, y);
            else add_rows(products, P->b[s], 0, rows, count, size, low, high, y);
        }
    }
}

static void multiply_part(void *work, int part, int parts) {
    Multiplication *w = work;
    (void)part;
    if (w->xt != w->x) place_rows(w, parts);
    if (w->A) multiply_a(w, parts);
    if (w->A || w->xt != w->x) meet(parts);
    float *plain = w->unpacks ? scratch(2, GROUP * STRETCH * LANES) : NULL;
    if (w->unpacks && !plain) atomic_store(&w->failed, 1);
    int64_t from, to;
    while (take(&w->next[1], piece_of(w->groups, parts), w->groups, &from, &to)) {
        const int64_t columns = w->group * LANES, first = from * columns;
        const int64_t end = to * columns < w->P->N ? to * columns : w->P->N;
        if (w->A && w->M <= FEW) add_b(w, first, end, 1); /* while the base's part is computed */
        for (int64_t g = from; g < to && !(w->unpacks && !plain); g++) multiply_group(w, g, plain);
        if (w->A) add_b(w, first, end, 0);
    }
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

/* Whether this processor multiplies bfloat16. */
int multiplies_bfloat16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
