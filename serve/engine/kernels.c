/* What a decode step on a CPU spends its time in: products of few rows with packed weights, the
 * adapters of every row, attention of one query a sequence, and RMS norms. All sums are float32.
 *
 * Weights lie in panels of 16 output columns, [panels][K][16], so that one vector holds 16 columns
 * of one input. A panel's numbers are float32, bfloat16, or 8-bit integers with a float32 scale and
 * offset for each column and 32 inputs ([panels][K/32][2][16]); they become float32 on the way to
 * the registers.
 *
 * GCC's and Clang's vector extensions keep this free of any one instruction set.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define BLOCK 32 /* inputs that share a scale */
#define MAX_SIBLINGS 8
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));
typedef int8_t bytes __attribute__((vector_size(16), aligned(1)));

enum { F32, BF16, Q8 };

typedef struct {
    const void *weight; /* [panels][K][16] */
    const float *scale; /* Q8: [panels][K/32][2][16], factors and offsets */
    const float *bias;  /* [N] or NULL */
    int64_t K, N;
    int32_t format;
    /* adapters: A [rows][siblings][K], B[s] [rows][size[s]]; siblings is 0 where there are none */
    int32_t siblings;
    const float *a;
    const float *b[MAX_SIBLINGS];
    int64_t size[MAX_SIBLINGS];
} Product;

typedef struct {
    int64_t num_tokens;
    const int32_t *first; /* [N] where a token's rows begin in `rows` */
    const int32_t *count; /* [N] how many it has; 0 for the base */
    const int32_t *rows;
    int32_t most; /* the largest count */
} Adapters;

/* Scratch memory of a thread, grown on demand and kept. */
static float *scratch(int which, size_t floats) {
    static __thread float *memory[3];
    static __thread size_t have[3];
    if (have[which] < floats) {
        free(memory[which]);
        memory[which] = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        have[which] = memory[which] ? floats : 0;
    }
    return memory[which];
}

typedef struct {
    vec factor, offset;
} Scale;

INLINE int64_t blocks_of(int64_t K) { return (K + BLOCK - 1) / BLOCK; }

INLINE Scale scale_at(const float *scale, int format, int64_t block) {
    if (format != Q8) return (Scale){{0}, {0}};
    return (Scale){((const vec *)scale)[2 * block], ((const vec *)scale)[2 * block + 1]};
}

INLINE vec load(const char *weight, int format, int64_t index, Scale scale) {
    if (format == F32) return ((const vec *)weight)[index];
    if (format == BF16) {
        words wide = __builtin_convertvector(((const halves *)weight)[index], words);
        return (vec)(wide << 16);
    }
    vec whole = __builtin_convertvector(((const bytes *)weight)[index], vec);
    return whole * scale.factor + scale.offset;
}

INLINE int64_t width(int format) { return format == F32 ? 64 : format == BF16 ? 32 : 16; }

/* y[rows][panels * 16] = xt[K][tall]' * weight; `tall` and `panels` are constants after inlining. */
INLINE void tile(const float *xt, const int tall, const int panels, const int format,
                 const char *weight, const float *scale, int64_t K, vec *acc) {
    for (int i = 0; i < tall * panels; i++) acc[i] = (vec){0};
    for (int64_t k0 = 0; k0 < K; k0 += BLOCK) {
        int64_t stop = k0 + BLOCK < K ? k0 + BLOCK : K;
        Scale scales[8];
        for (int p = 0; p < panels; p++)
            scales[p] = scale_at(scale, format, p * blocks_of(K) + k0 / BLOCK);
        for (int64_t k = k0; k < stop; k++)
            for (int p = 0; p < panels; p++) {
                vec w = load(weight, format, p * K + k, scales[p]);
                for (int m = 0; m < tall; m++) acc[p * tall + m] += w * xt[k * tall + m];
            }
    }
}

INLINE void store(const vec *acc, int tall, int panels, int64_t rows, int64_t column, int64_t N,
                  const float *bias, float *y) {
    for (int p = 0; p < panels; p++) {
        int64_t c = column + p * LANES, left = N - c;
        if (left <= 0) return;
        for (int64_t m = 0; m < rows; m++) {
            vec sum = acc[p * tall + m];
            float *place = y + m * N + c;
            if (left >= LANES) {
                if (bias) sum += *(const vec *)(bias + c);
                *(vec *)place = sum;
            } else {
                for (int64_t i = 0; i < left; i++) place[i] = sum[i] + (bias ? bias[c + i] : 0);
            }
        }
    }
}

