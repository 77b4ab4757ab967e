/* A decoder layer of the Llama family with LoRA on a frozen base, forward and backward, as one job
 * each: all threads go through the same stages and meet between them.
 *
 * The formulas are those of train/fused_projections.py. Sums are float32; the rows of a product are
 * rounded to bfloat16 where the base is bfloat16 and the processor multiplies it fast.
 */
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
    const int64_t stride = up_to(width, UNIT_INPUTS);
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
        sums += *(const vec *)(of + c) * read_vec(weight, l->norms_narrow, c) * read_vec(x, l->narrow, at + c);
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
            if (count - i >= LANES) g = read_vec(l->gate, l->narrow, at), u = read_vec(l->up, l->narrow, at);
            else
                for (int64_t j = 0; j < count - i; j++)
                    g[j] = read_one(l->gate, l->narrow, at + j), u[j] = read_one(l->up, l->narrow, at + j);
            const vec share = share_of(g), silu = g * share, own = *(const vec *)(of + i);
            write_vec(w->active.data, narrow, to, silu * u);
            write_vec(w->of_up.data, narrow, to, own * silu);
            write_vec(w->of_gate.data, narrow, to, own * u * (share + silu * (1.0f - share)));
        }
    (void)twin;
}

/* ---- stages ---- */

/* A side of a product, placed in a stage, with room of its own. */
static const Side *place(Work *w, Stage *s, Matrix x, int64_t M, int64_t K) {
    Side *side = &w->side[w->sides++];
    *side = (Side){.x = x, .M = M, .K = K, .place = grant(w, side_bytes(w->l->way, M, K))};
    s->side[s->sides++] = side;
    return side;
}

/* The same of a pass's own rows: the unit reads them where they are. */
static const Side *place_own(Work *w, Stage *s, Rows r) {
    const int64_t M = w->l->B * w->l->T;
    if (w->l->way != BY_UNIT || apart_of(BY_UNIT, r.width) != r.stride || r.width != r.stride)
        return place(w, s, matrix_of(r), M, r.width);
    Side *side = &w->side[w->sides++];
    *side = (Side){.x = matrix_of(r), .M = M, .K = r.width, .place = r.data};
    return side;
}

/* A product of a stage, to float32 rows that lie `apart`. */
static Product *product(Stage *s, int64_t N, float *out, int64_t apart) {
    Product *p = &s->product[s->products++];
    *p = (Product){.N = N, .out = out, .apart = apart, .out_scale = 1};
    return p;
}
static void add_term(Product *p, const Side *side, Matrix w) { p->term[p->terms++] = (Term){side, w}; }

INLINE Matrix scaled(Matrix m, float scale) {
    m.scale = scale;
    return m;
}

/* Inputs and outputs of each projection. */
INLINE int64_t inputs_at(const Layer *l, int i) {
    return i == DOWN ? l->I : i == O ? l->E * l->D : l->C;
}
INLINE int64_t outputs_at(const Layer *l, int i) {
    return i == Q ? l->E * l->D : i == K || i == V ? l->H * l->D : i == GATE || i == UP ? l->I : l->C;
}
INLINE int64_t tokens_of(const Layer *l) { return l->B * l->T; }

/* low = x A' of a group. */
static void lows(Work *w, Stage *s, const Side *x, int group) {
    const Group *g = &w->l->group[group];
    if (!g->a) return;
    const Matrix a = plain(g->a, inputs_at(w->l, FIRST_OF[group]), 0);
    add_term(product(s, g->rank, g->low, g->rank), x, a);
}

/* y = x W' + s low B' + bias, to rows of the projection's width. */
static Product *project(Work *w, Stage *s, const Side *x, int i, float *y) {
    const Layer *l = w->l;
    const Projection *p = &l->projection[i];
    const Group *g = &l->group[GROUP_OF[i]];
    Product *found = product(s, outputs_at(l, i), y, outputs_at(l, i));
    add_term(found, x, plain(p->base, inputs_at(l, i), l->narrow));
    if (p->b) {
        const Side *low = place(w, s, plain(g->low + p->offset, g->rank, 0), tokens_of(l), p->rank);
        add_term(found, low, scaled(plain(p->b, p->rank, 0), p->scale));
    }
    found->bias = p->bias, found->bias_narrow = l->narrow;
    return found;
}

