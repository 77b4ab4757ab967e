/* A decoder layer: what it is given, and what is done to its rows one by one. */
#pragma once
#include "causal.h"

enum { Q, K, V, O, GATE, UP, DOWN, PROJECTIONS };
enum { HEADS, OUT, GATES, LAST, GROUPS }; /* projections of one input */
static const int GROUP_OF[] = {HEADS, HEADS, HEADS, OUT, GATES, GATES, LAST};
static const int FIRST_OF[] = {Q, O, GATE, DOWN, PROJECTIONS};

typedef struct {
    const void *base, *bias; /* [N, K], [N] or NULL */
    const float *b;          /* [N, r]; NULL without an adapter */
    float *grad_b;           /* NULL: not wanted */
    int64_t rank, offset;    /* of its columns of the group's `low` */
    float scale;
} Projection;

/* The matrices A of a group's adapters, one below the other. */
typedef struct {
    const float *a; /* [R, K]; NULL: no adapters */
    float *low;     /* x A', [M, R]: kept */
    float *grad_a;  /* NULL: not wanted */
    int64_t rank;
} Group;

typedef struct {
    int64_t B, T, C, E, H, D, I; /* rows, tokens; widths: model, heads, key heads, a head, the MLP's */
    const void *x, *before, *after; /* [B T, C]; weights [C] of the norms */
    const void *cosine, *sine;
    const uint8_t *mask;
    int64_t mask_apart, angles_apart;
    void *qkv, *mixed, *middle, *gate, *up, *out; /* kept; [B T, ..] */
    const void *grad;                             /* of `out` */
    void *grad_x;                                 /* NULL: not wanted */
    Projection projection[PROJECTIONS];
    Group group[GROUPS];
    float before_eps, after_eps, scale;
    int32_t narrow, norms_narrow, angles_narrow; /* bfloat16 */
    int32_t way;
} Layer;

/* Rows of a pass, padded to whole tiles: in bfloat16 where they only go into products of it. */
typedef struct {
    void *data;
    int64_t width, stride;
    int narrow;
} Rows;

typedef struct {
    const Layer *l;
    Attention attention;
    Rows normed, normed_after, active, of_gate, of_up, of_q, of_k, of_v, mid_narrow;
    float *q, *k, *v, *mid, *g_normed, *g_mixed, *g_low[GROUPS];
    Side side[32];
    int sides;
    Product up;
    Stage stage[10];
    atomic_long next[8];
    atomic_int failed;
    /* memory, counted in a first pass and given in a second */
    char *memory;
    size_t used;
} Work;

static void *grant(Work *w, size_t bytes) {
    char *place = w->memory ? w->memory + w->used : NULL;
    w->used += (bytes + 127) / 64 * 64;
    return place;
}
static float *floats(Work *w, size_t count) { return grant(w, count * sizeof(float)); }

static Rows rows(Work *w, int64_t count, int64_t width) {
    const int narrow = w->l->way != BY_FLOAT;
    const int64_t stride = apart_of(w->l->way, up_to(width, UNIT_INPUTS));
    return (Rows){grant(w, up_to(count, 32) * stride * (narrow ? 2 : 4)), width, stride, narrow};
}
INLINE Matrix matrix_of(Rows r) { return plain(r.data, r.stride, r.narrow); }

/* ---- what is done to each row ---- */

INLINE float inverse_of(const void *x, int narrow, int64_t at, int64_t C, float eps) {
    vec sum = {0};
    float rest = 0;
    int64_t c = 0;
    for (; c + LANES <= C; c += LANES) {
        const vec v = read_vec(x, narrow, at + c);
        sum += v * v;
    }
    for (; c < C; c++) {
        const float v = read_one(x, narrow, at + c);
        rest += v * v;
    }
    return 1 / sqrtf((sum_of(sum) + rest) / C + eps);
}

/* The row n of x, normalised, to that of `out`. */
static void norm_into(const Layer *l, const void *x, const void *weight, float eps, int64_t n,
                      Rows out) {
    const int64_t C = l->C, at = n * C, to = n * out.stride;
    const float inverse = inverse_of(x, l->narrow, at, C, eps);
    int64_t c = 0;
    for (; c + LANES <= C; c += LANES)
        write_vec(out.data, out.narrow, to + c,
                  read_vec(x, l->narrow, at + c) * inverse * read_vec(weight, l->norms_narrow, c));
    for (; c < C; c++)
        write_one(out.data, out.narrow, to + c,
                  read_one(x, l->narrow, at + c) * inverse * read_one(weight, l->norms_narrow, c));
}

