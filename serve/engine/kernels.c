/* What a decode step on a CPU spends its time in: products of few rows with packed weights, the
 * adapters of every row, attention of one query a sequence, and RMS norms. All sums are float32.
 *
 * Weights lie in panels of 16 output columns, [panels][K][16], so that one vector holds 16 columns
 * of one input. A panel's numbers are float32, bfloat16, or 8-bit integers with a float32 scale and
 * offset for each column and 32 inputs ([panels][K/32][2][16]); they become float32 on the way to
 * the registers.
 *
 * GCC's and Clang's vector extensions keep this free of any one instruction set. The threads are
 * ours: OpenMP's stop spinning between two products as soon as two Python threads have used it.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define BLOCK 32 /* inputs that share a scale */
#define FEW 16   /* rows that one tile takes; more go in tiles of TALL by WIDE panels */
#define TALL 8
#define WIDE 3
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

/* ---- threads ---- */

#define MOST_THREADS 256
#define SMALL 100000 /* multiplications that are done before another thread is told of them */
#define SPINS 60000 /* about a millisecond: the next product of a step comes sooner */

typedef void (*Task)(void *work, int part, int parts);

static struct {
    pthread_mutex_t turn; /* held by the caller whose job runs */
    pthread_mutex_t bed;
    pthread_cond_t wake;
    atomic_ulong job;   /* how many jobs began */
    atomic_int pending; /* workers that have not acknowledged the last one */
    atomic_int arrived; /* parts that wait in `meet` */
    atomic_ulong met;   /* how often all did */
    int sleepers, workers, parts;
    pid_t process;
    Task task;
    void *work;
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER,
          .bed = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

INLINE void relax(unsigned spins) {
    if (spins % 4096 == 4095) sched_yield(); /* who is awaited may want this very core */
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

typedef struct {
    int part;
    unsigned long seen; /* jobs that began before */
} Birth;

static void *worker(void *birth) {
    const int part = ((Birth *)birth)->part;
    unsigned long seen = ((Birth *)birth)->seen;
    free(birth);
    for (;;) {
        unsigned spins = 0;
        while (atomic_load_explicit(&pool.job, memory_order_acquire) == seen) {
            if (++spins < SPINS) {
                relax(spins);
                continue;
            }
            pthread_mutex_lock(&pool.bed);
            pool.sleepers++;
            while (atomic_load(&pool.job) == seen) pthread_cond_wait(&pool.wake, &pool.bed);
            pool.sleepers--;
            pthread_mutex_unlock(&pool.bed);
        }
        seen++;
        if (part < pool.parts) pool.task(pool.work, part, pool.parts);
        atomic_fetch_sub_explicit(&pool.pending, 1, memory_order_release);
    }
    return NULL;
}

/* Run a task in so many parts at once, or in one where the threads are another caller's. */
static void share(Task task, void *work, int threads) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads < 2 || pthread_mutex_trylock(&pool.turn)) {
        task(work, 0, 1);
        return;
    }
    if (pool.process != getpid()) pool.process = getpid(), pool.workers = 0; /* after a fork */
    while (pool.workers < threads - 1) {
        pthread_t thread;
        Birth *birth = malloc(sizeof *birth);
        if (!birth) break;
        *birth = (Birth){pool.workers + 1, atomic_load(&pool.job)};
        if (pthread_create(&thread, NULL, worker, birth)) {
            free(birth);
            break; /* with those that there are */
        }
        pthread_detach(thread);
        pool.workers++;
    }
    if (threads > pool.workers + 1) threads = pool.workers + 1;
    pool.task = task, pool.work = work, pool.parts = threads;
    atomic_store(&pool.pending, pool.workers);
    atomic_fetch_add_explicit(&pool.job, 1, memory_order_release);
    pthread_mutex_lock(&pool.bed);
    if (pool.sleepers) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.bed);
    task(work, 0, threads);
    for (unsigned spins = 0; atomic_load_explicit(&pool.pending, memory_order_acquire); spins++)
        relax(spins);
    pthread_mutex_unlock(&pool.turn);
}