#define RUN(TALL, PANELS)                                                                         \
    do {                                                                                          \
        vec acc[TALL * PANELS];                                                                   \
        if (format == F32) tile(xt, TALL, PANELS, F32, weight, scale, K, acc);                    \
        else if (format == BF16) tile(xt, TALL, PANELS, BF16, weight, scale, K, acc);             \
        else tile(xt, TALL, PANELS, Q8, weight, scale, K, acc);                                   \
        store(acc, TALL, PANELS, rows, column, N, bias, y);                                       \
    } while (0)

/* Panels that one call of `multiply_tile` takes at a height: always 8 to 16 sums in registers. */
INLINE int together(int tall) { return tall == 1 ? 8 : tall == 4 ? 4 : tall == 8 ? 2 : 1; }

static void multiply_tile(const float *xt, int tall, int panels, int format, const char *weight,
                          const float *scale, int64_t K, int64_t rows, int64_t column, int64_t N,
                          const float *bias, float *y) {
    if (tall == 1 && panels == 8) RUN(1, 8);
    else if (tall == 4 && panels == 4) RUN(4, 4);
    else if (tall == 8 && panels == 2) RUN(8, 2);
    else if (tall == 16) RUN(16, 1);
    else {
        int64_t step = K * width(format), steps = format == Q8 ? blocks_of(K) * 2 * LANES : 0;
        for (int p = 0; p < panels; p++, weight += step, scale += steps, column += LANES) {
            if (tall == 1) RUN(1, 1);
            else if (tall == 4) RUN(4, 1);
            else RUN(8, 1);
        }
    }
}

INLINE float dot(const float *x, const float *w, int64_t K) {
    vec s0 = {0}, s1 = {0};
    int64_t k = 0;
    for (; k + 2 * LANES <= K; k += 2 * LANES) {
        s0 += *(const vec *)(x + k) * *(const vec *)(w + k);
        s1 += *(const vec *)(x + k + LANES) * *(const vec *)(w + k + LANES);
    }
    s0 += s1;
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += s0[i];
    for (; k < K; k++) sum += x[k] * w[k];
    return sum;
}

INLINE void axpy(float a, const float *x, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) *(vec *)(y + i) += a * *(const vec *)(x + i);
    for (; i < n; i++) y[i] += a * x[i];
}

/* Add every token's own adapter. Runs inside a parallel region; `products` is shared. */
static void add_adapters(const Product *P, const Adapters *A, const float *x, float *y,
                         float *products) {
    int64_t S = P->siblings, items = A->num_tokens * S;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; i++) {
        int64_t n = i / S, s = i % S;
        for (int32_t j = 0; j < A->count[n]; j++) {
            int64_t row = A->rows[A->first[n] + j];
            products[i * A->most + j] = dot(x + n * P->K, P->a + (row * S + s) * P->K, P->K);
        }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; i++) {
        int64_t n = i / S, s = i % S, start = 0;
        for (int64_t t = 0; t < s; t++) start += P->size[t];
        for (int32_t j = 0; j < A->count[n]; j++) {
            int64_t row = A->rows[A->first[n] + j];
            axpy(products[i * A->most + j], P->b[s] + row * P->size[s], y + n * P->N + start,
                 P->size[s]);
        }
    }
}

