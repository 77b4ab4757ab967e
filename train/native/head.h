/* The language-model head of positions with a target: log-probabilities, entropies, and on the way
 * the gradient of the hidden states.
 *
 * With z = h W' / temperature and p = softmax(z), the log-probability of a target has the gradient
 * (onehot - p) W / temperature by h, whatever its weight in a loss. Logits exist for a chunk of
 * positions at a time.
 */
#pragma once
#include "stage.h"

#define CHUNK 128  /* positions */
#define SLICE 2048 /* of the vocabulary, summed one after the other */

typedef struct {
    int64_t N, D, V;
    const void *hidden, *weight; /* [N, D], [V, D] */
    const int64_t *target;       /* [N] */
    float *log_prob, *entropy, *is_top; /* [N] */
    void *slope;                        /* [N, D], NULL: not wanted */
    int32_t narrow, way;
    float temperature;
} Head;

typedef struct {
    const Head *h;
    int64_t first, M, slices;
    float *logits, *grad; /* [M, V], [M, D] */
    char *shares;         /* onehot - p: [slices][M][SLICE] and what lies between them */
    Side x, *side;
    Stage *stage; /* the logits, and each slice of the gradient */
    atomic_long next[2];
    atomic_int failed;
} HeadWork;

INLINE int64_t slice_width(const Head *h, int64_t slice) {
    return h->V - slice * SLICE < SLICE ? h->V - slice * SLICE : SLICE;
}
INLINE size_t slice_bytes(const Head *h) {
    return up_to(CHUNK, 32) * (SLICE + UNIT_INPUTS) * (h->way == BY_FLOAT ? 4 : 2);
}

/* Scores of the row m, whose logits become onehot - p where that is wanted. */
static void score_row(HeadWork *w, int64_t m) {
    const Head *h = w->h;
    const int64_t V = h->V, n = w->first + m, target = h->target[n];
    const float scale = 1 / h->temperature;
    float *z = w->logits + m * V;
    vec top = (vec){0} - INFINITY;
    int64_t v = 0, best = 0;
    for (; v + LANES <= V; v += LANES) {
        const vec own = *(vec *)(z + v) *= scale;
        const ints above = own > top;
        top = (vec)(((ints)own & above) | ((ints)top & ~above));
    }
    float most = -INFINITY;
    for (int l = 0; l < LANES; l++) most = top[l] > most ? top[l] : most;
    for (int64_t r = v; r < V; r++) {
        z[r] *= scale;
        most = z[r] > most ? z[r] : most;
    }
    while (best < V && z[best] != most) best++;
    const int is_known = (uint64_t)target < (uint64_t)V; /* else it is told as not a number */
    const float chosen = is_known ? z[target] - most : NAN;
    vec sum = {0}, weighted = {0};
    for (v = 0; v + LANES <= V; v += LANES) {
        const vec below = *(const vec *)(z + v) - most;
        const vec e = *(vec *)(z + v) = exp_negative(below);
        sum += e, weighted += e * below;
    }
    float total = sum_of(sum), mean = sum_of(weighted);
    for (; v < V; v++) {
        const float below = z[v] - most;
        z[v] = expf(below);
        total += z[v], mean += z[v] * below;
    }
    const float log_total = logf(total);
    h->log_prob[n] = chosen - log_total;
    h->entropy[n] = log_total - mean / total;
    h->is_top[n] = best == target;
    if (!h->slope) return;
    const int narrow = h->way != BY_FLOAT;
    for (int64_t s = 0; s < w->slices; s++) {
        const int64_t from = s * SLICE, width = slice_width(h, s);
        char *place = w->shares + s * slice_bytes(h);
        const int64_t to = m * apart_of(h->way, width);
        for (v = 0; v + LANES <= width; v += LANES)
            write_vec(place, narrow, to + v, *(const vec *)(z + from + v) * (-1 / total));
        for (; v < width; v++) write_one(place, narrow, to + v, z[from + v] * (-1 / total));
        if (target >= from && target < from + width)
            write_one(place, narrow, to + target - from, 1 - z[target] / total);
        if (h->way == BY_UNIT)
            for (; v < inputs_of(BY_UNIT, width); v++) write_one(place, narrow, to + v, 0);
    }
}