/* Wait, within a task, until all its parts are here. */
static void meet(int parts) {
    if (parts == 1) return;
    unsigned long before = atomic_load(&pool.met);
    if (atomic_fetch_add(&pool.arrived, 1) == parts - 1) {
        atomic_store(&pool.arrived, 0);
        atomic_fetch_add_explicit(&pool.met, 1, memory_order_release);
    } else {
        for (unsigned spins = 0; atomic_load_explicit(&pool.met, memory_order_acquire) == before; spins++)
            relax(spins);
    }
}

/* Hand out [0, total) in pieces, so that a part that is held up is not waited for by all. */
INLINE int take(atomic_long *next, int64_t piece, int64_t total, int64_t *from, int64_t *to) {
    *from = atomic_fetch_add_explicit(next, piece, memory_order_relaxed);
    *to = *from + piece < total ? *from + piece : total;
    return *from < total;
}

INLINE int64_t piece_of(int64_t total, int parts) {
    int64_t piece = total / (parts * 8);
    return piece ? piece : 1;
}

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
#ifdef __AVX512F__ /* GCC makes scalar code of the portable form */
    ints wide = (ints)_mm512_cvtepi8_epi32(*(const __m128i_u *)(weight + index * LANES));
#else
    ints wide = __builtin_convertvector(((const bytes *)weight)[index], ints);
#endif
    vec whole = __builtin_convertvector(wide, vec);
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

#define RUN(HEIGHT, PANELS)                                                                       \
    do {                                                                                          \
        vec acc[HEIGHT * PANELS];                                                                 \
        if (format == F32) tile(xt, HEIGHT, PANELS, F32, weight, scale, K, acc);                  \
        else if (format == BF16) tile(xt, HEIGHT, PANELS, BF16, weight, scale, K, acc);           \
        else tile(xt, HEIGHT, PANELS, Q8, weight, scale, K, acc);                                 \
        store(acc, HEIGHT, PANELS, rows, column, N, bias, y);                                     \
    } while (0)

/* Panels that one call of `multiply_tile` takes at a height: always 8 to 16 sums in registers. */
INLINE int together(int tall) { return tall == 1 ? 8 : tall == 4 ? 4 : tall == 8 ? 2 : 1; }

static void multiply_tile(const float *xt, int tall, int panels, int format, const char *weight,
                          const float *scale, int64_t K, int64_t rows, int64_t column, int64_t N,
                          const float *bias, float *y) {
    if (tall == TALL && panels == WIDE) RUN(TALL, WIDE);
    else if (tall == 1 && panels == 8) RUN(1, 8);
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

INLINE float sum_of(vec v) {
    typedef float half __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    union { vec whole; half part[2]; } a = {.whole = v};
    union { half whole; quarter part[2]; } b = {.whole = a.part[0] + a.part[1]};
    quarter c = b.part[0] + b.part[1];
    return (c[0] + c[1]) + (c[2] + c[3]);
}

INLINE float dot(const float *x, const float *w, int64_t K) {
    vec s0 = {0}, s1 = {0};
    int64_t k = 0;
    for (; k + 2 * LANES <= K; k += 2 * LANES) {
        s0 += *(const vec *)(x + k) * *(const vec *)(w + k);
        s1 += *(const vec *)(x + k + LANES) * *(const vec *)(w + k + LANES);
    }
    s0 += s1;
    float sum = sum_of(s0);
    for (; k < K; k++) sum += x[k] * w[k];
    return sum;
}

INLINE void axpy(float a, const float *x, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) *(vec *)(y + i) += a * *(const vec *)(x + i);
    for (; i < n; i++) y[i] += a * x[i];
}

typedef struct {
    const Product *P;
    const Adapters *A; /* NULL where no token has one */
    const float *x;
    int64_t M;
    float *y, *xt, *products;
    int few, tall, group, unpacks;
    int64_t tiles, panels, groups;
    atomic_long next[4];
    atomic_int failed;
} Multiplication;

