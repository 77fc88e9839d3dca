/* Decoding on a CPU: matrices stored in 32, 16 or 8 bits times a few rows, and a whole block for a token of each row.

   A token needs every weight once, so its speed is that of the memory; these products come close to it.
   Plain C: the compiler makes vector code for the processor at hand. Compiled and called by cpu_kernels.py.

   w (n, d) is stored in float32, in bfloat16, or in int8 with a scale a row; all activations are float32. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define AHEAD 1024    /* entries of a row that are fetched from memory ahead of the arithmetic */
#define BLOCK_ROWS 6  /* rows of w in one tile; times 16 rows of x, they make as many sums as the registers hold */
#define GROUP_ROWS 48 /* rows of w that share a stay of x's columns in the nearest cache */
#define DEPTH 256     /* columns of w unpacked at once, few enough for that */
#define SHARED 262144 /* multiplications from which the work is shared between the processor's cores */
#define KEYS 64       /* keys scored at a time */
#define SHARE 256     /* columns of a share of attention */
#define LOWEST -1e30f /* less than any score; no infinity, so that the compiler may assume there is none */

enum store { FLOAT32, BFLOAT16, INT8 };

typedef struct {
  const void *w;
  const float *scale; /* of INT8, (n) */
  int64_t store, n, d;
} matrix;

static inline float from_bf16(uint16_t w) {
  uint32_t bits = (uint32_t)w << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* -------------------------------------------------------------------------------------------- one row */

#define TIMES_ROW(name, type, value)                                                             \
  static float name(const type *restrict w, const float *restrict x, int64_t d) {                \
    float sum[32] = {0}, total = 0;                                                              \
    int64_t i = 0;                                                                               \
    for (; i + 32 <= d; i += 32) {                                                               \
      __builtin_prefetch(w + i + AHEAD);                                                         \
      for (int k = 0; k < 32; k++) sum[k] += value(w[i + k]) * x[i + k];                         \
    }                                                                                            \
    for (; i < d; i++) total += value(w[i]) * x[i];                                              \
    for (int k = 0; k < 32; k++) total += sum[k];                                                \
    return total;                                                                                \
  }

TIMES_ROW(float32_times, float, )
TIMES_ROW(bfloat16_times, uint16_t, from_bf16)

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

/* y (n) = w x for x (d); `add` (n) is added unless it is NULL. */
void times_row(float *restrict y, const matrix *m, const float *restrict x, const float *add) {
  int16_t *rounded = m->store == INT8 ? malloc(sizeof(int16_t) * m->d) : NULL;
  float unit = rounded ? round_row(rounded, x, m->d) : 1;
#pragma omp parallel for schedule(static) if (m->n * m->d >= SHARED)
  for (int64_t r = 0; r < m->n; r++) {
    int64_t at = r * m->d;
    float product = m->store == INT8       ? int8_times((const int8_t *)m->w + at, rounded, m->d) * (m->scale[r] * unit)
                    : m->store == BFLOAT16 ? bfloat16_times((const uint16_t *)m->w + at, x, m->d)
                                           : float32_times((const float *)m->w + at, x, m->d);
    y[r] = add ? add[r] + product : product;
  }
  free(rounded);
}

/* --------------------------------------------------------------------------------------- several rows

   BLOCK_ROWS rows of w are unpacked, DEPTH columns at a time, and multiplied with tiles of 8 or 16 rows of x.
   columns[c][j] holds x[j][c]: a tile's sums grow by w[r][c] times one vector of neighbouring rows. */

typedef float vec __attribute__((vector_size(32), aligned(4)));

static inline __attribute__((always_inline)) void add_tile(float *sums, float unpacked[BLOCK_ROWS][DEPTH],
                                                           const float *columns, int64_t depth, int64_t stride,
                                                           const int vectors) {
  vec s[BLOCK_ROWS][2];
  for (int r = 0; r < BLOCK_ROWS; r++)
    for (int v = 0; v < vectors; v++) s[r][v] = *(const vec *)(sums + r * stride + 8 * v);
  for (int64_t c = 0; c < depth; c++)
    for (int r = 0; r < BLOCK_ROWS; r++)
      for (int v = 0; v < vectors; v++) s[r][v] += unpacked[r][c] * *(const vec *)(columns + c * stride + 8 * v);
  for (int r = 0; r < BLOCK_ROWS; r++)
    for (int v = 0; v < vectors; v++) *(vec *)(sums + r * stride + 8 * v) = s[r][v];
}

static void unpack(float *restrict to, const matrix *m, int64_t at, int64_t depth) {
  if (m->store == INT8) {
    const int8_t *w = (const int8_t *)m->w + at;
    for (int64_t k = 0; k < depth; k++) to[k] = w[k];
  } else if (m->store == BFLOAT16) {
    const uint16_t *w = (const uint16_t *)m->w + at;
    for (int64_t k = 0; k < depth; k++) to[k] = from_bf16(w[k]);
  } else
    memcpy(to, (const float *)m->w + at, sizeof(float) * depth);
}

/* y (rows, n) = x w for x (rows, d); `add` (rows, n) is added unless it is NULL. */
void times_rows(float *restrict y, const matrix *m, const float *restrict x, const float *add, int64_t rows) {
  if (rows == 1) {
    times_row(y, m, x, add);
    return;
  }
  int64_t n = m->n, d = m->d, stride = (rows + 7) / 8 * 8;
  float *columns = calloc(d * stride, sizeof(float));
  for (int64_t j = 0; j < rows; j++)
    for (int64_t c = 0; c < d; c++) columns[c * stride + j] = x[j * d + c];
#pragma omp parallel for schedule(static) if (n * d * rows >= SHARED)
  for (int64_t group = 0; group < n; group += GROUP_ROWS) {
    float unpacked[BLOCK_ROWS][DEPTH], *sums = calloc(GROUP_ROWS * stride, sizeof(float));
    int64_t in_group = n - group < GROUP_ROWS ? n - group : GROUP_ROWS;
    for (int64_t c = 0; c < d; c += DEPTH) {
      int64_t depth = d - c < DEPTH ? d - c : DEPTH;
      for (int64_t first = 0; first < in_group; first += BLOCK_ROWS) {
        for (int64_t r = 0; r < BLOCK_ROWS; r++) { /* the last block may reach past the end of w: it repeats a row */
          int64_t row = first + r < in_group ? group + first + r : n - 1;
          unpack(unpacked[r], m, row * d + c, depth);
        }
        int64_t j = 0;
        for (; j + 16 <= stride; j += 16)
          add_tile(sums + first * stride + j, unpacked, columns + c * stride + j, depth, stride, 2);
        if (j < stride) add_tile(sums + first * stride + j, unpacked, columns + c * stride + j, depth, stride, 1);
      }
    }
    for (int64_t j = 0; j < rows; j++)
      for (int64_t r = 0; r < in_group; r++) {
        int64_t at = j * n + group + r;
        y[at] = sums[r * stride + j] * (m->store == INT8 ? m->scale[group + r] : 1) + (add ? add[at] : 0);
      }
    free(sums);
  }
  free(columns);
}

/* ---------------------------------------------------------------- a block of model.py, a token of each row */

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
  float largest, total; /* score, and the sum of e^(score - largest) */
} weight;

