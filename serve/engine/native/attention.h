/* Attention of queries over their sequence's keys and values in the arena, [T, H, D] and [T, H, V].
 *
 * One query of a sequence (decoding), or a stretch of a prompt. The G query heads of a key head are
 * computed together, so that keys and values are read once for all of them.
 */
#pragma once
#include "base.h"

#define TILE_ROWS 8    /* queries (of one key head) that a tile scores at once */
#define TILE_TOKENS 32 /* tokens of a prompt that one piece of work attends for */

typedef struct {
    const float *query;        /* [N, stride], heads side by side */
    const void *keys, *values; /* float32, or bfloat16 if narrow */
    int narrow;
    float *out; /* [N, E * V] */
    int64_t stride, E, H, D, V;
    float scale, softcap;
    int64_t window; /* tokens that a query sees, itself included; 0 for all */
} Heads;

static void softmax(float *s, int64_t L, float softcap) {
    float top = -INFINITY;
    vec total = {0};
    int64_t l = 0;
    if (softcap > 0)
        for (; l < L; l++) s[l] = tanhf(s[l] / softcap) * softcap;
    for (l = 0; l < L; l++) top = s[l] > top || s[l] != s[l] ? s[l] : top;
    for (l = 0; l + LANES <= L; l += LANES)
        total += *(vec *)(s + l) = exp_negative(*(const vec *)(s + l) - top);
    float sum = sum_of(total);
    for (; l < L; l++) sum += s[l] = expf(s[l] - top);
    const float share = 1 / sum;
    for (l = 0; l < L; l++) s[l] *= share;
}

#define HALVE(TO, FROM, LOW, HIGH)                                                                \
    TO = __builtin_shufflevector((FROM)[0], (FROM)[1], LOW) +                                     \
         __builtin_shufflevector((FROM)[0], (FROM)[1], HIGH)

/* The sums of 16 vectors, one a lane. */
INLINE vec sums_of(const vec v[16]) {
    vec a[8], b[4], c[2], sums;
    for (int i = 0; i < 8; i++) HALVE(a[i], v + 2 * i, ONES, OTHER_ONES);
    for (int i = 0; i < 4; i++) HALVE(b[i], a + 2 * i, TWOS, OTHER_TWOS);
    for (int i = 0; i < 2; i++) HALVE(c[i], b + 2 * i, FOURS, OTHER_FOURS);
    HALVE(sums, c, EIGHTS, OTHER_EIGHTS);
    return sums;
}

/* 16 numbers, and one, from a place of the arena. */
INLINE vec numbers(const void *arena, const int narrow, int64_t place) {
    return narrow ? from_bfloat16((const uint16_t *)arena + place)
                  : *(const vec *)((const float *)arena + place);
}
INLINE float number(const void *arena, const int narrow, int64_t place) {
    return narrow ? one_from_bfloat16(((const uint16_t *)arena)[place])
                  : ((const float *)arena)[place];
}

/* s[l] = q . keys[l] * scale, the first of the keys at `first` and each `step` further. */
INLINE void score(const float *q, const void *keys, const int narrow, int64_t first, int64_t step,
                  int64_t L, int64_t D, float scale, float *s) {
    int64_t l = 0;
    if (D % LANES == 0)
        for (; l + LANES <= L; l += LANES) {
            vec part[LANES];
            for (int i = 0; i < LANES; i++) part[i] = (vec){0};
            for (int64_t d = 0; d < D; d += LANES) {
                const vec own = *(const vec *)(q + d);
                for (int i = 0; i < LANES; i++)
                    part[i] += own * numbers(keys, narrow, first + (l + i) * step + d);
            }
            *(vec *)(s + l) = sums_of(part) * scale;
        }
    for (; l < L; l++) {
        const int64_t place = first + l * step;
        s[l] = scale * (narrow ? dot_narrow(q, (const uint16_t *)keys + place, D)
                               : dot(q, (const float *)keys + place, D));
    }
}

/* out[r] = sum of p[r][l] * values[l] for up to 4 rows of p, `apart` floats from one to the next;
 * the first of the values at `first` and each `step` further. */
