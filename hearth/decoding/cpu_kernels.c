/* Decoding on a CPU: matrices stored in 32 to 4 bits times a few rows, and a whole block for a token of each row.

   A token needs every weight once, so its speed is that of the memory; these products come close to it.
   Plain C: the compiler makes vector code for the processor at hand. Compiled and called by cpu_kernels.py.

   w (n, d) is stored in float32, in bfloat16, in int8 with a scale a row, or in int4 with a scale a group of 32
   columns; all activations are float32. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define AHEAD 1024    /* entries of a row that are fetched from memory ahead of the arithmetic */
#define TILE_ROWS 12  /* rows of w that a core takes at a time */
#define SHARED 262144 /* multiplications from which the work is shared between the processor's cores */
#define KEYS 64       /* keys scored at a time */
#define TRIO 3        /* query heads that share a stay of keys and values in registers */
#define SHARE 256     /* columns of a share of attention */
#define BLOCK 128     /* columns of INT4 stored in 32 words of 16 bits */
#define GROUP 32      /* columns of INT4 that share a scale */
#define LOWEST -1e30f /* less than any score; no infinity, so that the compiler may assume there is none */

/* The bits of the g-th column in a word of INT4, where they stand, but those of the last shifted down: all are positive
   16-bit numbers. And what counts as zero there. */
#define BITS(word, g) ((word) >> ((g) < 3 ? 0 : 12) & (uint16_t)((g) < 3 ? 15 << 4 * (g) : 65535))
#define ZERO(g) ((g) < 3 ? 8 << 4 * (g) : 8)

enum store { FLOAT32, BFLOAT16, INT8, INT4 };

/* Of INT4, a row is a whole number of blocks of 128 columns, 32 words each: word i holds columns i, i + 32, i + 64 and
   i + 96, four bits each from the lowest on. An entry is its bits, as BITS gives them, less ZERO, times its group's scale. */
typedef struct {
  const void *w;
  const void *scale; /* of INT8, float32 (n); of INT4, bfloat16 (n, groups) */
  int64_t store, n, d;
} matrix;

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(32), aligned(2), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif

static inline float from_bf16(uint16_t w) {
  uint32_t bits = (uint32_t)w << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* The nearest number, of two the even one. */
static inline uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Eight entries of w: neighbours from `at` + 8 * `half` on if stored in float32; if in bfloat16, every second of the
   sixteen from `at` on, so that a shift or a mask unpacks them. */
static inline vec load(const void *w, int64_t at, int half, int store) {
  if (store == FLOAT32) return *(const vec *)((const float *)w + at + 8 * half);
  words pairs = *(const words *)((const uint16_t *)w + at);
  return half ? (vec)(pairs & 0xffff0000) : (vec)(pairs << 16);
}

/* Has the 32 entries of w from `at` on brought from memory. */
static inline void fetch(const void *w, int64_t at, int store) {
  const char *from = (const char *)w + at * (store == FLOAT32 ? 4 : 2);
  __builtin_prefetch(from);
  if (store == FLOAT32) __builtin_prefetch(from + 64);
}

/* Where entry e stands in the order in which `load` gives them. */
static inline int64_t place(int64_t e, int64_t store) {
  return store == BFLOAT16 ? e / 16 * 16 + e % 2 * 8 + e % 16 / 2 : e;
}

/* n rows of d entries of w, one behind the other from entry `at` on, as float32 rows of `stride`. */
static inline void unpack(float *restrict to, int64_t stride, const void *w, int64_t store, int64_t at, int64_t n,
                          int64_t d) {
  for (int64_t r = 0; r < n; r++, to += stride, at += d) {
    if (store == INT8) {
      const int8_t *from = (const int8_t *)w + at;
      for (int64_t k = 0; k < d; k++) to[k] = from[k];
    } else if (store == BFLOAT16) {
      const uint16_t *from = (const uint16_t *)w + at;
      for (int64_t k = 0; k < d; k++) to[k] = from_bf16(from[k]);
    } else
      memcpy(to, (const float *)w + at, sizeof(float) * d);
  }
}

#ifdef __AVX512F__
#define LANES 16
#define TILE_X 8    /* rows of x multiplied at a time */
#define ROWS_BY_4 6 /* rows of w with 4 of them */
#else
#define LANES 8
#define TILE_X 4
#define ROWS_BY_4 3
#endif

typedef float wide __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t wide_words __attribute__((vector_size(4 * LANES)));
typedef int32_t wide_ints __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t wide_halves __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* Spelled out, so that every caller adds in the same order. */
static inline float sum_of(wide v) {
  vec half[LANES / 8];
  memcpy(half, &v, sizeof(v));
  vec eight = half[0];
  for (int i = 1; i < LANES / 8; i++) eight += half[i];
  eight += SHUFFLE(eight, eight, 4, 5, 6, 7, 0, 1, 2, 3);
  eight += SHUFFLE(eight, eight, 2, 3, 0, 1, 6, 7, 4, 5);
  return eight[0] + eight[1];
}

/* Columns of INT4 in a row of w, the padding among them. */
static inline int64_t padded(int64_t d) { return (d + BLOCK - 1) / BLOCK * BLOCK; }

/* `n` rows of w in INT4, from row `first` on, as float32 rows (n, d). */
static void unpack_int4(float *restrict to, const matrix *m, int64_t first, int64_t n) {
  int64_t d = m->d, groups = padded(d) / GROUP;
  for (int64_t r = first; r < first + n; r++, to += d) {
    const uint16_t *w = (const uint16_t *)m->w + r * padded(d) / 4;
    for (int64_t g = 0; g * GROUP < d; g++) {
      float by = from_bf16(((const uint16_t *)m->scale)[r * groups + g]);
      const uint16_t *from = w + g * GROUP / BLOCK * GROUP;
      int64_t here = d - g * GROUP < GROUP ? d - g * GROUP : GROUP, place = g % (BLOCK / GROUP);
      for (int64_t k = 0; k < here; k++) to[g * GROUP + k] = (float)(BITS(from[k], place) - ZERO(place)) * by;
    }
  }
}

/* The whole of w (n, d) in INT4 as float32. */
void unpack_matrix(float *restrict to, const matrix *m) {
#pragma omp parallel for schedule(static) if (m->n * m->d >= SHARED)
  for (int64_t r = 0; r < m->n; r++) unpack_int4(to + r * m->d, m, r, 1);
}

/* -------------------------------------------------------------------------------------------- one row */

static float bfloat16_times(const uint16_t *restrict w, const float *restrict x, int64_t d) {
  float sum[32] = {0}, total = 0;
  int64_t i = 0;
  for (; i + 32 <= d; i += 32) {
    __builtin_prefetch(w + i + AHEAD);
    for (int k = 0; k < 32; k++) sum[k] += from_bf16(w[i + k]) * x[i + k];
  }
  for (; i < d; i++) total += from_bf16(w[i]) * x[i];
  for (int k = 0; k < 32; k++) total += sum[k];
  return total;
}

static int32_t int8_times(const int8_t *restrict w, const int16_t *restrict x, int64_t d) {
  int32_t total = 0;
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) {
    int32_t sum = 0;
    __builtin_prefetch(w + i + AHEAD);
    for (int k = 0; k < 64; k++) sum += (int16_t)w[i + k] * x[i + k];
    total += sum;
  }
  for (; i < d; i++) total += (int16_t)w[i] * x[i];
  return total;
}

/* x as 16-bit whole numbers times the unit returned: so small that no sum of `int8_times` overflows, and still far
   finer than the weights' 8 bits. */