/* One share of the work of `attend`: `heads` query heads q (heads, E) over the keys and values (entries, E) of columns
   `from` to `to`, a ring. Gives the unfinished sums y (heads, E) and their weights, as in arXiv 2205.14135. */
static void attend_share(float *restrict y, weight *restrict sums, const float *restrict q, const float *restrict keys,
                         const float *restrict values, int64_t from, int64_t to, int64_t entries, int64_t heads,
                         int64_t E) {
  float score[KEYS];
  memset(y, 0, sizeof(float) * heads * E);
  for (int64_t h = 0; h < heads; h++) sums[h] = (weight){LOWEST, 0};
  for (int64_t column = from, here; column < to; column += here) {
    int64_t entry = column % entries;
    here = to - column < KEYS ? to - column : KEYS;
    if (here > entries - entry) here = entries - entry; /* the ring begins anew */
    const float *key = keys + entry * E, *value = values + entry * E;
    for (int64_t h = 0; h < heads; h++) {
      float largest = sums[h].largest, total = 0;
      for (int64_t j = 0; j < here; j++) {
        float dot = 0;
        for (int64_t e = 0; e < E; e++) dot += q[h * E + e] * key[j * E + e];
        score[j] = dot / sqrtf(E);
        largest = score[j] > largest ? score[j] : largest;
      }
      float shrink = exponential(sums[h].largest - largest);
      for (int64_t j = 0; j < here; j++) score[j] = exponential(score[j] - largest);
      for (int64_t j = 0; j < here; j++) total += score[j];
      for (int64_t e = 0; e < E; e++) y[h * E + e] *= shrink;
      for (int64_t j = 0; j < here; j++)
        for (int64_t e = 0; e < E; e++) y[h * E + e] += score[j] * value[j * E + e];
      sums[h] = (weight){largest, sums[h].total * shrink + total};
    }
  }
}

/* y (rows, H, E): attention of q (rows, ·, E), `q_stride` floats a row, over keys and values (rows, G, entries, E):
   row r sees the columns from pad[r] to `end` that the ring still holds. Shares of the columns are worked on apart
   and put together at the end. */