/* grad [C] += that of the row n of x, given `of`, that of the normalised row. */
static void norm_back(const Layer *l, const void *x, const void *weight, float eps, int64_t n,
                      const float *of, float *grad) {
    const int64_t C = l->C, at = n * C;
    const float inverse = inverse_of(x, l->narrow, at, C, eps);
    float sum = 0;
    vec sums = {0};
    int64_t c = 0;
    for (; c + LANES <= C; c += LANES)
        sums += *(const vec *)(of + c) * read_vec(weight, l->norms_narrow, c) *
                read_vec(x, l->narrow, at + c);
    for (; c < C; c++)
        sum += of[c] * read_one(weight, l->norms_narrow, c) * read_one(x, l->narrow, at + c);
    const float share = (sum + sum_of(sums)) / C * inverse * inverse;
    for (c = 0; c + LANES <= C; c += LANES)
        *(vec *)(grad + c) += inverse * (*(const vec *)(of + c) * read_vec(weight, l->norms_narrow, c) -
                                         read_vec(x, l->narrow, at + c) * share);
    for (; c < C; c++)
        grad[c] += inverse * (of[c] * read_one(weight, l->norms_narrow, c) -
                              read_one(x, l->narrow, at + c) * share);
}

/* A head [D] by its angles, to where it is kept. */
static void turn(const Layer *l, int64_t n, const float *head, int64_t to) {
    const int64_t half = l->D / 2, at = n / l->T * l->angles_apart + n % l->T * l->D;
    const int narrow = l->angles_narrow;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vec low = *(const vec *)(head + i), high = *(const vec *)(head + half + i);
        write_vec(l->qkv, l->narrow, to + i, low * read_vec(l->cosine, narrow, at + i) -
                                                 high * read_vec(l->sine, narrow, at + i));
        write_vec(l->qkv, l->narrow, to + half + i,
                  high * read_vec(l->cosine, narrow, at + half + i) +
                      low * read_vec(l->sine, narrow, at + half + i));
    }
    for (; i < half; i++) {
        const float low = head[i], high = head[half + i];
        write_one(l->qkv, l->narrow, to + i, low * read_one(l->cosine, narrow, at + i) -
                                                 high * read_one(l->sine, narrow, at + i));
        write_one(l->qkv, l->narrow, to + half + i,
                  high * read_one(l->cosine, narrow, at + half + i) +
                      low * read_one(l->sine, narrow, at + half + i));
    }
}

static void keep_heads(Work *w, int64_t n) {
    const Layer *l = w->l;
    const int64_t E = l->E, H = l->H, D = l->D, at = n * (E + 2 * H) * D;
    for (int64_t e = 0; e < E; e++) turn(l, n, w->q + n * E * D + e * D, at + e * D);
    for (int64_t h = 0; h < H; h++)
        turn(l, n, w->k + n * H * D + h * D, at + (E + h) * D);
    int64_t d = 0;
    for (; d + LANES <= H * D; d += LANES)
        write_vec(l->qkv, l->narrow, at + (E + H) * D + d,
                  *(const vec *)(w->v + n * H * D + d));
    for (; d < H * D; d++)
        write_one(l->qkv, l->narrow, at + (E + H) * D + d, w->v[n * H * D + d]);
}

INLINE vec share_of(vec g) { /* the logistic function */
    const ints sign = g < 0;
    const vec t = exp_negative((vec)((ints)g | (ints)((words){0} + 0x80000000u))); /* e^-|g| */
    const vec top = (vec)(((ints)t & sign) | ((ints)((vec){0} + 1.0f) & ~sign));
    return top / (t + 1.0f);
}

/* active = silu(gate) * up; each vector of a row, its tail padded with zeros. */
static void activate(void *work, int64_t column, int64_t count, int64_t first, int64_t end,
                     const float *gate, const float *up, int64_t width) {
    const Rows out = ((Work *)work)->active;
    for (int64_t n = first; n < end; n++, gate += width, up += width)
        for (int64_t i = 0; i < count; i += LANES) { /* sums and rows go on to a whole vector */
            const vec g = *(const vec *)(gate + i);
            write_vec(out.data, out.narrow, n * out.stride + column + i,
                      g * share_of(g) * *(const vec *)(up + i));
        }
}

/* Also the gradients of gate and up, given that of `active`. */
static void activate_back(void *work, int64_t column, int64_t count, int64_t first, int64_t end,
                          const float *of, const float *twin, int64_t width) {
    Work *w = work;
    const Layer *l = w->l;
    const int narrow = w->active.narrow;
    for (int64_t n = first; n < end; n++, of += width)
        for (int64_t i = 0; i < count; i += LANES) {
            const int64_t at = n * l->I + column + i, to = n * w->active.stride + column + i;
            vec g = {0}, u = {0};
            if (count - i >= LANES) {
                g = read_vec(l->gate, l->narrow, at), u = read_vec(l->up, l->narrow, at);
            } else {
                for (int64_t j = 0; j < count - i; j++) {
                    g[j] = read_one(l->gate, l->narrow, at + j);
                    u[j] = read_one(l->up, l->narrow, at + j);
                }
            }
            const vec share = share_of(g), silu = g * share, own = *(const vec *)(of + i);
            write_vec(w->active.data, narrow, to, silu * u);
            write_vec(w->of_up.data, narrow, to, own * silu);
            write_vec(w->of_gate.data, narrow, to, own * u * (share + silu * (1.0f - share)));
        }
    (void)twin;
}