/* Have a product go to a tensor, on top of another. */
static void keep(Product *p, void *out, const void *added, int narrow) {
    p->out = out, p->added = added, p->apart = p->N, p->out_narrow = p->added_narrow = narrow;
}

static void prepare_forward(Work *w) {
    const Layer *l = w->l;
    const int64_t M = tokens_of(l), wide = l->E * l->D, keys = l->H * l->D;
    Stage *s = w->stage;
    w->normed = rows(w, M, l->C), w->normed_after = rows(w, M, l->C), w->active = rows(w, M, l->I);
    w->q = floats(w, M * wide), w->k = floats(w, M * keys), w->v = floats(w, M * keys);

    const Side *x = place_own(w, &s[0], w->normed);
    lows(w, &s[0], x, HEADS);
    float *heads[] = {w->q, w->k, w->v};
    for (int i = Q; i <= V; i++) project(w, &s[1], x, i, heads[i]);
    x = place(w, &s[2], plain(l->mixed, wide, l->narrow), M, wide);
    lows(w, &s[2], x, OUT);
    keep(project(w, &s[3], x, O, NULL), l->middle, l->x, l->narrow);
    x = place_own(w, &s[4], w->normed_after);
    lows(w, &s[4], x, GATES);
    Product *gate = project(w, &s[5], x, GATE, NULL), *up = project(w, &s[5], x, UP, NULL);
    keep(gate, l->gate, NULL, l->narrow);
    keep(up, l->up, NULL, l->narrow);
    w->up = *up, s[5].products--; /* it is computed with the gate */
    gate->twin = &w->up, gate->finish = activate, gate->work = w;
    x = place_own(w, &s[6], w->active);
    lows(w, &s[6], x, LAST);
    keep(project(w, &s[7], x, DOWN, NULL), l->out, l->middle, l->narrow);
}

static void run(Work *w, int stage, int parts) {
    if (run_stage(&w->stage[stage], w->l->way, parts)) atomic_store(&w->failed, 1);
}

#define EACH_ROW(NEXT)                                                                            \
    for (int64_t from, to; take(&w->next[NEXT], piece_of(M, parts), M, &from, &to);)              \
        for (int64_t n = from; n < to; n++)

static void forward_part(void *work, int part, int parts) {
    Work *w = work;
    const Layer *l = w->l;
    const int64_t M = tokens_of(l);
    (void)part;
    enter_way(l->way);
    EACH_ROW(0) norm_into(l, l->x, l->before, l->before_eps, n, w->normed);
    meet(parts);
    run(w, 0, parts);
    run(w, 1, parts);
    EACH_ROW(1) keep_heads(w, n);
    meet(parts);
    const int64_t items = l->B * l->H * blocks_of(&w->attention);
    for (int64_t from, to; take(&w->next[2], 1, items, &from, &to);)
        if (attend_block(&w->attention, from)) atomic_store(&w->failed, 1);
    meet(parts);
    run(w, 2, parts);
    run(w, 3, parts);
    EACH_ROW(3) norm_into(l, l->middle, l->after, l->after_eps, n, w->normed_after);
    meet(parts);
    run(w, 4, parts);
    run(w, 5, parts);
    run(w, 6, parts);
    run(w, 7, parts);
    leave_way(l->way);
}

/* g_low = s g B of a projection, its columns of the group's. */
static void low_gradient(Work *w, Stage *s, const Side *g, int i) {
    const Projection *p = &w->l->projection[i];
    const int group = GROUP_OF[i];
    const int64_t all = w->l->group[group].rank;
    if (!p->b) return;
    if (!w->g_low[group]) w->g_low[group] = floats(w, tokens_of(w->l) * all);
    add_term(product(s, p->rank, w->g_low[group] + p->offset, all), g,
             scaled(turned(p->b, p->rank, 0), p->scale));
}

