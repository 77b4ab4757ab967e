/* Tiles of a product in whole numbers, for weights that are 8-bit integers (AVX512-VNNI).
 *
 * Rows of x become 16-bit integers with a factor for each 32 inputs, the same 32 that share a factor
 * of the weight. One instruction multiplies and adds two inputs of 16 columns where float32 takes
 * two, nothing is lost within a block, and the weight goes to the registers with one instruction
 * instead of three. A number of x is off by at most 1/65534 of the largest of its block: bfloat16 is
 * off by up to 1/512 of the number itself.
 */
#pragma once
#include "base.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_INTEGERS 1
#else
#define HAS_INTEGERS 0
#endif

#define LARGEST 32767

#if HAS_INTEGERS

/* 32 inputs of a row as 16 pairs; their factor, and the sum of what they stand for. What is not
 * finite makes the factor such, and with it every column of the row. */
INLINE vec whole_inputs(const float *row, float *factor, float *sum) {
    const __m512 low = _mm512_loadu_ps(row), high = _mm512_loadu_ps(row + LANES);
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    const union { int32_t bits; float value; } largest = {.bits = _mm512_reduce_max_epi32(
        _mm512_max_epi32(_mm512_and_si512(sign, (__m512i)low), _mm512_and_si512(sign, (__m512i)high)))};
    *factor = largest.value / LARGEST;
    const __m512 inverse = _mm512_set1_ps(largest.value > 0 ? LARGEST / largest.value : 0);
    const __m512i first = _mm512_cvtps_epi32(low * inverse);
    const __m512i second = _mm512_cvtps_epi32(high * inverse);
    if (sum) *sum = *factor * _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
    const __m512i both = _mm512_castsi256_si512(_mm512_cvtsepi32_epi16(first));
    return (vec)_mm512_inserti64x4(both, _mm512_cvtsepi32_epi16(second), 1);
}

/* sum += both products of every pair. As an intrinsic GCC copies the sum before each. */
INLINE void add_pairs(__m512i *sum, __m512i weight, __m512i x) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(*sum) : "v"(weight), "v"(x));
}

#define UNROLLED _Pragma("GCC unroll 24") /* or the sums would live in memory */

/* sums[panels][tall] of a block: xt [BLOCK / 2][tall] pairs, panels `apart` bytes from one another. */
INLINE void sum_block(const int32_t *xt, const char *weight, int64_t apart, const int tall,
                      const int panels, __m512i *out) {
    __m512i sums[24];
    UNROLLED for (int i = 0; i < tall * panels; i++) sums[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < 16; k++) {
        __m512i w[6];
        UNROLLED for (int p = 0; p < panels; p++)
            w[p] = _mm512_cvtepi8_epi16(*(const __m256i_u *)(weight + p * apart + k * 32));
        UNROLLED for (int m = 0; m < tall; m++) {
            const __m512i x = _mm512_set1_epi32(xt[k * tall + m]);
            UNROLLED for (int p = 0; p < panels; p++) add_pairs(&sums[p * tall + m], w[p], x);
        }
    }
    UNROLLED for (int i = 0; i < tall * panels; i++) out[i] = sums[i];
}

#endif
