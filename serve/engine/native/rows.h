/* What is done to each row alone: RMS norms, rotary angles, gates. */
#pragma once
#include "base.h"

/* y = x / sqrt(mean(x^2) + eps) * (weight + offset) */
INLINE void norm_row(const float *x, const float *weight, float offset, float eps, int64_t K,
                     float *y) {
    const float factor = 1 / sqrtf(dot(x, x, K) / K + eps);
    for (int64_t k = 0; k < K; k++) y[k] = x[k] * factor * (weight[k] + offset);
}

/* y [M, K], row by row */
void rms_norm(const float *x, const float *weight, float offset, float eps, int64_t M, int64_t K,
              float *y) {
    for (int64_t m = 0; m < M; m++) norm_row(x + m * K, weight, offset, eps, K, y + m * K);
}

/* Turn a head [D] by its angles, given as the cosines and sines [D] of both halves: (x1, x2) becomes
 * (x1 cos - x2 sin, x2 cos + x1 sin). */
INLINE void rotate_head(float *x, int64_t D, const float *cosine, const float *sine) {
    const int64_t half = D / 2;
    float *a = x, *b = x + half;
    for (int64_t i = 0; i < half; i++) {
        float low = a[i], high = b[i];
        a[i] = low * cosine[i] - high * sine[i];
        b[i] = high * cosine[half + i] + low * sine[half + i];
    }
}

INLINE vec silu(vec g) {
    const ints sign = g < 0;
    vec t = exp_negative((vec)((ints)g | (ints)((words){0} + 0x80000000u))); /* e^-|g| */
    vec top = (vec)(((ints)t & sign) | ((ints)((vec){0} + 1.0f) & ~sign));
    return g * top / (t + 1.0f);
}

/* y [I] = silu(gate) * up, which lie side by side in [2 I] */
INLINE void gate_row(const float *g, int64_t I, float *y) {
    const float *u = g + I;
    int64_t i = 0;
    for (; i + LANES <= I; i += LANES)
        *(vec *)(y + i) = silu(*(const vec *)(g + i)) * *(const vec *)(u + i);
    for (; i < I; i++) y[i] = g[i] / (1 + expf(-g[i])) * u[i];
}
