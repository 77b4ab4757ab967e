/* Tiles of a product by the processor's matrix unit (Intel AMX), where it has one.
 *
 * The unit multiplies 16 rows of 32 bfloat16 inputs by 32 inputs of 16 columns in one instruction,
 * and sums in float32. A panel of pairs (panels.h) is what it reads: 16 steps of it are one operand.
 * All rows of x are rounded to bfloat16 first, [M][K].
 */
#pragma once
#include "panels.h"
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#define HAS_MATRIX_UNIT 1
#else
#define HAS_MATRIX_UNIT 0
#endif

#define UNIT_ROWS 16
#define UNIT_INPUTS 32
#define UNIT_PANELS 4 /* columns of 4 panels, or 2 by 32 rows: as many sums as fit in the tiles */
#define UNIT_UNPACKED 2  /* panels of 8-bit integers that are unpacked together for few rows, and */
#define UNIT_STRETCH 576 /* their inputs: 36 KB, which stay in the nearest cache */

/* Inputs that are unpacked together: for few rows no more than stay in the nearest cache. */
INLINE int64_t unit_stretch(int64_t M, int64_t K) {
    return M <= UNIT_ROWS && K > UNIT_STRETCH ? UNIT_STRETCH : K;
}

#if HAS_MATRIX_UNIT

#define ARCH_REQ_XCOMP_PERM 0x1023
#define TILE_DATA 18

/* Whether the system lets this process use the unit; asked for once. */
static int has_matrix_unit(void) {
    static atomic_int answer; /* 0: not asked yet */
    int known = atomic_load(&answer);
    if (!known) {
        known = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) ? 1 : 2;
        atomic_store(&answer, known);
    }
    return known == 2;
}

/* Lay the tiles out: 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 columns of the weight. */
static void enter_matrix_unit(int rows) {
    struct {
        uint8_t palette, start;
        uint8_t reserved[14];
        uint16_t width[16];
        uint8_t rows[16];
    } __attribute__((packed, aligned(64))) layout = {.palette = 1};
    for (int t = 0; t < 8; t++) layout.width[t] = 64, layout.rows[t] = t < 6 ? rows : 16;
    _tile_loadconfig(&layout);
}

static void leave_matrix_unit(void) { _tile_release(); }

#define BARRIER __asm__ volatile("" ::: "memory") /* the intrinsics do not say that they read it */

/* Rows of a product, all inputs of some panels. */
typedef struct {
    const uint16_t *x; /* [rows][K] */
    const char *weight; /* [panels][K / 2][16][2] */
    int64_t K, N, rows, column;
    int tall; /* rows of a tile */
    float *y; /* [rows, N] */
    const float *bias; /* of all columns, or NULL */
    /* of weights that are 8-bit integers: their factors, and where a stretch of inputs is unpacked */
    int format;
    const float *scale;
    float *plain; /* [panels][stretch / 2][16][2]; NULL: the weight is read as it is */
} UnitTile;

/* A stretch of the inputs to `plain`; what comes after it is asked for. */
static void unpack_inputs(const UnitTile *t, int panels, int64_t from, int64_t stretch) {
    const int64_t count = from + stretch < t->K ? stretch : t->K - from, steps = t->K / 2;
    const int64_t bytes = step_bytes(t->format), floats = scale_floats(t->K, t->format);
    const int64_t before = from / BLOCK * (1 + has_offset(t->format)) * LANES;
    for (int p = 0; p < panels; p++) {
        const char *weight = t->weight + (p * steps + from / 2) * bytes;
        unpack(t->format, weight, t->scale ? t->scale + p * floats + before : NULL, count / 2,
               t->plain + p * stretch / 2 * LANES);
    }
    BARRIER;
}

/* The sums of one tile to y. */
#define KEEP_SUMS(SUM, ROW, PANEL)                                                                \
    do {                                                                                          \
        const int64_t first = (ROW) * UNIT_ROWS, c = t->column + (PANEL) * LANES;                 \
        const int64_t rows = t->rows - first < t->tall ? t->rows - first : t->tall;               \
        if (rows == t->tall && t->N - c >= LANES && !t->bias) {                                   \
            _tile_stored(SUM, t->y + first * t->N + c, t->N * sizeof(float));                     \
        } else {                                                                                  \
            _tile_stored(SUM, sums, sizeof sums[0]);                                              \
            keep_sums(t, sums, first, rows, c);                                                   \
        }                                                                                         \
    } while (0)

static void keep_sums(const UnitTile *t, float sums[UNIT_ROWS][LANES], int64_t first, int64_t rows,
                      int64_t column) {
    const int64_t left = t->N - column < LANES ? t->N - column : LANES;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < left; i++)
            t->y[(first + m) * t->N + column + i] = sums[m][i] + (t->bias ? t->bias[column + i] : 0);
}

#define READ_AHEAD 4096 /* bytes of a panel that are asked for before they are needed */