static void attend(float *restrict y, const float *q, int64_t q_stride, const float *keys, const float *values,
                   const int64_t *pad, int64_t rows, int64_t end, int64_t entries, int64_t H, int64_t G, int64_t E) {
  int64_t oldest = end > entries ? end - entries : 0, heads = H / G;
  int64_t shares = (end - oldest + SHARE - 1) / SHARE, each = (end - oldest + shares - 1) / shares;
  float *part = malloc(sizeof(float) * rows * shares * H * E);
  weight *sums = malloc(sizeof(weight) * rows * shares * H);
#pragma omp parallel for schedule(static) if (rows * (end - oldest) * G * E >= SHARED / 4)
  for (int64_t task = 0; task < rows * shares * G; task++) {
    int64_t r = task / (shares * G), share = task / G % shares, g = task % G;
    int64_t from = oldest + share * each, to = from + each < end ? from + each : end;
    if (from < pad[r]) from = pad[r];
    int64_t at = (r * G + g) * entries * E, out = (r * shares + share) * H + g * heads;
    attend_share(part + out * E, sums + out, q + r * q_stride + g * heads * E, keys + at, values + at, from, to,
                 entries, heads, E);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t h = 0; h < H; h++) {
      const weight *sum = sums + r * shares * H + h;
      float largest = LOWEST, total = 0, *out = y + (r * H + h) * E;
      for (int64_t s = 0; s < shares; s++) largest = sum[s * H].largest > largest ? sum[s * H].largest : largest;
      for (int64_t s = 0; s < shares; s++) total += sum[s * H].total * exponential(sum[s * H].largest - largest);
      memset(out, 0, sizeof(float) * E);
      for (int64_t s = 0; s < shares; s++) {
        float by = exponential(sum[s * H].largest - largest) / total;
        for (int64_t e = 0; e < E; e++) out[e] += by * part[((r * shares + s) * H + h) * E + e];
      }
    }
  free(part);
  free(sums);
}

typedef struct {
  matrix qkv, o, gate_up, down;
  const float *heat; /* (H): each query head is multiplied with its own */
  int64_t H, G, E;
} block;

/* y (rows, D): what the block makes of x (rows, D). The rows' keys and values join keys and values (rows, G, entries,
   E), a ring, as column `end` - 1. cos and sin (rows, E/2) turn the rows' positions. */
void run_block(float *restrict y, const block *b, const float *restrict x, const float *restrict cos,
               const float *restrict sin, float *keys, float *values, const int64_t *pad, int64_t rows, int64_t end,
               int64_t entries) {
  int64_t H = b->H, G = b->G, E = b->E, D = b->o.n, F = b->down.d, all = (H + 2 * G) * E;
  float *normed = malloc(sizeof(float) * rows * (D + all + H * E + 3 * F));
  float *heads = normed + rows * D, *attended = heads + rows * all, *gate_up = attended + rows * H * E;
  float *hidden = gate_up + rows * 2 * F;

  for (int64_t r = 0; r < rows; r++) rms_norm(normed + r * D, x + r * D, D);
  times_rows(heads, &b->qkv, normed, NULL, rows);
  for (int64_t r = 0; r < rows; r++) {
    const float *c = cos + r * E / 2, *s = sin + r * E / 2;
    for (int64_t h = 0; h < H + G; h++) {
      float *head = heads + r * all + h * E, unturned[E];
      float *to = h < H ? head : keys + ((r * G + h - H) * entries + (end - 1) % entries) * E;
      float heat = h < H ? b->heat[h] : 1;
      rms_norm(unturned, head, E);
      for (int64_t i = 0; i < E / 2; i++) {
        to[i] = heat * (unturned[i] * c[i] - unturned[i + E / 2] * s[i]);
        to[i + E / 2] = heat * (unturned[i + E / 2] * c[i] + unturned[i] * s[i]);
      }
    }
    for (int64_t g = 0; g < G; g++)
      memcpy(values + ((r * G + g) * entries + (end - 1) % entries) * E, heads + r * all + (H + G + g) * E,
             sizeof(float) * E);
  }
  attend(attended, heads, all, keys, values, pad, rows, end, entries, H, G, E);
  times_rows(y, &b->o, attended, x, rows);

  for (int64_t r = 0; r < rows; r++) rms_norm(normed + r * D, y + r * D, D);
  times_rows(gate_up, &b->gate_up, normed, NULL, rows);
  for (int64_t r = 0; r < rows; r++) {
    const float *gate = gate_up + r * 2 * F, *up = gate + F;
    for (int64_t i = 0; i < F; i++) hidden[r * F + i] = gate[i] * up[i] / (1 + exponential(-gate[i]));
  }
  times_rows(normed, &b->down, hidden, y, rows);
  memcpy(y, normed, sizeof(float) * rows * D);
  free(normed);
}
