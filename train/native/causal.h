/* Causal attention of whole rows, forward and backward.
 *
 * The query heads that share a key head are one matrix, and queries come in blocks, whose scores
 * exist one block at a time: they are computed again in the backward pass. Sums are float32.
 *
 * With S = s Q K' + mask, P = softmax(S), O = P V (' transposes) and G the gradient of O:
 *     grad V = P' G    D = P * (G V' - rowsum(P * G V'))    grad Q = s D K    grad K = s D' Q
 */
#pragma once
#include "stage.h"
#include "rows.h"

#define QUERIES 64 /* tokens of a block */

typedef struct {
    int64_t B, T, E, H, D; /* rows, tokens; heads of queries and of keys, their width */
    const void *qkv;       /* [B T, (E + 2 H) D], turned by their positions */
    int narrow;
    const uint8_t *mask; /* [B or 1, T, T], which keys a query sees; NULL: itself and those before */
    int64_t mask_apart;
    float scale;
    Way way; /* of its products */
    const void *cosine, *sine; /* [B or 1, T, D] */
    int64_t angles_apart;
    int angles_narrow;
    void *mixed;          /* [B T, E D] */
    const float *grad; /* of `mixed`, [B T, E D] */
    void *of_q, *of_k, *of_v; /* gradients before positions: [B T, apart_q], and twice apart_k */
    int64_t apart_q, apart_k;
    int of_narrow;
} Attention;

/* y [M, N] = x w', or added to it, by this thread alone. */
static int multiply_alone(Way way, Matrix x, int64_t M, int64_t K, Matrix w, int64_t N, float *y,
                          int adds) {
    Side side = {.x = x, .M = M, .K = K, .place = scratch(0, side_bytes(way, M, K) / 4 + 16)};
    const Product p = {.term = {{&side, w}}, .terms = 1, .N = N};
    float *packed = room_for(&p, way, 0, NULL);
    if (!side.place || !packed) return 1;
    for (int64_t m = 0; m < M; m += LANES) place_rows(&side, way, m);
    const int64_t panels = padded(N) / LANES;
    Ahead nothing = {0};
    for (int64_t panel = 0; panel < panels; panel += width_of(way)) {
        const int some = panels - panel < width_of(way) ? (int)(panels - panel) : width_of(way);
#if HAS_MATRIX_UNIT
        if (way == BY_UNIT) {
            unit_columns(&p, panel, some, 0, M, packed, &nothing, y + panel * LANES, padded(N), adds);
            continue;
        }
#endif
        multiply_columns(&p, way, panel, some, 0, M, packed, &nothing, y + panel * LANES,
                         padded(N), adds);
    }
    return 0;
}

/* Scores of a query, by `scale`, to its shares of attention: of `seen` keys, or of those that `mask`
 * names; one that names none spreads it evenly. What is hidden has exactly 0. */
static void weigh(float *s, int64_t keys, int64_t seen, const uint8_t *mask, float scale) {
    if (mask) {
        int sees = 0;
        for (int64_t j = 0; j < keys; j++) sees |= mask[j];
        for (int64_t j = 0; j < keys; j++) s[j] = mask[j] ? s[j] : sees ? -INFINITY : 0;
        seen = keys;
    }
    for (int64_t j = 0; j < padded(keys); j += LANES) *(vec *)(s + j) *= scale;
    for (int64_t j = seen; j < padded(keys); j++) s[j] = -INFINITY;
    vec top = *(const vec *)s, total = {0};
    for (int64_t j = LANES; j < seen; j += LANES) {
        const vec other = *(const vec *)(s + j);
        const ints above = (other > top) | (other != other);
        top = (vec)(((ints)other & above) | ((ints)top & ~above));
    }
    float most = top[0];
    for (int l = 1; l < LANES; l++) most = top[l] > most || top[l] != top[l] ? top[l] : most;
    int64_t j = 0;
    for (; j < seen; j += LANES) {
        const vec at = *(const vec *)(s + j);
        const ints hidden = at == -INFINITY;
        const vec e = exp_negative(at - most);
        total += *(vec *)(s + j) = (vec)((ints)e & ~hidden);
    }
    for (; j < padded(keys); j += LANES) *(vec *)(s + j) = (vec){0};
    const float share = 1 / sum_of(total);
    for (j = 0; j < seen; j += LANES) *(vec *)(s + j) *= share;
}