/* The gradient of a group's input, [M, K]: the sum of g W, and g_low A. */
static Product *input_gradient(Work *w, Stage *s, const Side *const *g, int group, float *y) {
    const Layer *l = w->l;
    const int first = FIRST_OF[group], end = FIRST_OF[group + 1];
    const int64_t inputs = inputs_at(l, first), rank = l->group[group].rank;
    Product *p = product(s, inputs, y, inputs);
    for (int i = first; i < end; i++)
        add_term(p, g[i - first], turned(l->projection[i].base, inputs, l->narrow));
    if (!l->group[group].a) return p;
    const Side *low = place(w, s, plain(w->g_low[group], rank, 0), tokens_of(l), rank);
    add_term(p, low, turned(l->group[group].a, inputs, 0));
    return p;
}

/* grad A = g_low' x, of a group; grad B = s g' low, of a projection */
static void learn_a(Work *w, Stage *s, int group, Matrix x) {
    const Group *g = &w->l->group[group];
    if (!g->grad_a) return;
    const int64_t inputs = inputs_at(w->l, FIRST_OF[group]);
    const Side *side = place(w, s, turned(w->g_low[group], g->rank, 0), g->rank, tokens_of(w->l));
    add_term(product(s, inputs, g->grad_a, inputs), side, other_way(x));
}
static void learn_b(Work *w, Stage *s, int i, Matrix of) {
    const Projection *p = &w->l->projection[i];
    const Group *g = &w->l->group[GROUP_OF[i]];
    if (!p->grad_b) return;
    const Side *side = place(w, s, turned(g->low + p->offset, g->rank, 0), p->rank, tokens_of(w->l));
    Product *found = product(s, outputs_at(w->l, i), p->grad_b, 0);
    add_term(found, side, other_way(of));
    found->out_turned = 1, found->out_scale = p->scale;
}

static void prepare_backward(Work *w) {
    const Layer *l = w->l;
    const int64_t M = tokens_of(l), C = l->C, I = l->I, wide = l->E * l->D, keys = l->H * l->D;
    Stage *s = w->stage;
    w->normed = rows(w, M, C), w->normed_after = rows(w, M, C), w->mid_narrow = rows(w, M, C);
    w->active = rows(w, M, I), w->of_gate = rows(w, M, I), w->of_up = rows(w, M, I);
    w->of_q = rows(w, M, wide), w->of_k = rows(w, M, keys), w->of_v = rows(w, M, keys);
    w->mid = floats(w, M * C), w->g_normed = floats(w, M * C);
    w->g_mixed = floats(w, M * wide);

    const Matrix of = plain(l->grad, C, l->narrow);
    const Side *g[3] = {place(w, &s[0], of, M, C)};
    low_gradient(w, &s[0], g[0], DOWN);
    Product *of_active = input_gradient(w, &s[1], g, LAST, NULL);
    of_active->finish = activate_back, of_active->work = w;

    g[0] = place_own(w, &s[2], w->of_gate), g[1] = place_own(w, &s[2], w->of_up);
    low_gradient(w, &s[2], g[0], GATE);
    low_gradient(w, &s[2], g[1], UP);
    learn_a(w, &s[2], LAST, matrix_of(w->active));
    learn_b(w, &s[2], DOWN, of);
    input_gradient(w, &s[3], g, GATES, w->g_normed);
    learn_a(w, &s[3], GATES, matrix_of(w->normed_after));
    learn_b(w, &s[3], GATE, matrix_of(w->of_gate));
    learn_b(w, &s[3], UP, matrix_of(w->of_up));

    g[0] = place_own(w, &s[4], w->mid_narrow);
    low_gradient(w, &s[4], g[0], O);
    input_gradient(w, &s[5], g, OUT, w->g_mixed);
    learn_a(w, &s[5], OUT, plain(l->mixed, wide, l->narrow));
    learn_b(w, &s[5], O, matrix_of(w->mid_narrow));

    const Rows heads[] = {w->of_q, w->of_k, w->of_v};
    for (int i = Q; i <= V; i++) {
        g[i] = place_own(w, &s[6], heads[i]);
        low_gradient(w, &s[6], g[i], i);
        learn_b(w, &s[6], i, matrix_of(heads[i]));
    }
    if (l->grad_x) input_gradient(w, &s[7], g, HEADS, w->g_normed);
    learn_a(w, &s[7], HEADS, matrix_of(w->normed));
}