#define MIX_COLUMNS(COUNT)                                                                        \
    for (; v + (COUNT) * LANES <= V; v += (COUNT) * LANES) {                                      \
        vec sum[4][COUNT] = {{{0}}};                                                              \
        for (int64_t l = 0; l < L; l++)                                                           \
            for (int c = 0; c < (COUNT); c++) {                                                   \
                const vec value = numbers(values, narrow, first + l * step + v + c * LANES);      \
                for (int r = 0; r < rows; r++) sum[r][c] += value * p[r * apart + l];             \
            }                                                                                     \
        for (int r = 0; r < rows; r++)                                                            \
            for (int c = 0; c < (COUNT); c++) *(vec *)(out[r] + v + c * LANES) = sum[r][c];       \
    }

INLINE void mix_rows(const float *p, int64_t apart, const int rows, const void *values,
                     const int narrow, int64_t first, int64_t step, int64_t L, int64_t V,
                     float *const *out) {
    int64_t v = 0;
    MIX_COLUMNS(4)
    MIX_COLUMNS(1)
    for (; v < V; v++)
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (int64_t l = 0; l < L; l++)
                sum += p[r * apart + l] * number(values, narrow, first + l * step + v);
            out[r][v] = sum;
        }
}

INLINE void mix_all(const float *p, int64_t apart, int rows, const void *values, const int narrow,
                    int64_t first, int64_t step, int64_t L, int64_t V, float *const *out) {
    for (; rows >= 4; rows -= 4, p += 4 * apart, out += 4)
        mix_rows(p, apart, 4, values, narrow, first, step, L, V, out);
    if (rows == 3) mix_rows(p, apart, 3, values, narrow, first, step, L, V, out);
    else if (rows == 2) mix_rows(p, apart, 2, values, narrow, first, step, L, V, out);
    else if (rows == 1) mix_rows(p, apart, 1, values, narrow, first, step, L, V, out);
}

static void mix(const Heads *w, const float *p, int64_t apart, int rows, int64_t first, int64_t L,
                float *const *out) {
    const int64_t step = w->H * w->V;
    if (w->narrow) mix_all(p, apart, rows, w->values, 1, first * w->V, step, L, w->V, out);
    else mix_all(p, apart, rows, w->values, 0, first * w->V, step, L, w->V, out);
}

/* Query heads of key head h, of token n alone, which sees L tokens from `first` on. */
static void attend_one(const Heads *w, int64_t n, int64_t h, int64_t first, int64_t L,
                       float *scores) {
    const int64_t G = w->E / w->H, D = w->D, from = first * w->H + h;
    for (int64_t e = 0; e < G; e += 4) {
        const int rows = G - e < 4 ? (int)(G - e) : 4;
        float *out[4];
        for (int r = 0; r < rows; r++) {
            const int64_t head = h * G + e + r;
            out[r] = w->out + (n * w->E + head) * w->V;
            const float *query = w->query + n * w->stride + head * D;
            if (w->narrow)
                score(query, w->keys, 1, from * D, w->H * D, L, D, w->scale, scores + r * L);
            else score(query, w->keys, 0, from * D, w->H * D, L, D, w->scale, scores + r * L);
            softmax(scores + r * L, L, w->softcap);
        }
        mix(w, scores, L, rows, from, L, out);
    }
}

/* Tokens n to n + count of a sequence, at positions from `position` on; its block starts at `offset`
 * in the arena. Needs D in whole vectors. `memory` holds span_floats. */
static int64_t span_floats(const Heads *w, int64_t keys) {
    const int64_t padded = (keys + LANES - 1) / LANES * LANES;
    return padded * (w->D + TILE_ROWS);
}

