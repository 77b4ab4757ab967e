/* A whole forward pass of a Llama-like model: all layers, the last norm and the head, as one job.
 *
 * All threads go through the same stages and meet between them, so that a stage costs a microsecond
 * to begin and nothing is asked of Python. A pass is a flat row of tokens: one of each sequence that
 * decodes, and stretches of prompts.
 */
#pragma once
#include "attention.h"
#include "product.h"
#include "rows.h"

typedef struct {
    const float *weight; /* NULL: no norm */
    float offset, eps;
} Norm;

typedef struct {
    Norm before, after; /* attention; the latter comes before the gates */
    Norm query, key;    /* of each head */
    const Product *qkv, *out, *gate_up, *down;
    void *keys, *values; /* [T, kv_heads, width], float32, or bfloat16 if narrow */
    float scale, softcap;
    int64_t window;
} Layer;

typedef struct {
    const Layer *layers;
    int64_t num_layers, hidden, heads, kv_heads, width, inner;
    int32_t narrow;
    Norm last;
    const Product *head;
    const float *cosine, *sine; /* [positions, width] */
} Model;

typedef struct {
    int64_t num_tokens, num_sequences, num_kept;
    const int64_t *position; /* [N] */
    const int64_t *place;    /* [N] row of the arena that the token's key and value go to */
    const int64_t *begin, *count, *offset; /* [S] first token, tokens; where the block begins */
    const int64_t *kept;     /* [K] tokens that reach the head */
    const Adapters *body, *top; /* of all tokens, of those kept; NULL without adapters */
} Pass;

enum { QKV, OUT, GATE_UP, DOWN, PRODUCTS };
enum { ENTER = PRODUCTS, TURN, LOOK, MIDDLE, GATE, STAGES };

typedef struct {
    atomic_long next[STAGES];
    Multiplication product[PRODUCTS];
} LayerWork;

typedef struct {
    int64_t sequence, head, from, count; /* head < 0: all heads; tokens of the sequence */
} Span;

typedef struct {
    const Model *model;
    const Pass *pass;
    float *x, *normed, *qkv, *mixed, *gate_up, *gated, *added;
    float *hidden, *logits;
    LayerWork *layers;
    Multiplication head;
    atomic_long keep;
    Span *spans;
    int64_t num_spans;
    atomic_int failed;
} Forward;

INLINE void norm_with(const Norm *norm, const float *x, int64_t K, float *y) {
    norm_row(x, norm->weight, norm->offset, norm->eps, K, y);
}

/* x += added (unless NULL); normed = norm(x) */
static void add_and_norm(Forward *f, atomic_long *next, const float *added, const Norm *norm,
                         int parts) {
    const int64_t N = f->pass->num_tokens, C = f->model->hidden;
    int64_t from, to;
    while (take(next, piece_of(N, parts), N, &from, &to))
        for (int64_t n = from; n < to; n++) {
            float *x = f->x + n * C;
            if (added) axpy(1, added + n * C, x, C);
            norm_with(norm, x, C, f->normed + n * C);
        }
}

/* A row to its place in the arena, rounded to nearest even where that is narrow. */
static void keep_row(void *arena, int narrow, int64_t place, const float *row, int64_t count) {
    if (!narrow) {
        memcpy((float *)arena + place, row, count * sizeof(float));
        return;
    }
    uint16_t *out = (uint16_t *)arena + place;
    for (int64_t i = 0; i < count; i++) out[i] = narrowed(row[i]);
}