/* The queries first..end of the heads of a key head, [G (end - first), D]. */
static void gather(const Attention *a, int64_t b, int64_t h, int64_t first, int64_t end,
                   const void *from, int narrow, int64_t stride, float *out) {
    const int64_t G = a->E / a->H, D = a->D;
    for (int64_t e = 0; e < G; e++)
        for (int64_t t = first; t < end; t++, out += D) {
            const int64_t at = (b * a->T + t) * stride + (h * G + e) * D;
            int64_t d = 0;
            for (; d + LANES <= D; d += LANES)
                *(vec *)(out + d) = read_vec(from, narrow, at + d);
            for (; d < D; d++) out[d] = read_one(from, narrow, at + d);
        }
}

/* The shares of attention of a block's queries, [G (end - first), keys]. */
static int share_out(const Attention *a, int64_t b, int64_t first, int64_t end, int64_t keys,
                     const float *queries, Matrix k, float *shares) {
    const int64_t G = a->E / a->H, count = end - first, T = a->T;
    if (multiply_alone(a->way, plain(queries, a->D, 0), G * count, a->D, k, keys, shares, 0)) return 1;
    for (int64_t m = 0; m < G * count; m++) {
        const int64_t t = first + m % count;
        weigh(shares + m * padded(keys), keys, t + 1,
              a->mask ? a->mask + b * a->mask_apart + t * T : NULL, a->scale);
    }
    return 0;
}

INLINE Matrix head_of(const Attention *a, int64_t b, int64_t head) {
    const int64_t Q = (a->E + 2 * a->H) * a->D;
    const char *data = a->qkv;
    return plain(data + (b * a->T * Q + head * a->D) * (a->narrow ? 2 : 4), Q, a->narrow);
}
INLINE Matrix other_way(Matrix m) {
    m.turned = !m.turned;
    return m;
}

INLINE int64_t blocks_of(const Attention *a) { return (a->T + QUERIES - 1) / QUERIES; }

/* A block of a key head's queries; items are B H blocks. */
static int attend_block(const Attention *a, int64_t item) {
    const int64_t D = a->D, E = a->E, G = E / a->H, blocks = blocks_of(a), width = padded(D);
    const int64_t b = item / blocks / a->H, h = item / blocks % a->H, first = item % blocks * QUERIES;
    const int64_t end = first + QUERIES < a->T ? first + QUERIES : a->T, rows = G * (end - first);
    const int64_t keys = a->mask ? a->T : end;
    float *shares = scratch(2, sums_floats(rows, keys) + sums_floats(rows, D) + rows * D);
    if (!shares) return 1;
    float *found = shares + sums_floats(rows, keys), *queries = found + sums_floats(rows, D);
    gather(a, b, h, first, end, a->qkv, a->narrow, (E + 2 * a->H) * D, queries);
    const Matrix v = other_way(head_of(a, b, E + a->H + h));
    if (share_out(a, b, first, end, keys, queries, head_of(a, b, E + h), shares)) return 1;
    if (multiply_alone(a->way, plain(shares, padded(keys), 0), rows, keys, v, D, found, 0)) return 1;
    for (int64_t m = 0; m < rows; m++) {
        const int64_t t = first + m % (end - first), e = h * G + m / (end - first);
        const int64_t at = ((b * a->T + t) * E + e) * D;
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES)
            write_vec(a->mixed, a->narrow, at + d, *(const vec *)(found + m * width + d));
        for (; d < D; d++) write_one(a->mixed, a->narrow, at + d, found[m * width + d]);
    }
    return 0;
}

