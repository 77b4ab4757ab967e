/* Vectors, threads and scratch memory of the kernels.
 *
 * GCC's and Clang's vector extensions keep this free of any one instruction set. The threads are
 * ours: OpenMP's stop spinning between two products as soon as two Python threads have used it.
 */
#pragma once
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
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));
typedef int8_t bytes __attribute__((vector_size(16), aligned(1)));

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
    if (pool.process != getpid()) { /* the first time, or after a fork: no thread is here */
        pool.process = getpid(), pool.workers = pool.sleepers = 0;
        atomic_store(&pool.arrived, 0), atomic_store(&pool.pending, 0);
        pthread_mutex_init(&pool.bed, NULL), pthread_cond_init(&pool.wake, NULL);
    }
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

/* Scratch memory of a thread, grown on demand and kept until the thread ends. */
typedef struct {
    float *memory[4];
    size_t floats[4];
} Scratch;

static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static pthread_key_t scratch_key;

static void free_scratch(void *own) {
    for (int i = 0; i < 4; i++) free(((Scratch *)own)->memory[i]);
    free(own);
}
static void make_scratch_key(void) { pthread_key_create(&scratch_key, free_scratch); }

static float *scratch(int which, size_t floats) {
    static __thread Scratch *own;
    if (!own) {
        pthread_once(&scratch_once, make_scratch_key);
        if (!(own = calloc(1, sizeof *own))) return NULL;
        pthread_setspecific(scratch_key, own);
    }
    if (own->floats[which] < floats) {
        free(own->memory[which]);
        own->memory[which] = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        own->floats[which] = own->memory[which] ? floats : 0;
    }
    return own->memory[which];
}

/* Lanes of two vectors for `__builtin_shufflevector`: every other one, two, four or eight. */
#define ONES 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define OTHER_ONES 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define TWOS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define OTHER_TWOS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define FOURS 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define OTHER_FOURS 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define EIGHTS 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define OTHER_EIGHTS 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31

#define SWAP(I, J, LOW, HIGH)                                                                     \
    do {                                                                                          \
        const vec low = __builtin_shufflevector(r[I], r[J], LOW);                                 \
        r[J] = __builtin_shufflevector(r[I], r[J], HIGH), r[I] = low;                             \
    } while (0)

INLINE void transpose(vec r[16]) {
    for (int i = 0; i < 8; i++) SWAP(i, i + 8, EIGHTS, OTHER_EIGHTS);
    for (int i = 0; i < 8; i++) SWAP(i + i / 4 * 4, i + i / 4 * 4 + 4, FOURS, OTHER_FOURS);
    for (int i = 0; i < 8; i++) SWAP(i + i / 2 * 2, i + i / 2 * 2 + 2, TWOS, OTHER_TWOS);
    for (int i = 0; i < 8; i++) SWAP(2 * i, 2 * i + 1, ONES, OTHER_ONES);
}

/* ---- sums ---- */

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

INLINE vec from_bfloat16(const uint16_t *place) {
#ifdef __AVX512F__ /* GCC takes five instructions for the portable form */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(*(const __m256i_u *)place), 16);
#else
    return (vec)(__builtin_convertvector(*(const halves *)place, words) << 16);
#endif
}

/* To bfloat16, to nearest even. */
INLINE uint16_t narrowed(float value) {
    const union { float value; uint32_t bits; } u = {.value = value};
    return value == value ? (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16 : 0x7fc0;
}

INLINE float one_from_bfloat16(uint16_t number) {
    union { uint32_t bits; float value; } u = {.bits = (uint32_t)number << 16};
    return u.value;
}

/* A dot product with bfloat16 on one side. */
INLINE float dot_narrow(const float *x, const uint16_t *w, int64_t K) {
    vec s0 = {0}, s1 = {0};
    int64_t k = 0;
    for (; k + 2 * LANES <= K; k += 2 * LANES) {
        s0 += *(const vec *)(x + k) * from_bfloat16(w + k);
        s1 += *(const vec *)(x + k + LANES) * from_bfloat16(w + k + LANES);
    }
    float sum = sum_of(s0 + s1);
    for (; k < K; k++) sum += x[k] * one_from_bfloat16(w[k]);
    return sum;
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