static void attend_span(const Heads *w, int64_t n, int64_t count, int64_t position, int64_t offset,
                        int64_t h, float *memory) {
    const int64_t G = w->E / w->H, D = w->D, rows = count * G;
    const int64_t lowest = w->window && position + 1 > w->window ? position + 1 - w->window : 0;
    const int64_t L = position + count - lowest, padded = (L + LANES - 1) / LANES * LANES;
    const int64_t from = (offset + lowest) * w->H + h;
    float *turned = memory, *scores = memory + padded * D; /* [L/16][D][16], [8][L] */
    memset(turned + padded / LANES * D * LANES - LANES * D, 0, LANES * D * sizeof(float));
    for (int64_t l = 0; l < L; l++) {
        float *place = turned + l / LANES * D * LANES + l % LANES;
        for (int64_t d = 0; d < D; d++)
            place[d * LANES] = number(w->keys, w->narrow, (from + l * w->H) * D + d);
    }
    for (int64_t r0 = 0; r0 < rows; r0 += TILE_ROWS) {
        const int some = rows - r0 < TILE_ROWS ? (int)(rows - r0) : TILE_ROWS;
        const float *query[TILE_ROWS];
        float *out[TILE_ROWS];
        int64_t seen = 0; /* keys that the last of these rows sees */
        for (int r = 0; r < TILE_ROWS; r++) {
            const int64_t row = r0 + (r < some ? r : some - 1), t = n + row / G;
            const int64_t head = h * G + row % G;
            query[r] = w->query + t * w->stride + head * D;
            out[r] = w->out + (t * w->E + head) * w->V;
            seen = position + row / G + 1 - lowest;
        }
        for (int64_t l = 0; l < seen; l += LANES) {
            vec sum[TILE_ROWS] = {{0}};
            for (int64_t d = 0; d < D; d++) {
                const vec key = *(const vec *)(turned + l * D + d * LANES);
                for (int r = 0; r < TILE_ROWS; r++) sum[r] += key * query[r][d];
            }
            for (int r = 0; r < TILE_ROWS; r++)
                *(vec *)(scores + r * padded + l) = sum[r] * w->scale;
        }
        for (int r = 0; r < some; r++) {
            const int64_t at = position + (r0 + r) / G, last = at + 1 - lowest;
            const int64_t hidden = w->window && at + 1 > w->window + lowest
                                       ? at + 1 - w->window - lowest : 0;
            float *s = scores + r * padded;
            softmax(s + hidden, last - hidden, w->softcap);
            memset(s, 0, hidden * sizeof(float));
            memset(s + last, 0, (seen - last) * sizeof(float));
        }
        mix(w, scores, padded, some, from, seen, out);
    }
}

/* ---- one query a sequence ---- */

typedef struct {
    Heads heads;
    const int64_t *first, *length;
    int64_t n;
    atomic_long next;
    atomic_int failed;
} Attention;

static void attend_part(void *work, int part, int parts) {
    Attention *w = work;
    (void)part;
    (void)parts;
    const int64_t H = w->heads.H;
    int64_t from, to;
    while (take(&w->next, 1, w->n * H, &from, &to)) {
        const int64_t i = from / H;
        float *scores = scratch(2, 4 * w->length[i]);
        if (scores) attend_one(&w->heads, i, from % H, w->first[i], w->length[i], scores);
        else atomic_store(&w->failed, 1);
    }
}

/* out [n, E, V]: one query a sequence over its keys and values in the arena.
 * Sequence i sees tokens first[i] to first[i] + length[i] - 1. Returns 0, or 1 without memory. */
int attend(const float *query, const float *keys, const float *values, const int64_t *first,
           const int64_t *length, int64_t n, int64_t E, int64_t H, int64_t D, int64_t V,
           float scale, float softcap, float *out, int threads) {
    Attention w = {.heads = {.query = query, .keys = keys, .values = values, .out = out,
                             .stride = E * D, .E = E, .H = H, .D = D, .V = V, .scale = scale,
                             .softcap = softcap},
                   .first = first, .length = length, .n = n};
    int64_t keys_seen = 0;
    for (int64_t i = 0; i < n; i++) keys_seen += length[i];
    share(attend_part, &w, keys_seen * E * D < SMALL ? 1 : threads);
    return atomic_load(&w.failed);
}