static float round_row(int16_t *restrict to, const float *restrict x, int64_t d) {
  float largest = 0, limit = floorf(2147483647.0f / (128 * d));
  if (limit > 32767) limit = 32767;
  for (int64_t i = 0; i < d; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
  float unit = largest > 0 ? largest / limit : 1;
  for (int64_t i = 0; i < d; i++) to[i] = (int16_t)(x[i] / unit + (x[i] < 0 ? -0.5f : 0.5f));
  return unit;
}

/* Products of 16-bit numbers, two neighbours in each place, added up. */
static inline wide_ints add_pairs(wide_ints a, wide_ints b) {
#if defined(__AVX512BW__)
  return (wide_ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && LANES == 8
  return (wide_ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* A row w of INT4 with its scales, times x (d), d a whole number of blocks. */
static float int4_times(const uint16_t *restrict w, const float *restrict scale, const int16_t *restrict x, int64_t d) {
  wide total[BLOCK / GROUP] = {0};
  for (; d > 0; d -= BLOCK, w += GROUP, x += BLOCK, scale += BLOCK / GROUP) {
    __builtin_prefetch((const char *)w + AHEAD);
    for (int i = 0; i < GROUP; i += 2 * LANES) {
      wide_halves bits = *(const wide_halves *)(w + i);
      for (int g = 0; g < BLOCK / GROUP; g++) {
        wide_ints sums = add_pairs((wide_ints)BITS(bits, g), *(const wide_ints *)(x + g * GROUP + i));
        total[g] += __builtin_convertvector(sums, wide) * scale[g];
      }
    }
  }
  return sum_of(total[0] + total[1] + (total[2] + total[3]));
}

/* `times_row` of INT4. What ZERO takes off needs the sums of x's groups alone. */
static void int4_times_row(float *restrict y, const matrix *m, const float *restrict x, const float *add) {
  int64_t d = padded(m->d), groups = d / GROUP;
  int16_t *rounded = calloc(d, sizeof(int16_t));
  float unit = round_row(rounded, x, m->d), *sums = calloc(groups, sizeof(float));
  for (int64_t i = 0; i < d; i++) sums[i / GROUP] += rounded[i] * ZERO(i / GROUP % (BLOCK / GROUP));
#pragma omp parallel for schedule(static) if (m->n * d >= SHARED)
  for (int64_t r = 0; r < m->n; r++) {
    float scales[groups], zeros = 0;
    for (int64_t g = 0; g < groups; g++) {
      scales[g] = from_bf16(((const uint16_t *)m->scale)[r * groups + g]);
      zeros += scales[g] * sums[g];
    }
    float product = int4_times((const uint16_t *)m->w + r * d / 4, scales, rounded, d);
    y[r] = (product - zeros) * unit + (add ? add[r] : 0);
  }
  free(rounded);
  free(sums);
}

/* y (n) = w x for x (d) and w in 16, 8 or 4 bits; `add` (n) is added unless it is NULL. */
static void times_row(float *restrict y, const matrix *m, const float *restrict x, const float *add) {
  if (m->store == INT4) {
    int4_times_row(y, m, x, add);
    return;
  }
  const float *scale = m->scale;
  int16_t *rounded = m->store == INT8 ? malloc(sizeof(int16_t) * m->d) : NULL;
  float unit = rounded ? round_row(rounded, x, m->d) : 1;
#pragma omp parallel for schedule(static) if (m->n * m->d >= SHARED)
  for (int64_t r = 0; r < m->n; r++) {
    int64_t at = r * m->d;
    float product = rounded ? int8_times((const int8_t *)m->w + at, rounded, m->d) * (scale[r] * unit)
                            : bfloat16_times((const uint16_t *)m->w + at, x, m->d);
    y[r] = add ? add[r] + product : product;
  }
  free(rounded);
}

/* ---------------------------------------------------------------------------------------- any rows

   A product is summed along the columns, a vector at a time, always in the same order: what a row of x gives depends
   on no other row, to the bit. A vector of w that was loaded serves several rows of x, and one of x several of w: as
   many as the registers hold sums of. Only a single row of x times w in 16 to 4 bits, where memory is what counts, goes
   its own way. */

/* Neighbouring entries of w from `at` on. */
static inline __attribute__((always_inline)) wide load_wide(const void *w, int64_t at, const int store) {
  if (store == FLOAT32) return *(const wide *)((const float *)w + at);
  return (wide)(__builtin_convertvector(*(const halves *)((const uint16_t *)w + at), wide_words) << 16);
}

static inline float load_one(const void *w, int64_t at, int store) {
  return store == FLOAT32 ? ((const float *)w)[at] : from_bf16(((const uint16_t *)w)[at]);
}

/* sums (R, J): `n_rows` = R rows of w (·, d), from entries `at` on, times `n_x` = J rows of x; both constants. */
static inline __attribute__((always_inline)) void dot_tile(float *sums, const void *w, const int64_t *at,
                                                           const float *const *x, int64_t d, const int store,
                                                           const int n_rows, const int n_x) {
  wide s[TILE_ROWS * TILE_X];
  int64_t c = 0;
  for (int i = 0; i < n_rows * n_x; i++) s[i] = (wide){0};
  for (; c + LANES <= d; c += LANES) {
    wide rows[TILE_ROWS];
    for (int r = 0; r < n_rows; r++) {
      __builtin_prefetch((const char *)w + (at[r] + c + n_rows * d) * (store == FLOAT32 ? 4 : 2));
      rows[r] = load_wide(w, at[r] + c, store);
    }
    for (int j = 0; j < n_x; j++) {
      wide column = *(const wide *)(x[j] + c);
      for (int r = 0; r < n_rows; r++) s[r * n_x + j] += rows[r] * column;
    }
  }
  for (int r = 0; r < n_rows; r++)
    for (int j = 0; j < n_x; j++) {
      float total = sum_of(s[r * n_x + j]);
      for (int64_t i = c; i < d; i++) total += load_one(w, at[r] + i, store) * x[j][i];
      sums[r * n_x + j] = total;
    }
}

/* y (rows, n) = x w for x (rows, d); `add` (rows, n) is added unless it is NULL. Rows of w in INT8 and
   INT4 are unpacked first, those in BFLOAT16 where short vectors meet so many rows of x that it pays. */
void times_rows(float *restrict y, const matrix *m, const float *restrict x, const float *add, int64_t rows) {
  if (rows == 1 && m->store != FLOAT32) {
    times_row(y, m, x, add);
    return;
  }
  int64_t n = m->n, d = m->d;
  int first_unpack = m->store >= INT8 || (m->store == BFLOAT16 && LANES == 8 && rows > 8);
#pragma omp parallel for schedule(static) if (n * d * rows >= SHARED)
  for (int64_t first = 0; first < n; first += TILE_ROWS) {
    int64_t n_rows = n - first < TILE_ROWS ? n - first : TILE_ROWS, at[TILE_ROWS];
    float *unpacked = first_unpack ? malloc(sizeof(float) * n_rows * d) : NULL;
    const void *w = unpacked ? unpacked : m->w;
    if (m->store == INT4) unpack_int4(unpacked, m, first, n_rows);
    else if (unpacked) unpack(unpacked, d, m->w, m->store, first * d, n_rows, d);
    /* a tile may reach past the end: it repeats a row */
    for (int r = 0; r < TILE_ROWS; r++) at[r] = ((unpacked ? 0 : first) + (r < n_rows ? r : n_rows - 1)) * d;
    for (int64_t j = 0; j < rows; j += TILE_X) {
      int64_t left = rows - j, n_x = left > 4 ? TILE_X : left > 2 ? 4 : left;
      const float *columns[TILE_X];
      float sums[TILE_ROWS * TILE_X];
      for (int i = 0; i < n_x; i++) columns[i] = x + (j + (i < left ? i : left - 1)) * d;
#define DOTS(store, n_rows, n_x) \
  for (int r = 0; r < TILE_ROWS; r += n_rows) dot_tile(sums + r * n_x, w, at + r, columns, d, store, n_rows, n_x)
#define DOTS_OF(store)                              \
  if (n_x == 1) DOTS(store, 4, 1);                  \
  else if (n_x == 2) DOTS(store, 6, 2);             \
  else if (n_x == 4) DOTS(store, ROWS_BY_4, 4);     \
  else DOTS(store, 3, TILE_X)
      if (m->store == BFLOAT16 && !unpacked) {
        DOTS_OF(BFLOAT16);
      } else {
        DOTS_OF(FLOAT32);
      }
      for (int64_t i = 0; i < n_x && i < left; i++)
        for (int64_t r = 0; r < n_rows; r++) {
          int64_t out = (j + i) * n + first + r;
          float scale = m->store == INT8 ? ((const float *)m->scale)[first + r] : 1;
          y[out] = sums[r * n_x + i] * scale + (add ? add[out] : 0);
        }
    }
    free(unpacked);
  }
}

/* ---------------------------------------------------------------- a block of model.py, a token of each row */

/* d float32 numbers into entries of w, stored in 32 or 16 bits, from entry `at` on. */
static void pack(void *w, int64_t store, int64_t at, const float *from, int64_t d) {
  if (store == BFLOAT16)
    for (int64_t k = 0; k < d; k++) ((uint16_t *)w)[at + k] = to_bf16(from[k]);
  else
    memcpy((float *)w + at, from, sizeof(float) * d);
}

static void rms_norm(float *restrict to, const float *restrict x, int64_t n) {
  float squares = 0;
  for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
  float by = 1 / sqrtf(squares / n + 1e-6f);
  for (int64_t i = 0; i < n; i++) to[i] = x[i] * by;
}

/* e^x to float32 accuracy, written out so that loops over it become vector code: 2^whole times a polynomial. */
static inline float exponential(float x) {
  float t = x * 1.44269504f;
  t = t < -126 ? -126 : t > 127 ? 127 : t;
  float whole = floorf(t + 0.5f), f = (t - whole) * 0.69314718f;
  float p = 1 + f * (1 + f * (0.5f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f * (1 / 720.f))))));
  int32_t bits = ((int32_t)whole + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return p * power;
}

typedef struct {
  void *keys, *values; /* (slots, G, entries, E), each slot a ring of columns */
  int64_t store, entries;
} cache;

/* Where the tokens of the rows of x stand: row r reads and writes slot[r] of the cache, sees its columns from pad[r]
   on, and joins it as column end[r] - 1. */
typedef struct {
  const int64_t *slot, *pad, *end;
} seats;

typedef struct {
  float largest, total; /* score, and the sum of e^(score - largest) */
} weight;

/* Scores and sums of `heads` query heads (at most TRIO, a constant) over n keys and values (n, stride) in `store` (a
   constant): a key or value that was loaded serves all of them. */
static inline __attribute__((always_inline)) void attend_tile(vec *restrict y, weight *restrict sums,
                                                              const vec *restrict queries, const void *keys,
                                                              const void *values, int64_t n, int64_t stride,
                                                              const int store, const int heads) {
  float score[TRIO][KEYS + 4];
  for (int64_t j = 0; j < n; j += 4) {
    vec sum[TRIO][4];
    for (int64_t e = 0; e < stride * 4; e += 32) fetch(keys, (j + KEYS) * stride + e, store);
    for (int pair = 0; pair < 4; pair += 2) { /* as many sums at a time as there are registers for */
      vec part[TRIO][2] = {0};
      for (int64_t e = 0; e < stride; e += 16)
        for (int i = 0; i < 2; i++) { /* the last may reach past the end: it repeats a key */
          int64_t at = (j + pair + i < n ? j + pair + i : n - 1) * stride + e;
          vec one = load(keys, at, 0, store), other = load(keys, at, 1, store);
          for (int h = 0; h < heads; h++)
            part[h][i] += queries[(h * stride + e) / 8] * one + queries[(h * stride + e) / 8 + 1] * other;
        }
      for (int h = 0; h < heads; h++) sum[h][pair] = part[h][0], sum[h][pair + 1] = part[h][1];
    }
    for (int h = 0; h < heads; h++) {
      /* neighbours are added until each place of `twos` holds a half of a key's sum */
      vec a = SHUFFLE(sum[h][0], sum[h][1], 0, 8, 2, 10, 4, 12, 6, 14) +
              SHUFFLE(sum[h][0], sum[h][1], 1, 9, 3, 11, 5, 13, 7, 15);
      vec b = SHUFFLE(sum[h][2], sum[h][3], 0, 8, 2, 10, 4, 12, 6, 14) +
              SHUFFLE(sum[h][2], sum[h][3], 1, 9, 3, 11, 5, 13, 7, 15);
      float twos[8];
      *(vec *)twos = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
      for (int i = 0; i < 4; i++) score[h][j + i] = twos[i] + twos[i + 4];
    }
  }
  for (int h = 0; h < heads; h++) {
    float largest = sums[h].largest, total = 0;
    for (int64_t j = 0; j < n; j++) largest = score[h][j] > largest ? score[h][j] : largest;
    for (int64_t j = 0; j < n; j++) score[h][j] = exponential(score[h][j] - largest);
    for (int64_t j = 0; j < n; j++) total += score[h][j];
    float shrink = exponential(sums[h].largest - largest);
    for (int64_t v = 0; v < stride / 8; v++) y[h * stride / 8 + v] *= shrink;
    sums[h] = (weight){largest, sums[h].total * shrink + total};
  }
  for (int64_t e = 0; e < stride; e += 16) {
    vec sum[TRIO][2];
    for (int h = 0; h < heads; h++)
      for (int half = 0; half < 2; half++) sum[h][half] = y[(h * stride + e) / 8 + half];
    for (int64_t j = 0; j < n; j++) {
      if (e % 32 == 0) fetch(values, (j + KEYS) * stride + e, store);
      for (int half = 0; half < 2; half++) {
        vec value = load(values, j * stride + e, half, store);
        for (int h = 0; h < heads; h++) sum[h][half] += score[h][j] * value;
      }
    }
    for (int h = 0; h < heads; h++)
      for (int half = 0; half < 2; half++) y[(h * stride + e) / 8 + half] = sum[h][half];
  }
}

/* One share of the work of `attend`: `heads` query heads (heads, stride) over the keys and values (entries, E) of
   columns `from` to `to`, a ring. Gives the unfinished sums y (heads, stride) and their weights, as in arXiv
   2205.14135. `stride` is E rounded up to whole vectors; where it is more than E, keys and values are copied. */
static void attend_share(float *restrict y, weight *restrict sums, const float *restrict queries, const void *keys,
                         const void *values, int64_t store, int64_t from, int64_t to, int64_t entries, int64_t heads,
                         int64_t E, int64_t stride) {
  int64_t width = store == BFLOAT16 ? 2 : 4;
  float *copied = stride > E ? calloc(2 * KEYS * stride, sizeof(float)) : NULL;
  memset(y, 0, sizeof(float) * heads * stride);
  for (int64_t h = 0; h < heads; h++) sums[h] = (weight){LOWEST, 0};
  for (int64_t column = from, here; column < to; column += here) {
    int64_t entry = column % entries;
    here = to - column < KEYS ? to - column : KEYS;
    if (here > entries - entry) here = entries - entry; /* the ring begins anew */
    const char *key = (const char *)keys + entry * E * width, *value = (const char *)values + entry * E * width;
    if (copied) {
      unpack(copied, stride, key, store, 0, here, E);
      unpack(copied + KEYS * stride, stride, value, store, 0, here, E);
      key = (const char *)copied, value = (const char *)(copied + KEYS * stride);
    }
    for (int64_t h = 0; h < heads; h += TRIO) {
      vec *out = (vec *)(y + h * stride);
      const vec *query = (const vec *)(queries + h * stride);
      int64_t left = heads - h;
#define TILE(store, n_heads) attend_tile(out, sums + h, query, key, value, here, stride, store, n_heads)
#define TILES(store) left == 1 ? TILE(store, 1) : left == 2 ? TILE(store, 2) : TILE(store, TRIO)
      store == FLOAT32 || copied ? (TILES(FLOAT32)) : (TILES(BFLOAT16));
    }
  }
  free(copied);
}

/* y (rows, H, E): attention of q (rows, ·, E), `q_stride` floats a row, over keys and values (slots, G, entries, E),
   stored in float32 or bfloat16: row r sees the columns from pad[r] to end[r] that its ring still holds. Shares of the
   columns are worked on apart and put together at the end; how a row is cut does not depend on the others. */
static void attend(float *restrict y, const float *q, int64_t q_stride, const cache *c, const seats *at_seat,
                   int64_t rows, int64_t H, int64_t G, int64_t E) {
  int64_t entries = c->entries, heads = H / G, columns = 0, shares = 1;
  for (int64_t r = 0; r < rows; r++) {
    int64_t held = at_seat->end[r] < entries ? at_seat->end[r] : entries;
    columns += held;
    if ((held + SHARE - 1) / SHARE > shares) shares = (held + SHARE - 1) / SHARE;
  }
  int64_t stride = (E + 31) / 32 * 32, width = c->store == BFLOAT16 ? 2 : 4;
  int64_t order = stride > E ? FLOAT32 : c->store; /* of a head's channels */
  float *queries = calloc(rows * H * stride, sizeof(float));
  float *part = malloc(sizeof(float) * rows * shares * H * stride);
  weight *sums = malloc(sizeof(weight) * rows * shares * H);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t e = 0; e < E; e++)
        queries[(r * H + h) * stride + place(e, order)] = q[r * q_stride + h * E + e] / sqrtf(E);
#pragma omp parallel for schedule(static) if (columns * G * E >= SHARED / 4)
  for (int64_t task = 0; task < rows * shares * G; task++) {
    int64_t r = task / (shares * G), share = task / G % shares, g = task % G;
    int64_t end = at_seat->end[r], held = end < entries ? end : entries;
    int64_t own_shares = (held + SHARE - 1) / SHARE, each = (held + own_shares - 1) / own_shares;
    /* shares beyond a row's own are empty */
    int64_t from = end - held + share * each, to = from + each < end ? from + each : end;
    if (from < at_seat->pad[r]) from = at_seat->pad[r];
    int64_t at = (at_seat->slot[r] * G + g) * entries * E * width, out = (r * shares + share) * H + g * heads;
    const float *query = queries + (r * H + g * heads) * stride;
    const char *keys = (const char *)c->keys + at, *values = (const char *)c->values + at;
    attend_share(part + out * stride, sums + out, query, keys, values, c->store, from, to, entries, heads, E, stride);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t h = 0; h < H; h++) {
      const weight *sum = sums + r * shares * H + h;
      float largest = LOWEST, total = 0, *out = y + (r * H + h) * E;
      for (int64_t s = 0; s < shares; s++) largest = sum[s * H].largest > largest ? sum[s * H].largest : largest;
      for (int64_t s = 0; s < shares; s++) total += sum[s * H].total * exponential(sum[s * H].largest - largest);
      float whole[stride];
      memset(whole, 0, sizeof(whole));
      for (int64_t s = 0; s < shares; s++) {
        float by = exponential(sum[s * H].largest - largest) / total;
        for (int64_t e = 0; e < stride; e++) whole[e] += by * part[((r * shares + s) * H + h) * stride + e];
      }
      for (int64_t e = 0; e < E; e++) out[e] = whole[place(e, order)];
    }
  free(queries);
  free(part);
  free(sums);
}

typedef struct {
  matrix qkv, o, up, down; /* up has twice as many rows as down has columns where the MLP is gated, the gate first */
  const float *qk_gain; /* (H + G, E): normed queries and keys are multiplied with it before they are turned */
  const float *exclusion; /* (H,): share of what lies along the token's own value that attention's output loses */
  int64_t H, G, E;
} block;

/* A value a token, (rows, G, E), that joins attention's by 2 * sigmoid of what gate (G, channels) makes of the normed
   input's first channels; of is NULL where the block has none. */
typedef struct {
  const float *of, *gate;
  int64_t channels;
} token_value;

/* y (rows, D): what the block makes of x (rows, D). The rows' keys and values join the cache at their seats. cos and
   sin (rows, E/2) turn the rows' positions. */
void run_block(float *restrict y, const block *b, const float *restrict x, const float *restrict cos,
               const float *restrict sin, const token_value *value, const cache *c, const seats *at_seat, int64_t rows) {
  int64_t H = b->H, G = b->G, E = b->E, D = b->o.n, F = b->down.d, U = b->up.n, all = (H + 2 * G) * E;
  float *normed = malloc(sizeof(float) * rows * (D + all + H * E + U + F));
  float *heads = normed + rows * D, *attended = heads + rows * all, *up = attended + rows * H * E;
  float *hidden = up + rows * U;

  for (int64_t r = 0; r < rows; r++) rms_norm(normed + r * D, x + r * D, D);
  times_rows(heads, &b->qkv, normed, NULL, rows);
  for (int64_t r = 0; r < rows; r++) {
    const float *cosines = cos + r * E / 2, *sines = sin + r * E / 2;
    for (int64_t h = 0; h < H + G; h++) {
      float *head = heads + r * all + h * E, unturned[E];
      rms_norm(unturned, head, E);
      for (int64_t i = 0; i < E; i++) unturned[i] *= b->qk_gain[h * E + i];
      for (int64_t i = 0; i < E / 2; i++) {
        head[i] = unturned[i] * cosines[i] - unturned[i + E / 2] * sines[i];
        head[i + E / 2] = unturned[i + E / 2] * cosines[i] + unturned[i] * sines[i];
      }
    }
    for (int64_t g = 0; value->of && g < G; g++) {
      float opened = 0, *own = heads + r * all + (H + G + g) * E;
      for (int64_t i = 0; i < value->channels; i++) opened += normed[r * D + i] * value->gate[g * value->channels + i];
      for (int64_t e = 0; e < E; e++) own[e] += 2 / (1 + exponential(-opened)) * value->of[(r * G + g) * E + e];
    }
    for (int64_t g = 0; g < G; g++) {
      int64_t column = (at_seat->end[r] - 1) % c->entries;
      int64_t entry = ((at_seat->slot[r] * G + g) * c->entries + column) * E;
      pack(c->keys, c->store, entry, heads + r * all + (H + g) * E, E);
      pack(c->values, c->store, entry, heads + r * all + (H + G + g) * E, E);
    }
  }
  attend(attended, heads, all, c, at_seat, rows, H, G, E);
  for (int64_t r = 0; b->exclusion && r < rows; r++)
    for (int64_t h = 0; h < H; h++) {
      const float *own = heads + r * all + (H + G + h / (H / G)) * E;
      float *out = attended + (r * H + h) * E, along = 0, squares = 1e-6f;
      for (int64_t e = 0; e < E; e++) along += out[e] * own[e], squares += own[e] * own[e];
      for (int64_t e = 0; e < E; e++) out[e] -= b->exclusion[h] * along / squares * own[e];
    }
  times_rows(y, &b->o, attended, x, rows);

  for (int64_t r = 0; r < rows; r++) rms_norm(normed + r * D, y + r * D, D);
  times_rows(up, &b->up, normed, NULL, rows);
  for (int64_t r = 0; r < rows; r++) {
    const float *in = up + r * U;
    float *out = hidden + r * F;
    if (U == F)
      for (int64_t i = 0; i < F; i++) out[i] = in[i] > 0 ? in[i] * in[i] : 0;
    else
      for (int64_t i = 0; i < F; i++) out[i] = in[i] * in[i + F] / (1 + exponential(-in[i]));
  }
  times_rows(normed, &b->down, hidden, y, rows);
  memcpy(y, normed, sizeof(float) * rows * D);
  free(normed);
}