/* mid = g + the norm's gradient; both norms again. */
static void middle_row(Work *w, int64_t n) {
    const Layer *l = w->l;
    const int64_t C = l->C;
    float *row = w->mid + n * C;
    int64_t c = 0;
    for (; c + LANES <= C; c += LANES) *(vec *)(row + c) = read_vec(l->grad, l->narrow, n * C + c);
    for (; c < C; c++) row[c] = read_one(l->grad, l->narrow, n * C + c);
    norm_back(l, l->middle, l->after, l->after_eps, n, w->g_normed + n * C, row);
    const int64_t to = n * w->mid_narrow.stride;
    for (c = 0; c + LANES <= C; c += LANES)
        write_vec(w->mid_narrow.data, w->mid_narrow.narrow, to + c, *(vec *)(row + c));
    for (; c < C; c++) write_one(w->mid_narrow.data, w->mid_narrow.narrow, to + c, row[c]);
    norm_into(l, l->x, l->before, l->before_eps, n, w->normed);
}

static void first_row(Work *w, int64_t n) {
    const Layer *l = w->l;
    const int64_t C = l->C;
    float *row = w->mid + n * C;
    norm_back(l, l->x, l->before, l->before_eps, n, w->g_normed + n * C, row);
    int64_t c = 0;
    for (; c + LANES <= C; c += LANES) write_vec(l->grad_x, l->narrow, n * C + c, *(vec *)(row + c));
    for (; c < C; c++) write_one(l->grad_x, l->narrow, n * C + c, row[c]);
}

static void backward_part(void *work, int part, int parts) {
    Work *w = work;
    const Layer *l = w->l;
    const int64_t M = tokens_of(l);
    (void)part;
    enter_way(l->way);
    run(w, 0, parts);
    run(w, 1, parts);
    EACH_ROW(0) norm_into(l, l->middle, l->after, l->after_eps, n, w->normed_after);
    meet(parts);
    run(w, 2, parts);
    run(w, 3, parts);
    EACH_ROW(1) middle_row(w, n);
    meet(parts);
    run(w, 4, parts);
    run(w, 5, parts);
    for (int64_t from, to; take(&w->next[2], 1, l->B * l->H, &from, &to);)
        if (attend_back(&w->attention, from)) atomic_store(&w->failed, 1);
    meet(parts);
    run(w, 6, parts);
    run(w, 7, parts);
    if (l->grad_x) EACH_ROW(3) first_row(w, n);
    leave_way(l->way);
}

/* ---- from outside ---- */

static int compute(const Layer *l, int threads, int backward) {
    static __thread char *memory;
    static __thread size_t have;
    Work *w = NULL;
    size_t wanted = 0;
    for (int pass = 0; pass < 2; pass++) { /* the first learns how much memory, the second gives it */
        free(w);
        w = calloc(1, sizeof *w);
        if (!w) return 1;
        if (pass && have < wanted) {
            free(memory);
            memory = aligned_alloc(64, (wanted + 63) / 64 * 64);
            have = memory ? wanted : 0;
            if (!memory) {
                free(w);
                return 1;
            }
        }
        w->l = l, w->memory = pass ? memory : NULL;
        if (backward) prepare_backward(w);
        else prepare_forward(w);
        wanted = w->used;
    }
    w->attention = (Attention){
        .B = l->B, .T = l->T, .E = l->E, .H = l->H, .D = l->D, .qkv = l->qkv, .narrow = l->narrow,
        .mask = l->mask, .mask_apart = l->mask_apart, .scale = l->scale, .cosine = l->cosine,
        .sine = l->sine, .angles_apart = l->angles_apart, .angles_narrow = l->angles_narrow,
        .way = l->way, .mixed = l->mixed, .grad = w->g_mixed, .of_q = w->of_q.data, .of_k = w->of_k.data,
        .of_v = w->of_v.data, .of_narrow = w->of_q.narrow, .apart_q = w->of_q.stride,
        .apart_k = w->of_k.stride};
    share(backward ? backward_part : forward_part, w, threads);
    const int failed = atomic_load(&w->failed);
    free(w);
    return failed;
}

/* out from x, and what is kept for `layer_backward`. Returns 0, or 1 where memory ran out. */
int layer_forward(const Layer *l, int threads) { return compute(l, threads, 0); }

/* grad_x and the adapters' gradients from grad and what was kept. Returns as `layer_forward`. */
int layer_backward(const Layer *l, int threads) { return compute(l, threads, 1); }