/* x as [tiles][K][tall], zeros below the last row, so that a tile reads one line an input. */
static void transpose_rows(Multiplication *w, int parts) {
    const int64_t K = w->P->K, tall = w->tall, strips = (K + 63) / 64, total = w->tiles * strips;
    int64_t from, to;
    while (take(&w->next[0], piece_of(total, parts), total, &from, &to))
        for (int64_t i = from; i < to; i++) {
            int64_t t = i / strips, k0 = i % strips * 64, stop = k0 + 64 < K ? k0 + 64 : K;
            for (int64_t m = 0; m < tall; m++) {
                const float *row = w->x + (t * tall + m) * K;
                float *column = w->xt + t * tall * K + m;
                int inside = t * tall + m < w->M;
                for (int64_t k = k0; k < stop; k++) column[k * tall] = inside ? row[k] : 0;
            }
        }
}

static void multiply_group(Multiplication *w, int64_t g, float *plain) {
    const Product *P = w->P;
    const int64_t K = P->K, panel = g * w->group, left = w->panels - panel;
    const int some = left < w->group ? (int)left : w->group;
    const char *weight = (const char *)P->weight + panel * K * width(P->format);
    const float *scale = P->scale ? P->scale + panel * blocks_of(K) * 2 * LANES : NULL;
    int format = P->format;
    if (plain) { /* unpacked once for all tiles */
        for (int64_t p = 0; p < some; p++)
            for (int64_t k = 0; k < K; k++) {
                Scale at = scale_at(scale, format, p * blocks_of(K) + k / BLOCK);
                ((vec *)plain)[p * K + k] = load(weight, format, p * K + k, at);
            }
        weight = (const char *)plain, format = F32;
    }
    for (int64_t t = 0; t < w->tiles; t++) {
        int64_t rows = w->M - t * w->tall < w->tall ? w->M - t * w->tall : w->tall;
        multiply_tile(w->xt + t * w->tall * K, w->tall, some, format, weight, scale, K, rows,
                      panel * LANES, P->N, P->bias, w->y + t * w->tall * P->N);
    }
}

/* products[token][sibling][row of the token's adapter] = A x */
static void multiply_a(Multiplication *w, int parts) {
    const Product *P = w->P;
    const Adapters *A = w->A;
    const int64_t S = P->siblings, total = A->num_tokens * S;
    int64_t from, to;
    while (take(&w->next[2], piece_of(total, parts), total, &from, &to))
        for (int64_t i = from; i < to; i++) {
            const int64_t n = i / S, s = i % S;
            for (int32_t j = 0; j < A->count[n]; j++) {
                int64_t row = A->rows[A->first[n] + j];
                w->products[i * A->most + j] =
                    dot(w->x + n * P->K, P->a + (row * S + s) * P->K, P->K);
            }
        }
}

/* y += B' products */
static void add_b(Multiplication *w, int parts) {
    const Product *P = w->P;
    const Adapters *A = w->A;
    const int64_t S = P->siblings, total = A->num_tokens * S;
    int64_t from, to;
    while (take(&w->next[3], piece_of(total, parts), total, &from, &to))
        for (int64_t i = from; i < to; i++) {
            const int64_t n = i / S, s = i % S;
            float *y = w->y + n * P->N;
            for (int64_t t = 0; t < s; t++) y += P->size[t];
            for (int32_t j = 0; j < A->count[n]; j++) {
                int64_t row = A->rows[A->first[n] + j];
                axpy(w->products[i * A->most + j], P->b[s] + row * P->size[s], y, P->size[s]);
            }
        }
}