/* Norms and angles of queries and keys; keys and values to the arena. */
static void turn_token(Forward *f, const Layer *layer, int64_t n) {
    const Model *m = f->model;
    const int64_t D = m->width, E = m->heads, H = m->kv_heads, position = f->pass->position[n];
    const float *cosine = m->cosine + position * D, *sine = m->sine + position * D;
    float *query = f->qkv + n * (E + 2 * H) * D, *key = query + E * D, *value = key + H * D;
    for (int64_t e = 0; e < E + H; e++) {
        const Norm *norm = e < E ? &layer->query : &layer->key;
        float *head = query + e * D;
        if (norm->weight) norm_with(norm, head, D, head);
        rotate_head(head, D, cosine, sine);
    }
    keep_row(layer->keys, m->narrow, f->pass->place[n] * H * D, key, H * D);
    keep_row(layer->values, m->narrow, f->pass->place[n] * H * D, value, H * D);
}

static void look(Forward *f, const Layer *layer, atomic_long *next) {
    const Model *m = f->model;
    const Pass *p = f->pass;
    const int64_t H = m->kv_heads, D = m->width;
    const Heads heads = {.query = f->qkv, .keys = layer->keys, .values = layer->values,
                         .narrow = m->narrow, .out = f->mixed, .stride = (m->heads + 2 * H) * D, .E = m->heads, .H = H,
                         .D = D, .V = D, .scale = layer->scale, .softcap = layer->softcap,
                         .window = layer->window};
    int64_t at, to;
    while (take(next, 1, f->num_spans, &at, &to)) {
        const Span span = f->spans[at];
        const int64_t n = p->begin[span.sequence] + span.from, offset = p->offset[span.sequence];
        const int64_t position = p->position[n], low = span.head < 0 ? 0 : span.head;
        const int64_t high = span.head < 0 ? H : span.head + 1, keys = position + span.count;
        const int whole = D % LANES == 0 && span.count > 1;
        float *memory = scratch(2, whole ? span_floats(&heads, keys) : 4 * keys);
        if (!memory) {
            atomic_store(&f->failed, 1);
            continue;
        }
        for (int64_t h = low; h < high; h++) {
            if (whole) {
                attend_span(&heads, n, span.count, position, offset, h, memory);
                continue;
            }
            for (int64_t t = 0; t < span.count; t++) {
                int64_t length = position + t + 1, hidden = 0;
                if (layer->window && length > layer->window) hidden = length - layer->window;
                attend_one(&heads, n + t, h, offset + hidden, length - hidden, memory);
            }
        }
    }
}

static void run_layer(Forward *f, int64_t l, int part, int parts) {
    const Layer *layer = &f->model->layers[l];
    const int64_t N = f->pass->num_tokens, I = f->model->inner;
    LayerWork *w = &f->layers[l];
    int64_t from, to;
    add_and_norm(f, &w->next[ENTER], l ? f->added : NULL, &layer->before, parts);
    meet(parts);
    multiply_part(&w->product[QKV], part, parts);
    meet(parts);
    while (take(&w->next[TURN], piece_of(N, parts), N, &from, &to))
        for (int64_t n = from; n < to; n++) turn_token(f, layer, n);
    meet(parts);
    look(f, layer, &w->next[LOOK]);
    meet(parts);
    multiply_part(&w->product[OUT], part, parts);
    meet(parts);
    add_and_norm(f, &w->next[MIDDLE], f->added, &layer->after, parts);
    meet(parts);
    multiply_part(&w->product[GATE_UP], part, parts);
    meet(parts);
    while (take(&w->next[GATE], piece_of(N, parts), N, &from, &to))
        for (int64_t n = from; n < to; n++) gate_row(f->gate_up + n * 2 * I, I, f->gated + n * I);
    meet(parts);
    multiply_part(&w->product[DOWN], part, parts);
    meet(parts);
}

static void forward_part(void *work, int part, int parts) {
    Forward *f = work;
    const int64_t C = f->model->hidden, K = f->pass->num_kept;
    int64_t from, to;
    for (int64_t l = 0; l < f->model->num_layers; l++) run_layer(f, l, part, parts);
    while (take(&f->keep, piece_of(K, parts), K, &from, &to))
        for (int64_t k = from; k < to; k++) {
            float *x = f->x + f->pass->kept[k] * C;
            axpy(1, f->added + f->pass->kept[k] * C, x, C);
            norm_with(&f->model->last, x, C, f->hidden + k * C);
        }
    if (!K) return;
    meet(parts);
    multiply_part(&f->head, part, parts);
}

