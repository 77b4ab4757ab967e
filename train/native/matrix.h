/* Matrices that lie as PyTorch keeps them, float32 or bfloat16, and blocks of 16 by 16 of them. */
#pragma once
#include "matrix_unit.h"

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

INLINE Matrix plain(const void *data, int64_t stride, int narrow) {
    return (Matrix){data, stride, narrow, 0, 1};
}
INLINE Matrix turned(const void *data, int64_t stride, int narrow) {
    return (Matrix){data, stride, narrow, 1, 1};
}

INLINE int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE int64_t padded(int64_t n) { return up_to(n, LANES); }
INLINE float read_one(const void *data, int narrow, int64_t at) {
    return narrow ? one_from_bfloat16(((const uint16_t *)data)[at]) : ((const float *)data)[at];
}
INLINE vec read_vec(const void *data, int narrow, int64_t at) {
    return narrow ? from_bfloat16((const uint16_t *)data + at)
                  : *(const vec *)((const float *)data + at);
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

