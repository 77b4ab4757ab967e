/* Rows to where a tile reads them, and columns of a weight to panels of 16.
 *
 * A weight is packed for some columns while they are multiplied, since a second, packed copy of the
 * base would take as much memory again.
 */
#pragma once
#include "matrix.h"

#define TALL 8 /* rows of a tile of vectors */

/* Rows of one or more products: [M, K]. */
typedef struct {
    Matrix x;
    int64_t M, K;
    void *place;
} Side;

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

