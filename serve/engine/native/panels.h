/* Packed weights in panels, and a tile of rows times some of them.
 *
 * Weights lie in panels of 16 output columns, [panels][K][16], so that one vector holds 16 columns
 * of one input. A panel's numbers are float32, bfloat16, or 8-bit integers with a float32 factor
 * (and offset) for each column and 32 inputs, [panels][K/32][1 or 2][16]; they become float32 on
 * the way to the registers, and all sums are float32.
 *
 * Products of bfloat16, where the processor has them, round both sides to bfloat16 first and sum in
 * float32. Their panels hold two inputs side by side, [panels][K/2][16][2], bfloat16 or 8-bit.
 * Products of whole numbers (integers.h) read the same panels of 8-bit pairs.
 */
#pragma once
#include "integers.h"

#define BLOCK 32 /* inputs that share a factor */

/* The last two are those before them, multiplied as whole numbers. */
enum { F32, BF16, Q8, Q8_OFFSET, PAIRS, PAIRS_Q8, PAIRS_Q8_OFFSET, INTEGERS, INTEGERS_OFFSET };

/* ---- numbers of a panel ---- */

INLINE int is_pairs(int format) { return format >= PAIRS; }
INLINE int is_q8(int format) {
    return format == Q8 || format == Q8_OFFSET || format >= PAIRS_Q8;
}
INLINE int is_whole(int format) { return format >= INTEGERS; }
INLINE int has_offset(int format) {
    return format == Q8_OFFSET || format == PAIRS_Q8_OFFSET || format == INTEGERS_OFFSET;
}

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

INLINE void unpack_as(const int format, const char *weight, const float *scale, int64_t count,
                      float *plain) {
    for (int64_t from = 0, block = 0; from < count; from += block_steps(format), block++) {
        const int64_t to = from + block_steps(format) < count ? from + block_steps(format) : count;
        const Scale at = scale_at(scale, format, block);
        for (int64_t k = from; k < to; k++) {
#ifdef __AVX512BF16__
            if (is_pairs(format)) {
                if (k % 2 == 0) __builtin_prefetch(weight + k * 32 + 2048, 0, 3);
                ((__m512bh *)plain)[k] = load_pairs(weight, format, k, at);
                continue;
            }
#endif
            ((vec *)plain)[k] = load(weight, format, k, at);
        }
    }
}

#define UNPACK(FORMAT)                                                                            \
    case FORMAT: unpack_as(FORMAT, weight, scale, count, plain); break;

/* A stretch of a panel as the numbers that are multiplied, [count][16]. */
static void unpack(int format, const char *weight, const float *scale, int64_t count, float *plain) {
    switch (format) {
        UNPACK(BF16)
        UNPACK(Q8)
        UNPACK(Q8_OFFSET)
#ifdef __AVX512BF16__
        UNPACK(PAIRS_Q8)
        UNPACK(PAIRS_Q8_OFFSET)
#endif
    }
}

/* ---- one tile ---- */

/* A stretch of the inputs, for up to `tall` rows and some panels of 16 columns. */
typedef struct {
    const float *xt;    /* [steps][tall] */
    const char *weight; /* [panels][steps], panels `apart` steps from one to the next */
    const char *ahead;  /* what is multiplied next, read into the cache meanwhile; or NULL */
    int64_t ahead_step, ahead_apart; /* bytes of a step, and from one panel to the next */
    const float *scale; /* of the first panel's first block; panels `blocks` from one to the next */
    const float *factor, *sum; /* of whole numbers: [blocks][tall] of the rows of x */
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

#if HAS_INTEGERS
/* The same as `tile`, block by block. */
INLINE void whole_tile(const Tile *t, const int tall, const int panels, const int format, vec *acc) {
    const int64_t apart = t->apart * step_bytes(format), steps = BLOCK / 2;
    for (int64_t b = 0; b * steps < t->steps; b++) {
        __m512i sums[24];
        if (t->ahead && tall > 1)
            for (int p = 0; p < panels; p++)
                for (int64_t k = b * steps; k < (b + 1) * steps; k++)
                    __builtin_prefetch(t->ahead + p * t->ahead_apart + k * t->ahead_step, 0, 3);
        sum_block((const int32_t *)t->xt + b * steps * tall, t->weight + b * steps * step_bytes(format),
                  apart, tall, panels, sums);
        __asm__ volatile("" : : "r"(sums) : "memory"); /* they leave the registers here, once */
        for (int p = 0; p < panels; p++) {
            const vec *place = (const vec *)t->scale + (p * t->blocks + b) * (1 + has_offset(format));
            for (int m = 0; m < tall; m++) {
                vec *sum = &acc[p * tall + m];
                *sum += (vec)_mm512_cvtepi32_ps(sums[p * tall + m]) * (place[0] * t->factor[b * tall + m]);
                if (has_offset(format)) *sum += place[1] * t->sum[b * tall + m];
            }
        }
    }
}
#endif

/* acc[panels][tall] += xt' * weight; `tall`, `panels` and `format` are constants after inlining. */
INLINE void tile(const Tile *t, const int tall, const int panels, const int format, vec *acc) {
#if HAS_INTEGERS
    if (is_whole(format)) {
        whole_tile(t, tall, panels, format, acc);
        return;
    }
#endif
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
#if HAS_INTEGERS
#define RUN_INTEGERS(HEIGHT, PANELS)                                                              \
    RUN_FORMAT(HEIGHT, PANELS, INTEGERS)                                                          \
    RUN_FORMAT(HEIGHT, PANELS, INTEGERS_OFFSET)
#else
#define RUN_INTEGERS(HEIGHT, PANELS)
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
            RUN_INTEGERS(HEIGHT, PANELS)                                                          \
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