static void head_part(void *work, int part, int parts) {
    HeadWork *w = work;
    const Head *h = w->h;
    int failed = 0;
    (void)part;
    enter_way(h->way);
    failed |= run_stage(&w->stage[0], h->way, parts);
    for (int64_t from, to; take(&w->next[0], 1, w->M, &from, &to);) score_row(w, from);
    meet(parts);
    for (int64_t s = 0; s < w->slices && h->slope; s++)
        failed |= run_stage(&w->stage[1 + s], h->way, parts);
    for (int64_t from, to; h->slope && take(&w->next[1], 1, w->M, &from, &to);)
        for (int64_t d = 0; d < h->D; d++)
            write_one(h->slope, h->narrow, (w->first + from) * h->D + d,
                      w->grad[from * h->D + d] / h->temperature);
    leave_way(h->way);
    if (failed) atomic_store(&w->failed, 1);
}

/* The stages of a chunk. The unit reads the head as it lies, as rows; else its columns are packed. */
static void prepare_head(HeadWork *w, char *placed) {
    const Head *h = w->h;
    const Matrix weight = plain(h->weight, h->D, h->narrow);
    const char *hidden = (const char *)h->hidden + w->first * h->D * (h->narrow ? 2 : 4);
    const Matrix x = plain(hidden, h->D, h->narrow);
    const int swaps = h->way == BY_UNIT && apart_of(BY_UNIT, h->D) == h->D && h->V % 32 == 0;
    Stage *s = &w->stage[0];
    if (swaps) w->x = (Side){weight, h->V, h->D, (void *)h->weight};
    else w->x = (Side){x, w->M, h->D, placed}, s->side[s->sides++] = &w->x;
    s->product[s->products++] = (Product){
        .term = {{&w->x, swaps ? x : weight}}, .terms = 1, .N = swaps ? w->M : h->V,
        .out = w->logits, .apart = h->V, .out_turned = swaps, .out_scale = 1};
    for (int64_t i = 0; i < w->slices && h->slope; i++) {
        const int64_t width = slice_width(h, i), apart = apart_of(h->way, width);
        char *shares = w->shares + i * slice_bytes(h);
        const char *rows = (const char *)h->weight + i * SLICE * h->D * (h->narrow ? 2 : 4);
        s = &w->stage[1 + i];
        if (h->way == BY_UNIT) {
            w->side[i] = (Side){plain(shares, apart, 1), w->M, width, shares};
        } else {
            w->side[i] = (Side){plain(shares, apart, h->way != BY_FLOAT), w->M, width, placed};
            s->side[s->sides++] = &w->side[i];
        }
        s->product[s->products++] = (Product){
            .term = {{&w->side[i], turned(rows, h->D, h->narrow)}}, .terms = 1, .N = h->D,
            .out = w->grad, .added = i ? w->grad : NULL, .apart = h->D, .out_scale = 1};
    }
}

/* Returns 0, or 1 where memory ran out. */
int head_scores(const Head *h, int threads) {
    const int64_t slices = (h->V + SLICE - 1) / SLICE, M = h->N < CHUNK ? h->N : CHUNK;
    const size_t logits = up_to(M, 32) * h->V * sizeof(float), grad = up_to(M * h->D * 4, 64);
    const size_t placed = up_to(side_bytes(h->way, M, h->D > SLICE ? h->D : SLICE), 64);
    char *memory = aligned_alloc(64, up_to(logits, 64) + grad + placed + slices * slice_bytes(h));
    int failed = !memory;
    for (int64_t first = 0; first < h->N && !failed; first += CHUNK) {
        HeadWork w = {.h = h, .first = first, .M = h->N - first < CHUNK ? h->N - first : CHUNK,
                      .slices = slices, .logits = (float *)memory};
        w.grad = (float *)(memory + up_to(logits, 64));
        w.shares = memory + up_to(logits, 64) + grad + placed;
        w.stage = calloc(1 + slices, sizeof *w.stage), w.side = calloc(slices, sizeof *w.side);
        failed = !w.stage || !w.side;
        if (!failed) {
            prepare_head(&w, memory + up_to(logits, 64) + grad);
            share(head_part, &w, threads);
            failed = atomic_load(&w.failed);
        }
        free(w.stage), free(w.side);
    }
    free(memory);
    return failed;
}
