/* A decoder layer of the Llama family with LoRA on a frozen base, forward and backward, as one job
 * each: all threads go through the same stages and meet between them.
 *
 * The formulas are those of train/fused_projections.py. Sums are float32; the rows of a product are
 * rounded to bfloat16 where the base is bfloat16 and the processor multiplies it fast.
 */
#pragma once
#include "layer_rows.h"

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
    if (w->l->way != BY_UNIT || r.width % UNIT_INPUTS) return place(w, s, matrix_of(r), M, r.width);
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

/* Memory of a pass: one piece is kept for whoever computes, another's pass gets its own. */
static pthread_mutex_t keeper = PTHREAD_MUTEX_INITIALIZER;
static char *kept_memory;
static size_t kept_bytes;

static char *borrow(size_t bytes, int *is_kept) {
    *is_kept = !pthread_mutex_trylock(&keeper);
    if (!*is_kept) return aligned_alloc(64, up_to(bytes, 64));
    if (kept_bytes < bytes) {
        free(kept_memory);
        kept_memory = aligned_alloc(64, up_to(bytes, 64));
        kept_bytes = kept_memory ? bytes : 0;
    }
    return kept_memory;
}
static void give_back(char *memory, int is_kept) {
    if (is_kept) pthread_mutex_unlock(&keeper);
    else free(memory);
}

static int compute(const Layer *l, int threads, int backward) {
    int is_kept = 0, failed = 1;
    char *memory = NULL;
    Work *w = calloc(1, sizeof *w);
    if (!w) return 1;
    w->l = l;
    void (*prepare)(Work *) = backward ? prepare_backward : prepare_forward;
    prepare(w); /* how much memory it takes */
    memory = borrow(w->used, &is_kept);
    if (!memory) goto end;
    memset(w, 0, sizeof *w);
    w->l = l, w->memory = memory;
    prepare(w);
    w->attention = (Attention){
        .B = l->B, .T = l->T, .E = l->E, .H = l->H, .D = l->D, .qkv = l->qkv, .narrow = l->narrow,
        .mask = l->mask, .mask_apart = l->mask_apart, .scale = l->scale, .cosine = l->cosine,
        .sine = l->sine, .angles_apart = l->angles_apart, .angles_narrow = l->angles_narrow,
        .way = l->way, .mixed = l->mixed, .grad = w->g_mixed, .of_q = w->of_q.data,
        .of_k = w->of_k.data, .of_v = w->of_v.data, .of_narrow = w->of_q.narrow, .apart_q = w->of_q.stride,
        .apart_k = w->of_k.stride};
    share(backward ? backward_part : forward_part, w, threads);
    failed = atomic_load(&w->failed);
end:
    give_back(memory, is_kept);
    free(w);
    return failed;
}

/* out from x, and what is kept for `layer_backward`. Returns 0, or 1 where memory ran out. */
int layer_forward(const Layer *l, int threads) { return compute(l, threads, 0); }

/* grad_x and the adapters' gradients from grad and what was kept. Returns as `layer_forward`. */
int layer_backward(const Layer *l, int threads) { return compute(l, threads, 1); }