INLINE void fetch_operand(const char *place) {
    for (int line = 0; line < 16; line++) __builtin_prefetch(place + READ_AHEAD + 64 * line, 0, 3);
}

#define ADD_PANEL(PANEL, TILE)                                                                    \
    if (panels > PANEL) {                                                                         \
        if (!unpacks) fetch_operand(w + PANEL * apart);                                           \
        _tile_loadd(TILE, w + PANEL * apart, 64);                                                 \
        _tile_dpbf16ps(PANEL, 4, TILE);                                                           \
    }

/* 1 to 4 panels for up to 16 rows; `panels` and `unpacks` are constant after inlining. */
INLINE void unit_flat(const UnitTile *t, const int panels, const int unpacks) {
    float sums[UNIT_ROWS][LANES] __attribute__((aligned(64)));
    const int64_t stretch = unpacks ? unit_stretch(t->rows, t->K) : t->K;
    const int64_t apart = stretch * 32, stride = t->K * 2;
    const char *weight = unpacks ? (const char *)t->plain : t->weight;
    BARRIER;
    _tile_zero(0);
    if (panels > 1) _tile_zero(1);
    if (panels > 2) _tile_zero(2);
    if (panels > 3) _tile_zero(3);
    for (int64_t k = 0; k < t->K; k += UNIT_INPUTS) {
        if (unpacks && k % stretch == 0) unpack_inputs(t, panels, k, stretch);
        const char *w = weight + (unpacks ? k % stretch : k) * 32;
        _tile_loadd(4, t->x + k, stride);
        ADD_PANEL(0, 6)
        ADD_PANEL(1, 7)
        ADD_PANEL(2, 6)
        ADD_PANEL(3, 7)
    }
    KEEP_SUMS(0, 0, 0);
    if (panels > 1) KEEP_SUMS(1, 0, 1);
    if (panels > 2) KEEP_SUMS(2, 0, 2);
    if (panels > 3) KEEP_SUMS(3, 0, 3);
}

/* 1 or 2 panels for 32 rows. */
INLINE void unit_square(const UnitTile *t, const int panels) {
    float sums[UNIT_ROWS][LANES] __attribute__((aligned(64)));
    const int64_t apart = t->K * 32, stride = t->K * 2;
    const uint16_t *lower = t->x + UNIT_ROWS * t->K;
    BARRIER;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < t->K; k += UNIT_INPUTS) {
        const char *w = t->weight + k * 32;
        _tile_loadd(4, t->x + k, stride);
        _tile_loadd(5, lower + k, stride);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (panels > 1) {
            _tile_loadd(7, w + apart, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    KEEP_SUMS(0, 0, 0);
    KEEP_SUMS(1, 1, 0);
    if (panels > 1) {
        KEEP_SUMS(2, 0, 1);
        KEEP_SUMS(3, 1, 1);
    }
}

#define FLAT(PANELS)                                                                              \
    if (t->plain) unit_flat(t, PANELS, 1);                                                        \
    else unit_flat(t, PANELS, 0)

static void unit_few(const UnitTile *t, int panels) {
    switch (panels) {
        case 1: FLAT(1); break;
        case 2: FLAT(2); break;
        case 3: FLAT(3); break;
        default: FLAT(4);
    }
}

/* All rows [M] by some panels, at most UNIT_PANELS; rows are padded to a whole tile. */
static void multiply_by_unit(UnitTile t, int64_t M, int panels) {
    const UnitTile all = t;
    if (M <= UNIT_ROWS) {
        const int together = t.plain ? UNIT_UNPACKED : UNIT_PANELS;
        for (int p = 0; p < panels; p += together) {
            t.rows = M, t.column = all.column + p * LANES;
            t.weight = all.weight + p * t.K / 2 * step_bytes(t.format);
            if (t.scale) t.scale = all.scale + p * scale_floats(t.K, t.format);
            unit_few(&t, panels - p < together ? panels - p : together);
        }
        return;
    }
    if (t.plain) {
        unpack_inputs(&t, panels, 0, t.K);
        t.weight = (const char *)t.plain, t.plain = NULL;
    }
    const char *weight = t.weight;
    for (int p = 0; p < panels; p += 2) {
        const int some = panels - p < 2 ? 1 : 2;
        t.weight = weight + p * t.K * 32, t.column = all.column + p * LANES;
        for (int64_t m = 0; m < M; m += 2 * UNIT_ROWS) {
            t.x = all.x + m * t.K, t.y = all.y + m * t.N, t.rows = M - m;
            if (t.rows <= UNIT_ROWS) unit_few(&t, some);
            else if (some == 2) unit_square(&t, 2);
            else unit_square(&t, 1);
        }
    }
}

/* 32 inputs of a row to bfloat16. */
INLINE void narrow_inputs(const float *row, uint16_t *out) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + LANES), _mm512_loadu_ps(row));
    memcpy(out, &both, sizeof both);
}

#endif
