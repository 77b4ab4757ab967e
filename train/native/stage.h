/* Stages of products: all rows are placed, then threads take columns of all products in turn.
 *
 * A result's sums run in one order whatever the threads, so how many there are changes no bit.
 */
#pragma once
#include "columns.h"

#define ROW_NUMBERS (1 << 20) /* of placed rows that are multiplied before the next ones are */

/* The sums y [end - first, width] of some columns to where they go. */
static void hand_out(const Product *p, int64_t M, int64_t column, int64_t first, int64_t end,
                     const float *y, int64_t width) {
    const int64_t apart = p->apart, count = p->N - column < width ? p->N - column : width;
    const int narrow = p->out_narrow, added_narrow = p->added_narrow, bias_narrow = p->bias_narrow;
    const float scale = p->out_scale;
    const void *bias = p->bias, *added = p->added;
    void *out = p->out;
    if (p->out_turned) {
        for (int64_t n = 0; n < count; n += LANES)
            for (int64_t m = first; m < end; m += LANES) {
                vec r[LANES]; /* y is padded to whole blocks */
                for (int i = 0; i < LANES; i++)
                    r[i] = *(const vec *)(y + (m - first + i) * width + n) * scale;
                transpose(r);
                for (int64_t i = 0; i < LANES && n + i < count; i++) {
                    const int64_t at = (column + n + i) * M + m;
                    if (m + LANES <= end) write_vec(out, narrow, at, r[i]);
                    else
                        for (int64_t j = 0; m + j < end; j++) write_one(out, narrow, at + j, r[i][j]);
                }
            }
        return;
    }
    for (int64_t m = first; m < end; m++, y += width) {
        const int64_t at = m * apart + column;
        int64_t n = 0;
        for (; n + LANES <= count; n += LANES) {
            vec sum = *(const vec *)(y + n);
            if (bias) sum += read_vec(bias, bias_narrow, column + n);
            if (added) sum += read_vec(added, added_narrow, at + n);
            write_vec(out, narrow, at + n, sum);
        }
        for (; n < count; n++) {
            float sum = y[n];
            if (bias) sum += read_one(bias, bias_narrow, column + n);
            if (added) sum += read_one(added, added_narrow, at + n);
            write_one(out, narrow, at + n, sum);
        }
    }
}

/* ---- a stage: what is placed, then multiplied, at once ---- */

#define MOST 12

typedef struct {
    const Side *side[MOST];
    Product product[MOST];
    int sides, products;
    atomic_long placed, multiplied;
} Stage;

INLINE int64_t rows_of(const Product *p) { return p->term[0].side->M; }
INLINE int64_t all_inputs(const Product *p, Way way) {
    int64_t all = 0;
    for (int t = 0; t < p->terms; t++) all += inputs_of(way, p->term[t].side->K);
    return all;
}
INLINE int width_of(Way way) { return way == BY_UNIT ? 2 : GROUP; }
INLINE int64_t groups_of(const Product *p, Way way) {
    return (padded(p->N) / LANES + width_of(way) - 1) / width_of(way);
}
/* Rows that are multiplied before the next ones are: their inputs stay in the cache. */
INLINE int64_t block_of(const Product *p, Way way) {
    const int64_t rows = ROW_NUMBERS / all_inputs(p, way) / 32 * 32;
    return rows < 128 ? 128 : rows;
}
INLINE int64_t items_of(const Product *p, Way way) {
    const int64_t block = block_of(p, way);
    return groups_of(p, way) * ((rows_of(p) + block - 1) / block);
}

INLINE int64_t stretches_of(const Product *p, Way way) {
    int64_t all = 0;
    for (int t = 0; t < p->terms; t++)
        all += (inputs_of(way, p->term[t].side->K) + STRETCH - 1) / STRETCH;
    return all;
}

/* Room of a thread for packed columns and, twice, for their sums of so many rows. */
static float *room_for(const Product *p, Way way, int64_t rows, float **sums) {
    const int64_t width = width_of(way) * LANES;
    int64_t inputs = all_inputs(p, way);
    if (p->twin && all_inputs(p->twin, way) > inputs) inputs = all_inputs(p->twin, way);
    const int64_t packed = width * (way == BY_UNIT ? inputs / 2 : STRETCH);
    const int64_t each = up_to(rows, 32) * width;
    float *room = scratch(1, packed + 2 * each);
    if (sums) sums[0] = room + packed, sums[1] = sums[0] + each;
    return room;
}

static int multiply_item(const Product *p, Way way, int64_t item, const Product *next,
                         int64_t next_item) {
    const int64_t M = rows_of(p), groups = groups_of(p, way), block = block_of(p, way);
    const int64_t panel = item % groups * width_of(way), left = padded(p->N) / LANES - panel;
    const int64_t first = item / groups * block, end = first + block < M ? first + block : M;
    const int some = left < width_of(way) ? (int)left : width_of(way);
    const int64_t columns = width_of(way) * LANES, tall = way == BY_UNIT ? 2 * UNIT_ROWS : TALL;
    const int64_t steps = way == BY_UNIT ? all_inputs(p, way) / UNIT_INPUTS : stretches_of(p, way);
    const int64_t turns = (end - first + tall - 1) / tall * steps;
    const int64_t next_column = next ? next_item % groups_of(next, way) * columns : 0;
    float *sums[2], *packed = room_for(p, way, end - first, sums);
    if (!packed) return 1;
    for (int i = 0; i < 1 + !!p->twin; i++) {
        const Product *own = i ? p->twin : p;
        Ahead ahead = ahead_of(next && i ? next->twin : next, next_column, columns, turns);
#if HAS_MATRIX_UNIT
        if (way == BY_UNIT)
            unit_columns(own, panel, some, first, end, packed, &ahead, sums[i], columns, 0);
        else
#endif
            multiply_columns(own, way, panel, some, first, end, packed, &ahead, sums[i], columns, 0);
        if (own->out) hand_out(own, M, panel * LANES, first, end, sums[i], columns);
    }
    if (!p->finish) return 0;
    const int64_t column = panel * LANES, count = p->N - column < columns ? p->N - column : columns;
    p->finish(p->work, column, count, first, end, sums[0], sums[1], columns);
    return 0;
}

/* The product that an item of a stage belongs to, or NULL beyond the last; the item becomes its own. */
static const Product *product_at(const Stage *s, Way way, int64_t *item) {
    for (int i = 0; i < s->products; i++) {
        const int64_t items = items_of(&s->product[i], way);
        if (*item < items) return &s->product[i];
        *item -= items;
    }
    return NULL;
}

/* Run a stage; all threads have met at its end. Returns 1 where memory ran out. */
static int run_stage(Stage *s, Way way, int parts) {
    int64_t from, to, total = 0, failed = 0;
    for (int i = 0; i < s->sides; i++) total += up_to(s->side[i]->M, LANES) / LANES;
    while (take(&s->placed, 1, total, &from, &to)) {
        int i = 0;
        for (int64_t tiles; from >= (tiles = up_to(s->side[i]->M, LANES) / LANES); i++) from -= tiles;
        place_rows(s->side[i], way, from * LANES);
    }
    meet(parts);
    total = 0;
    for (int i = 0; i < s->products; i++) total += items_of(&s->product[i], way);
    while (take(&s->multiplied, 1, total, &from, &to)) {
        int64_t next = from + parts; /* most likely */
        const Product *p = product_at(s, way, &from), *then = product_at(s, way, &next);
        failed |= multiply_item(p, way, from, then, next);
    }
    meet(parts);
    return (int)failed;
}