static void multiply_part(void *work, int part, int parts) {
    Multiplication *w = work;
    (void)part;
    if (w->M > 1) {
        transpose_rows(w, parts);
        if (w->A) multiply_a(w, parts);
        meet(parts);
    } else if (w->A) {
        multiply_a(w, parts);
    }
    float *plain = w->unpacks ? scratch(2, WIDE * w->P->K * LANES) : NULL;
    if (w->unpacks && !plain) atomic_store(&w->failed, 1);
    int64_t from, to;
    while (take(&w->next[1], piece_of(w->groups, parts), w->groups, &from, &to))
        for (int64_t g = from; g < to && !(w->unpacks && !plain); g++) multiply_group(w, g, plain);
    if (w->A) {
        meet(parts);
        add_b(w, parts);
    }
}

/* y [M, N] = x [M, K] * weight' + bias + adapters. Returns 0, or 1 where memory ran out. */
int multiply(const Product *P, const Adapters *A, const float *x, int64_t M, float *y, int threads) {
    Multiplication w = {.P = P, .x = x, .M = M, .y = y};
    w.few = M <= FEW;
    w.tall = !w.few ? TALL : M == 1 ? 1 : M <= 4 ? 4 : M <= 8 ? 8 : 16;
    w.group = w.few ? together(w.tall) : WIDE;
    w.panels = (P->N + LANES - 1) / LANES;
    w.groups = (w.panels + w.group - 1) / w.group;
    w.tiles = (M + w.tall - 1) / w.tall;
    w.unpacks = !w.few && P->format != F32;
    w.A = A && P->siblings && A->most ? A : NULL;
    w.xt = M == 1 ? (float *)x : scratch(0, w.tiles * w.tall * P->K);
    w.products = w.A ? scratch(1, A->num_tokens * P->siblings * A->most) : NULL;
    if (!w.xt || (w.A && !w.products)) return 1;
    share(multiply_part, &w, threads);
    return atomic_load(&w.failed);
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

typedef struct {
    const float *query, *keys, *values;
    const int64_t *first, *length;
    int64_t n, E, H, D, V;
    float scale, softcap, *out;
    atomic_long next;
    atomic_int failed;
} Attention;

static void softmax(float *s, int64_t L, float softcap) {
    float top = -INFINITY, sum = 0;
    int64_t l = 0;
    if (softcap > 0)
        for (; l < L; l++) s[l] = tanhf(s[l] / softcap) * softcap;
    for (l = 0; l < L; l++) top = s[l] > top || s[l] != s[l] ? s[l] : top;
    for (l = 0; l + LANES <= L; l += LANES)
        *(vec *)(s + l) = exp_negative(*(const vec *)(s + l) - top);
    for (; l < L; l++) s[l] = expf(s[l] - top);
    for (l = 0; l < L; l++) sum += s[l];
    for (l = 0; l < L; l++) s[l] /= sum;
}

/* The queries of key heads h to h + heads of sequence i; keys are read in the order they lie in. */
static void attend_heads(const Attention *w, int64_t i, int64_t h, int64_t heads, float *scores) {
    const int64_t G = w->E / w->H, L = w->length[i], D = w->D, V = w->V, queries = heads * G;
    const float *q = w->query + (i * w->E + h * G) * D;
    const float *keys = w->keys + (w->first[i] * w->H + h) * D;
    const float *values = w->values + (w->first[i] * w->H + h) * V;
    float *out = w->out + (i * w->E + h * G) * V;
    for (int64_t l = 0; l < L; l++)
        for (int64_t e = 0; e < queries; e++)
            scores[e * L + l] = dot(q + e * D, keys + (l * w->H + e / G) * D, D) * w->scale;
    for (int64_t e = 0; e < queries; e++) softmax(scores + e * L, L, w->softcap);
    memset(out, 0, queries * V * sizeof(float));
    for (int64_t l = 0; l < L; l++)
        for (int64_t e = 0; e < queries; e++)
            axpy(scores[e * L + l], values + (l * w->H + e / G) * V, out + e * V, V);
}

static void attend_part(void *work, int part, int parts) {
    Attention *w = work;
    (void)part;
    const int64_t heads = w->n >= 4 * parts ? w->H : 1, each = w->H / heads;
    int64_t from, to;
    while (take(&w->next, 1, w->n * each, &from, &to)) {
        float *scores = scratch(2, w->E / w->H * heads * w->length[from / each]);
        if (scores) attend_heads(w, from / each, from % each * heads, heads, scores);
        else atomic_store(&w->failed, 1);
    }
}

/* out [n, E, V]: one query a sequence over its keys and values in the arena [T, H, D], [T, H, V].
 * Sequence i sees tokens first[i] to first[i] + length[i] - 1. Returns 0, or 1 without memory. */
int attend(const float *query, const float *keys, const float *values, const int64_t *first,
           const int64_t *length, int64_t n, int64_t E, int64_t H, int64_t D, int64_t V,
           float scale, float softcap, float *out, int threads) {
    Attention w = {.query = query, .keys = keys, .values = values, .first = first, .length = length,
                   .n = n, .E = E, .H = H, .D = D, .V = V, .scale = scale, .softcap = softcap,
                   .out = out};
    int64_t keys_seen = 0;
    for (int64_t i = 0; i < n; i++) keys_seen += length[i];
    share(attend_part, &w, keys_seen * E * D < SMALL ? 1 : threads);
    return atomic_load(&w.failed);
}

/* Turn the first `heads` heads of every row [N, stride] by its angles, given as the cosines and
 * sines [N, D] of both halves: (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin). */
void rotate(float *x, int64_t N, int64_t stride, int64_t heads, int64_t D, const float *cosine,
            const float *sine) {
    const int64_t half = D / 2;
    for (int64_t n = 0; n < N; n++, x += stride, cosine += D, sine += D)
        for (int64_t h = 0; h < heads; h++) {
            float *a = x + h * D, *b = a + half;
            for (int64_t i = 0; i < half; i++) {
                float low = a[i], high = b[i];
                a[i] = low * cosine[i] - high * sine[i];
                b[i] = high * cosine[half + i] + low * sine[half + i];
            }
        }
}

typedef struct {
    const float *gate_up;
    int64_t M, I;
    float *y;
    atomic_long next;
} Gating;

INLINE vec silu(vec g) {
    const ints sign = g < 0;
    vec t = exp_negative((vec)((ints)g | (ints)((words){0} + 0x80000000u))); /* e^-|g| */
    vec top = (vec)(((ints)t & sign) | ((ints)((vec){0} + 1.0f) & ~sign));
    return g * top / (t + 1.0f);
}

static void gate_part(void *work, int part, int parts) {
    Gating *w = work;
    (void)part;
    int64_t from, to;
    while (take(&w->next, piece_of(w->M, parts), w->M, &from, &to))
        for (int64_t m = from; m < to; m++) {
            const float *g = w->gate_up + m * 2 * w->I, *u = g + w->I;
            float *y = w->y + m * w->I;
            int64_t i = 0;
            for (; i + LANES <= w->I; i += LANES)
                *(vec *)(y + i) = silu(*(const vec *)(g + i)) * *(const vec *)(u + i);
            for (; i < w->I; i++) y[i] = g[i] / (1 + expf(-g[i])) * u[i];
        }
}

/* y [M, I] = silu(gate) * up, which lie side by side in [M, 2 I] */
void gate(const float *gate_up, int64_t M, int64_t I, float *y, int threads) {
    Gating w = {.gate_up = gate_up, .M = M, .I = I, .y = y};
    share(gate_part, &w, M * I < SMALL ? 1 : threads);
}

/* y [M, K] = x / sqrt(mean(x^2) + eps) * (weight + offset) */
void rms_norm(const float *x, const float *weight, float offset, float eps, int64_t M, int64_t K,
              float *y) {
    for (int64_t m = 0; m < M; m++, x += K, y += K) {
        float factor = 1 / sqrtf(dot(x, x, K) / K + eps);
        for (int64_t k = 0; k < K; k++) y[k] = x[k] * factor * (weight[k] + offset);
    }
}