/* Turn a gradient [D] back by its position's angles, to where it goes. */
static void turn_back(const Attention *a, int64_t b, int64_t t, const float *grad, float factor,
                      void *out, int64_t to) {
    const int64_t half = a->D / 2, at = b * a->angles_apart + t * a->D;
    const int narrow = a->angles_narrow;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vec low = *(const vec *)(grad + i) * factor;
        const vec high = *(const vec *)(grad + half + i) * factor;
        write_vec(out, a->of_narrow, to + i, low * read_vec(a->cosine, narrow, at + i) +
                                                 high * read_vec(a->sine, narrow, at + half + i));
        write_vec(out, a->of_narrow, to + half + i,
                  high * read_vec(a->cosine, narrow, at + half + i) -
                      low * read_vec(a->sine, narrow, at + i));
    }
    for (; i < half; i++) {
        const float low = grad[i] * factor, high = grad[half + i] * factor;
        const float cos_low = read_one(a->cosine, a->angles_narrow, at + i);
        const float sin_low = read_one(a->sine, a->angles_narrow, at + i);
        const float cos_high = read_one(a->cosine, a->angles_narrow, at + half + i);
        const float sin_high = read_one(a->sine, a->angles_narrow, at + half + i);
        write_one(out, a->of_narrow, to + i, low * cos_low + high * sin_high);
        write_one(out, a->of_narrow, to + half + i, high * cos_high - low * sin_low);
    }
}

/* All gradients of a key head: items are B H. */
static int attend_back(const Attention *a, int64_t item) {
    const int64_t D = a->D, E = a->E, H = a->H, T = a->T, G = E / H, width = padded(D);
    const int64_t b = item / H, h = item % H, most = G * (T < QUERIES ? T : QUERIES);
    const int64_t Q = (E + 2 * H) * D;
    const size_t large = sums_floats(most, T), small = sums_floats(most, D), whole = sums_floats(T, D);
    float *shares = scratch(2, 2 * large + small + 2 * whole + 2 * most * D);
    if (!shares) return 1;
    float *scores = shares + large, *dq = scores + large, *dk = dq + small, *dv = dk + whole;
    float *queries = dv + whole, *grads = queries + most * D;
    memset(dk, 0, 2 * whole * sizeof(float));
    const Matrix k = head_of(a, b, E + h), v = head_of(a, b, E + H + h);
    int failed = 0;
    for (int64_t first = 0; first < T; first += QUERIES) {
        const int64_t end = first + QUERIES < T ? first + QUERIES : T, count = end - first;
        const int64_t rows = G * count, keys = a->mask ? T : end, apart = padded(keys);
        gather(a, b, h, first, end, a->qkv, a->narrow, Q, queries);
        gather(a, b, h, first, end, a->grad, 0, E * D, grads);
        failed |= share_out(a, b, first, end, keys, queries, k, shares);
        failed |= multiply_alone(a->way, plain(grads, D, 0), rows, D, v, keys, scores, 0);
        failed |= multiply_alone(a->way, turned(shares, apart, 0), keys, rows, turned(grads, D, 0), D, dv,
                                 1);
        for (int64_t m = 0; m < rows; m++) { /* scores become D */
            float *s = scores + m * apart;
            const float *p = shares + m * apart;
            vec sum = {0};
            for (int64_t j = 0; j < apart; j += LANES) sum += *(vec *)(s + j) * *(const vec *)(p + j);
            const float mean = sum_of(sum);
            for (int64_t j = 0; j < apart; j += LANES)
                *(vec *)(s + j) = *(const vec *)(p + j) * (*(vec *)(s + j) - mean);
        }
        failed |= multiply_alone(a->way, plain(scores, apart, 0), rows, keys, other_way(k), D, dq, 0);
        failed |= multiply_alone(a->way, turned(scores, apart, 0), keys, rows, turned(queries, D, 0), D,
                                 dk, 1);
        for (int64_t m = 0; m < rows; m++) {
            const int64_t t = first + m % count, e = h * G + m / count;
            turn_back(a, b, t, dq + m * width, a->scale, a->of_q,
                      (b * T + t) * a->apart_q + e * D);
        }
    }
    for (int64_t t = 0; t < T; t++) {
        const int64_t at = (b * T + t) * a->apart_k + h * D;
        turn_back(a, b, t, dk + t * width, a->scale, a->of_k, at);
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES)
            write_vec(a->of_v, a->of_narrow, at + d, *(const vec *)(dv + t * width + d));
        for (; d < D; d++) write_one(a->of_v, a->of_narrow, at + d, dv[t * width + d]);
    }
    return failed;
}