/* Cut what attends into pieces of work: a decoding sequence whole (by heads where there are few),
 * a prompt by heads and stretches. */
static int64_t cut(const Pass *p, int64_t heads, int threads, Span *spans) {
    int64_t count = 0;
    for (int64_t s = 0; s < p->num_sequences; s++) {
        if (p->count[s] == 1 && p->num_sequences >= 4 * threads) {
            if (spans) spans[count] = (Span){s, -1, 0, 1};
            count++;
            continue;
        }
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = 0; t < p->count[s]; t += TILE_TOKENS) {
                int64_t left = p->count[s] - t;
                if (spans) spans[count] = (Span){s, h, t, left < TILE_TOKENS ? left : TILE_TOKENS};
                count++;
            }
    }
    return count;
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* x [N, hidden] the embedded tokens, overwritten; hidden [K, hidden], what the head is given; logits
 * [K, V]. Returns 0, or 1 where memory ran out. */
int forward(const Model *m, const Pass *p, float *x, float *hidden, float *logits, int threads) {
    const int64_t N = p->num_tokens, C = m->hidden, D = m->width, L = m->num_layers;
    const int64_t Q = (m->heads + 2 * m->kv_heads) * D, E = m->heads * D, I = m->inner;
    const int64_t num_spans = cut(p, m->kv_heads, threads, NULL);
    Forward f = {.model = m, .pass = p, .x = x, .hidden = hidden, .logits = logits,
                 .num_spans = num_spans};
    f.layers = calloc(L, sizeof(LayerWork));
    f.spans = malloc((num_spans + 1) * sizeof(Span));
    f.normed = scratch(3, N * (2 * C + Q + E + 3 * I));
    if (!f.layers || !f.spans || !f.normed) goto no_memory;
    f.added = f.normed + N * C, f.qkv = f.added + N * C, f.mixed = f.qkv + N * Q;
    f.gate_up = f.mixed + N * E, f.gated = f.gate_up + N * 2 * I;
    cut(p, m->kv_heads, threads, f.spans);
    int64_t xt = 0, products = 0;
    f.head = multiplication(m->head, m->head->active ? p->top : NULL, hidden, p->num_kept, logits);
    for (int pass = 0; pass < 2; pass++) { /* the first learns how much memory, the second gives it */
        float *place = pass ? scratch(0, xt) : NULL, *sums = pass ? scratch(1, products) : NULL;
        if (pass && (!place || (products && !sums))) goto no_memory;
        for (int64_t i = 0; i <= L * PRODUCTS; i++) {
            const int64_t l = i / PRODUCTS;
            Multiplication *w = i < L * PRODUCTS ? &f.layers[l].product[i % PRODUCTS] : &f.head;
            if (!pass && i < L * PRODUCTS) {
                const Layer *layer = &m->layers[l];
                const Product *P[] = {layer->qkv, layer->out, layer->gate_up, layer->down};
                const float *from[] = {f.normed, f.mixed, f.normed, f.gated};
                float *to[] = {f.qkv, f.added, f.gate_up, f.added};
                const int n = i % PRODUCTS;
                *w = multiplication(P[n], P[n]->active ? p->body : NULL, from[n], N, to[n]);
            }
            xt = most(xt, xt_floats(w)), products = most(products, products_floats(w));
            w->xt = place, w->products = sums;
        }
    }
    share(forward_part, &f, threads);
    int failed = atomic_load(&f.failed) | atomic_load(&f.head.failed);
    for (int64_t l = 0; l < L; l++)
        for (int n = 0; n < PRODUCTS; n++) failed |= atomic_load(&f.layers[l].product[n].failed);
    free(f.layers), free(f.spans);
    return failed;
no_memory:
    free(f.layers), free(f.spans);
    return 1;
}