/* y [M, N] = x [M, K] * weight' + bias + adapters. Returns 0, or 1 where memory ran out. */
int multiply(const Product *P, const Adapters *A, const float *x, int64_t M, float *y, int threads) {
    const int64_t K = P->K, N = P->N, panels = (N + LANES - 1) / LANES;
    const int last = M % 16 == 0 ? 16 : M % 16 == 1 ? 1 : M % 16 <= 4 ? 4 : M % 16 <= 8 ? 8 : 16;
    const int64_t tiles = (M + 15) / 16, step = K * width(P->format);
    const int64_t steps = P->format == Q8 ? blocks_of(K) * 2 * LANES : 0;
    const int group = tiles == 1 ? together(last) : 1;
    const int64_t groups = (panels + group - 1) / group;
    float *xt = M == 1 ? (float *)x : scratch(0, tiles * 16 * K);
    float *products = A && P->siblings ? scratch(1, A->num_tokens * P->siblings * A->most) : NULL;
    if (!xt || (A && P->siblings && A->most && !products)) return 1;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        if (M > 1) {
#pragma omp for schedule(static) collapse(2)
            for (int64_t t = 0; t < tiles; t++)
                for (int64_t k0 = 0; k0 < K; k0 += 64) {
                    int64_t tall = t == tiles - 1 ? last : 16, stop = k0 + 64 < K ? k0 + 64 : K;
                    for (int64_t m = 0; m < tall; m++) {
                        const float *row = x + (t * 16 + m) * K;
                        float *to = xt + t * 16 * K + m;
                        int inside = t * 16 + m < M;
                        for (int64_t k = k0; k < stop; k++) to[k * tall] = inside ? row[k] : 0;
                    }
                }
        }
        float *plain = tiles > 1 && P->format != F32 ? scratch(2, K * LANES) : NULL;
        if (tiles > 1 && P->format != F32 && !plain) failed = 1;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; g++) {
            if (failed) continue;
            int64_t panel = g * group, some = panels - panel < group ? panels - panel : group;
            const char *weight = (const char *)P->weight + panel * step;
            const float *scale = P->scale ? P->scale + panel * steps : NULL;
            int format = P->format;
            if (plain) { /* many rows: unpack the panel once */
                for (int64_t k = 0; k < K; k++)
                    ((vec *)plain)[k] = load(weight, format, k, scale_at(scale, format, k / BLOCK));
                weight = (const char *)plain, format = F32;
            }
            for (int64_t t = 0; t < tiles; t++) {
                int64_t rows = M - t * 16 < 16 ? M - t * 16 : 16;
                multiply_tile(xt + t * 16 * K, t == tiles - 1 ? last : 16, some, format, weight,
                              scale, K, rows, panel * LANES, N, P->bias, y + t * 16 * N);
            }
        }
        if (products) add_adapters(P, A, x, y, products);
    }
    return failed;
}

/* e^x for x <= 0, to 2 units in the last place (Cephes' expf); NaN stays NaN. */
INLINE vec exp_negative(vec x) {
    const vec low = (vec){0} - 87.0f;
    ints below = x < low;
    x = (vec)(((ints)low & below) | ((ints)x & ~below));
    ints n = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, ints);
    vec f = __builtin_convertvector(n, vec);
    vec r = x - f * 0.693359375f + f * 2.12194440e-4f;
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (vec)((n + 127) << 23);
}

/* out [n, E, V]: one query a sequence over its keys and values in the arena [T, H, D], [T, H, V].
 * Sequence i sees tokens first[i] to first[i] + length[i] - 1. Returns 0, or 1 without memory. */
int attend(const float *query, const float *keys, const float *values, const int64_t *first,
           const int64_t *length, int64_t n, int64_t E, int64_t H, int64_t D, int64_t V,
           float scale, float softcap, float *out, int threads) {
    const int64_t G = E / H;
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < H; h++) {
            const int64_t L = length[i];
            float *scores = scratch(2, G * L);
            if (!scores) {
                failed = 1;
                continue;
            }
            const float *q = query + (i * E + h * G) * D;
            for (int64_t l = 0; l < L; l++) {
                const float *key = keys + ((first[i] + l) * H + h) * D;
                for (int64_t g = 0; g < G; g++) scores[g * L + l] = dot(q + g * D, key, D) * scale;
            }
            for (int64_t g = 0; g < G; g++) {
                float *s = scores + g * L, top = -INFINITY, sum = 0;
                if (softcap > 0)
                    for (int64_t l = 0; l < L; l++) s[l] = tanhf(s[l] / softcap) * softcap;
                for (int64_t l = 0; l < L; l++) top = s[l] > top || s[l] != s[l] ? s[l] : top;
                int64_t l = 0;
                for (; l + LANES <= L; l += LANES)
                    *(vec *)(s + l) = exp_negative(*(const vec *)(s + l) - top);
                for (; l < L; l++) s[l] = expf(s[l] - top);
                for (l = 0; l < L; l++) sum += s[l];
                for (int64_t l = 0; l < L; l++) s[l] /= sum;
                memset(out + (i * E + h * G + g) * V, 0, V * sizeof(float));
            }
            for (int64_t l = 0; l < L; l++) {
                const float *value = values + ((first[i] + l) * H + h) * V;
                for (int64_t g = 0; g < G; g++)
                    axpy(scores[g * L + l], value, out + (i * E + h * G + g) * V, V);
            }
        }
    return failed;
}

/* y [M, K] = x / sqrt(mean(x^2) + eps) * (weight + offset) */
void rms_norm(const float *x, const float *weight, float offset, float eps, int64_t M, int64_t K,
              float *y) {
    for (int64_t m = 0; m < M; m++, x += K, y += K) {
        float factor = 1 / sqrtf(dot(x, x, K) / K + eps);
        for (int64_t k = 0; k < K; k++) y[k] = x[k] * factor * (weight[k] + offset);
    }
}
