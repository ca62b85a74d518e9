// What torch has no kernel for, or only many small ones, between the products of a decoder on a CPU, in float32: it is compiled
// where it runs, by engine/native.py.
//
// Shapes: T tokens of N sequences; C model width, H query and K key/value heads of width D, A = H + 2 K heads of queries, keys and
// values, I and O a product's width in and out, F width between gate and down, S slots of a head's pages, P slots in a page, M
// pages of the longest context.
// Loops that must become vectors say so: a sum in any order is allowed there and nowhere else.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

extern "C" {

enum Kind : int64_t {
  NONE,      // numbers that torch multiplies
  CODES,     // int8 [O, I], rows rounded to 16 bits
  BFLOAT16,  // panels of pairs of bfloat16, rows rounded to bfloat16
  INT8,      // panels of fours of int8, rows rounded to 8 bits
};

struct Product {  // weights of about numbers x scales
  const void* weights;
  const float *scales_O, *bias_O;  // or null
  const int32_t* sums_O;           // of int8 in panels: 128 times the sum of an output's codes
  int64_t num_inputs, num_outputs;
  int64_t levels;  // codes: a row of inputs is rounded to that many steps on both sides of 0, by its largest
  Kind kind;
};

struct Norm {
  const float* weight;
  float eps;
};

struct Block {
  Norm input_norm, mlp_norm;
  Norm q_norm, k_norm;  // null weights: none
  Product qkv_proj, o_proj, gate_up_proj, down_proj;
  uint8_t *keys, *values;  // pages [K, S, D]
  int64_t window;          // 0: none
};

struct Shape {
  int64_t width, num_heads, num_kv_heads, head_width, num_slots, page_size;
  const float *cosines, *sines;  // by position [D]; of the first half minus the sine
  int64_t number_bytes;          // in pages: float32 or bfloat16
};

struct Step {
  int64_t num_tokens, num_sequences, num_pages;
  const int64_t *positions_T, *tables_NM;
  const int64_t* starts_N;  // the first token of each sequence, and T
  int64_t num_threads;
};
}

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 8;
#else
constexpr int64_t LANES = 8, ROWS = 4;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// From the start of a cache line, so that no vector lies across two; filled only where it is told with what.
class Floats {
 public:
  explicit Floats(int64_t size = 0) { resize(size); }
  Floats(int64_t size, float value) : Floats(size) { std::fill_n(data(), size, value); }
  void resize(int64_t size) {
    if (size <= size_) return;
    size_ = size;
    floats_.reset((float*)std::aligned_alloc(64, round_up(size * sizeof(float), 64)));
  }
  float* data() { return floats_.get(); }
  float& operator[](int64_t i) const { return floats_[i]; }

 private:
  struct Free {
    void operator()(float* x) const { std::free(x); }
  };
  int64_t size_ = 0;
  std::unique_ptr<float[], Free> floats_;
};

inline Vector load(const float* x) { return *(const Vector*)x; }

inline void store(float* x, Vector values) { *(Vector*)x = values; }

void widen_row(const uint16_t* half, int64_t size, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < size; i++) {
    const uint32_t bits = (uint32_t)half[i] << 16;
    __builtin_memcpy(out + i, &bits, sizeof bits);
  }
}

// To the nearest bfloat16, and of two as near to the even one.
void narrow_row(const float* x, int64_t size, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < size; i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    out[i] = x[i] != x[i] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
}

// e^x to seven digits: 2^n e^r, by a polynomial that loops can hold many of.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  const float p = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline float dot(const float* a, const float* b, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += a[i] * b[i];
  return sum;
}

void normalise(const Norm& norm, const float* x, float* out, int64_t size) {
  const float factor = 1 / std::sqrt(dot(x, x, size) / size + norm.eps);
#pragma omp simd
  for (int64_t i = 0; i < size; i++) out[i] = x[i] * factor * norm.weight[i];
}

// No less than 1e-30. Where something is not finite neither is this: it spoils the row, as in any product.
float largest_of(const float* x_I, int64_t size) {
  float largest = 1e-30f, spoilt = 0;
#pragma omp simd reduction(max : largest) reduction(+ : spoilt)
  for (int64_t i = 0; i < size; i++) {
    largest = std::max(largest, std::fabs(x_I[i]));
    spoilt += 0 * x_I[i];
  }
  return largest + spoilt;
}

struct Rows {  // what a product reads: numbers as its kind has them, times factors
  Kind kind;
  int64_t width, bytes;  // of a row
  uint8_t* data;
  float* factors_T;  // or null

  Rows(const Product& product, float* room, float* factors_T)
      : kind(product.kind), width(product.num_inputs), bytes(width * 4), data((uint8_t*)room), factors_T(kind == INT8 ? factors_T : nullptr) {
    if (kind == BFLOAT16) bytes = round_up(width, 2) * 2;
    if (kind == INT8) bytes = round_up(width, 4);
  }
  Rows(float* data, int64_t width) : kind(NONE), width(width), bytes(width * 4), data((uint8_t*)data), factors_T(nullptr) {}

  // Where a row is computed before `write`.
  float* target(int64_t t, Floats& room) const {
    if (kind != BFLOAT16 && kind != INT8) return (float*)(data + t * bytes);
    room.resize(width);
    return room.data();
  }

  void write(int64_t t, const float* x) const {
    if (kind == BFLOAT16) {
      uint16_t* half = (uint16_t*)(data + t * bytes);
      narrow_row(x, width, half);
      std::fill(half + width, half + bytes / 2, 0);
    }
    if (kind == INT8) {
      const float largest = largest_of(x, width), factor = 1 / largest;
      uint8_t* codes = data + t * bytes;
#pragma omp simd
      for (int64_t i = 0; i < width; i++) codes[i] = (uint8_t)((int32_t)std::nearbyint(x[i] * factor * 127) + 128);
      std::fill(codes + width, codes + bytes, 0);
      factors_T[t] = largest / 127;
    }
  }
};

// The sum is of 32 bits: num_inputs x levels x the largest code are below 2^31.
void multiply_codes(const Product& product, const float* x_TI, float* out_TO, int64_t num_tokens, int64_t num_threads, bool adds) {
  const int64_t I = product.num_inputs, O = product.num_outputs;
  std::vector<int16_t> rounded_TI(num_tokens * I);
  Floats steps_T(num_tokens);
  for (int64_t t = 0; t < num_tokens; t++) {
    const float* x_I = x_TI + t * I;
    int16_t* rounded_I = &rounded_TI[t * I];
    const float largest = largest_of(x_I, I);
#pragma omp simd
    for (int64_t i = 0; i < I; i++) rounded_I[i] = (int16_t)(int32_t)std::nearbyint(x_I[i] / largest * product.levels);
    steps_T[t] = largest / product.levels;
  }
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t o = 0; o < O; o++) {
    const int8_t* codes_I = (const int8_t*)product.weights + o * I;
    for (int64_t t = 0; t < num_tokens; t++) {
      const int16_t* rounded_I = &rounded_TI[t * I];
      int32_t sum = 0;
      for (int64_t i = 0; i < I; i++) sum += rounded_I[i] * (int16_t)codes_I[i];
      float& out = out_TO[t * O + o];
      out = sum * product.scales_O[o] * steps_T[t] + (product.bias_O ? product.bias_O[o] : 0) + (adds ? out : 0);
    }
  }
}

// Processors with AMX multiply several times as fast by it, as oneDNN does.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define HAS_BFLOAT16 1
#else
#define HAS_BFLOAT16 0
#endif
#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
#define HAS_INT8 1
#else
#define HAS_INT8 0
#endif

#if HAS_BFLOAT16 || HAS_INT8
// A panel is PANEL outputs: for each 32 bits of a row of inputs, those of all its outputs side by side.
constexpr int64_t PANEL = 32, PANEL_VECTORS = PANEL / 16, PANEL_ROWS = 8;

#if HAS_BFLOAT16
struct Pairs {
  typedef __m512 Sum;
  static Sum add(Sum sum, int32_t x, __m512i weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)weights);
  }
  static __m512 finish(Sum sum, const Product&, int64_t) { return sum; }
};
#endif

#if HAS_INT8
struct Fours {
  typedef __m512i Sum;
  static Sum add(Sum sum, int32_t x, __m512i weights) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(x), weights); }
  static __m512 finish(Sum sum, const Product& product, int64_t o) {
    const __m512 scales = _mm512_loadu_ps(product.scales_O + o);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_loadu_si512(product.sums_O + o))) * scales;
  }
};
#endif

// Some rows times one panel, whose first output is o. What belongs to outputs is as long as all panels.
template <typename Numbers, int64_t R>
inline void multiply_tile(const Product& product, const Rows& rows, int64_t t, int64_t o, float* out_TO, bool adds) {
  const int64_t J = rows.bytes / 4, O = product.num_outputs;
  const int32_t* x_RJ = (const int32_t*)(rows.data + t * rows.bytes);
  const __m512i* weights = (const __m512i*)product.weights + o / 16 * J;
  typename Numbers::Sum sums[R * PANEL_VECTORS] = {};
  for (int64_t j = 0; j < J; j++)
#pragma GCC unroll 16
    for (int64_t i = 0; i < R * PANEL_VECTORS; i++)
      sums[i] = Numbers::add(sums[i], x_RJ[i / PANEL_VECTORS * J + j], weights[j * PANEL_VECTORS + i % PANEL_VECTORS]);
#pragma GCC unroll 16
  for (int64_t i = 0; i < R * PANEL_VECTORS; i++) {
    const int64_t row = t + i / PANEL_VECTORS, first = o + i % PANEL_VECTORS * 16;
    if (first >= O) continue;
    const __mmask16 is_there = O - first < 16 ? (1 << (O - first)) - 1 : 0xffff;
    float* out = out_TO + row * O + first;
    __m512 sum = Numbers::finish(sums[i], product, first);
    if (rows.factors_T) sum *= _mm512_set1_ps(rows.factors_T[row]);
    if (product.bias_O) sum += _mm512_loadu_ps(product.bias_O + first);
    if (adds) sum += _mm512_maskz_loadu_ps(is_there, out);
    _mm512_mask_storeu_ps(out, is_there, sum);
  }
}

template <typename Numbers>
void multiply_panels(const Product& product, const Rows& rows, float* out_TO, int64_t num_tokens, int64_t num_threads, bool adds) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t o = 0; o < product.num_outputs; o += PANEL) {
    int64_t t = 0;
    for (; t + PANEL_ROWS <= num_tokens; t += PANEL_ROWS) multiply_tile<Numbers, PANEL_ROWS>(product, rows, t, o, out_TO, adds);
    for (; t + 4 <= num_tokens; t += 4) multiply_tile<Numbers, 4>(product, rows, t, o, out_TO, adds);
    for (; t < num_tokens; t++) multiply_tile<Numbers, 1>(product, rows, t, o, out_TO, adds);
  }
}
#endif

// What rows times weights are, or in sum with what is there.
void multiply(const Product& product, const Rows& rows, float* out_TO, int64_t num_tokens, int64_t num_threads, bool adds) {
  if (product.kind == CODES) multiply_codes(product, (const float*)rows.data, out_TO, num_tokens, num_threads, adds);
#if HAS_BFLOAT16
  if (product.kind == BFLOAT16) multiply_panels<Pairs>(product, rows, out_TO, num_tokens, num_threads, adds);
#endif
#if HAS_INT8
  if (product.kind == INT8) multiply_panels<Fours>(product, rows, out_TO, num_tokens, num_threads, adds);
#endif
}

void put_row(const Shape& shape, const float* x_D, uint8_t* pages, int64_t slot) {
  uint8_t* out = pages + slot * shape.head_width * shape.number_bytes;
  if (shape.number_bytes == 2)
    narrow_row(x_D, shape.head_width, (uint16_t*)out);
  else
    std::copy_n(x_D, shape.head_width, (float*)out);
}

// Turns a token's queries into q_HD, and puts its key, turned, and its value into their pages.
void place(const Shape& shape, const Step& step, const Block& block, const float* x_AD, int64_t t, int64_t n, float* q_HD) {
  const int64_t H = shape.num_heads, K = shape.num_kv_heads, D = shape.head_width, half = D / 2, position = step.positions_T[t];
  const int64_t page = step.tables_NM[n * step.num_pages + position / shape.page_size];
  const int64_t slot = page * shape.page_size + position % shape.page_size;
  const float *cos_D = shape.cosines + position * D, *sin_D = shape.sines + position * D;
  Floats normed_D(D), turned_D(D);
  for (int64_t a = 0; a < H + K; a++, x_AD += D) {
    const Norm& norm = a < H ? block.q_norm : block.k_norm;
    if (norm.weight) normalise(norm, x_AD, normed_D.data(), D);
    const float* x_D = norm.weight ? normed_D.data() : x_AD;
    float* out_D = a < H ? q_HD + a * D : turned_D.data();
#pragma omp simd
    for (int64_t d = 0; d < half; d++) out_D[d] = x_D[d] * cos_D[d] + x_D[d + half] * sin_D[d];
#pragma omp simd
    for (int64_t d = half; d < D; d++) out_D[d] = x_D[d] * cos_D[d] + x_D[d - half] * sin_D[d];
    if (a >= H) put_row(shape, out_D, block.keys, (a - H) * shape.num_slots + slot);
  }
  for (int64_t k = 0; k < K; k++, x_AD += D) put_row(shape, x_AD, block.values, k * shape.num_slots + slot);
}

struct Pages {  // a head's keys or values of one sequence
  const Shape& shape;
  const int64_t* table_M;
  const uint8_t* slots;

  int64_t bytes() const { return shape.page_size * shape.head_width * shape.number_bytes; }

  // Page m, of places before `stop`. Pages lie anywhere: nobody but who has the table knows which is next. Always inline: g++ leaves
  // out calls of a function that does nothing but fetch.
  __attribute__((always_inline)) void fetch(int64_t m, int64_t stop) const {
    const uint8_t* page = slots + table_M[m] * bytes();
    const int64_t num = std::min(shape.page_size, stop - m * shape.page_size);
    for (int64_t i = 0; i < num * shape.head_width * shape.number_bytes; i += 64) __builtin_prefetch(page + i, 0, 2);
  }

  // Calls visit(j, x_PD, num, m) for the places first + j and on that are before `stop`, num of them in page m; float or as they are.
  template <typename Number, typename Visit>
  void each(int64_t first, int64_t stop, Visit visit) const {
    const int64_t D = shape.head_width, P = shape.page_size;
    const bool widens = shape.number_bytes != sizeof(Number);
    Floats room(widens ? P * D : 0);
    for (int64_t m = first / P; m * P < stop; m++) {
      const int64_t from = std::max<int64_t>(0, first - m * P), to = std::min(P, stop - m * P);
      const uint8_t* x_PD = slots + table_M[m] * bytes() + from * D * shape.number_bytes;
      if (widens) widen_row((const uint16_t*)x_PD, (to - from) * D, room.data());
      visit(m * P + from - first, widens ? (const Number*)room.data() : (const Number*)x_PD, to - from, m);
    }
  }
};

// A query's heads that share keys and values, and what they do with num of them; J: from a head's scores to the next's.
struct AnyWidth {
  typedef float Number;
  int64_t num_heads, D;
  const float* q_HD;

  AnyWidth(int64_t num_heads, int64_t D, const float* q_HD) : num_heads(num_heads), D(D), q_HD(q_HD) {}

  void score(const float* k_PD, int64_t num, float* scores_HJ, int64_t J) const {
    for (int64_t h = 0; h < num_heads; h++)
      for (int64_t p = 0; p < num; p++) scores_HJ[h * J + p] = dot(q_HD + h * D, k_PD + p * D, D);
  }
  void add(const float* weights_HJ, int64_t J, const float* v_PD, int64_t num, float* sums_HD) const {
    for (int64_t h = 0; h < num_heads; h++)
      for (int64_t p = 0; p < num; p++)
#pragma omp simd
        for (int64_t d = 0; d < D; d++) sums_HD[h * D + d] += weights_HJ[h * J + p] * v_PD[p * D + d];
  }
  void finish(const float* sums_D, float factor, float* out_D) const {
    for (int64_t d = 0; d < D; d++) out_D[d] = sums_D[d] * factor;
  }
};

inline void load_two(const float* x, Vector* out) {
  out[0] = load(x);
  out[1] = load(x + LANES);
}

// The even ones, and the odd ones: whatever the order, each is widened by one operation.
inline void load_two(const uint16_t* half, Vector* out) {
  typedef uint32_t Bits __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
  const Bits bits = *(const Bits*)half;
  out[0] = (Vector)(bits << 16);
  out[1] = (Vector)(bits & 0xffff0000u);
}

// The sums of neighbours: those of a, then those of b.
inline Vector add_neighbours(Vector a, Vector b) {
#ifdef __AVX512F__
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// By vectors, of numbers as they lie in pages; D in whole COLUMNS.
template <typename Page>
struct WholeVectors {
  typedef Page Number;
  static constexpr int64_t VECTORS = 4, COLUMNS = VECTORS * LANES, MOST = LANES / 4;  // heads whose sums registers hold
  static constexpr int64_t STEP = sizeof(Page) == 4 ? 1 : 2, SECOND = sizeof(Page) == 4 ? LANES : 1;  // the order of load_two
  int64_t num_heads, D;
  Floats q_HD;

  WholeVectors(int64_t num_heads, int64_t D, const float* x_HD) : num_heads(num_heads), D(D), q_HD(num_heads * D) {
    for (int64_t i = 0; i < num_heads * D; i += 2 * LANES)
      for (int64_t j = 0; j < LANES; j++) {
        q_HD[i + j] = x_HD[i + j * STEP];
        q_HD[i + LANES + j] = x_HD[i + SECOND + j * STEP];
      }
  }

  void score(const Number* k_PD, int64_t num, float* scores_HJ, int64_t J) const {
    by_heads([&](auto some, int64_t h) { score_some<some()>(&q_HD[h * D], k_PD, num, scores_HJ + h * J, J); });
  }
  void add(const float* weights_HJ, int64_t J, const Number* v_PD, int64_t num, float* sums_HD) const {
    by_heads([&](auto some, int64_t h) { add_some<some()>(weights_HJ + h * J, J, v_PD, num, sums_HD + h * D); });
  }
  void finish(const float* sums_D, float factor, float* out_D) const {
    for (int64_t d = 0; d < D; d += 2 * LANES)
      for (int64_t j = 0; j < LANES; j++) {
        out_D[d + j * STEP] = sums_D[d + j] * factor;
        out_D[d + SECOND + j * STEP] = sums_D[d + LANES + j] * factor;
      }
  }

 private:
  template <typename Act>
  void by_heads(Act act) const {
    int64_t h = 0;
    for (; h + MOST <= num_heads; h += MOST) act(std::integral_constant<int64_t, MOST>(), h);
    if (num_heads - h == 3) act(std::integral_constant<int64_t, 3>(), h);
    if (num_heads - h == 2) act(std::integral_constant<int64_t, 2>(), h);
    if (num_heads - h == 1) act(std::integral_constant<int64_t, 1>(), h);
  }

  // LANES keys at a time; where there are fewer, the last of them more than once.
  template <int64_t R>
  void score_some(const float* q_RD, const Number* k_PD, int64_t num, float* scores_RJ, int64_t J) const {
    for (int64_t p = 0; p < num; p += LANES) {
      Vector sums[R][LANES / 4];
#pragma GCC unroll 4
      for (int64_t group = 0; group < LANES / 4; group++) {
        Vector four[R][4] = {};
        for (int64_t d = 0; d < D; d += COLUMNS)
#pragma GCC unroll 4
          for (int64_t j = 0; j < 4; j++) {
            const Number* k_D = k_PD + std::min(p + group * 4 + j, num - 1) * D + d;
            Vector k[VECTORS];
            load_two(k_D, k);
            load_two(k_D + COLUMNS / 2, k + 2);
#pragma GCC unroll 16
            for (int64_t i = 0; i < R * VECTORS; i++)
              four[i / VECTORS][j] += load(q_RD + i / VECTORS * D + d + i % VECTORS * LANES) * k[i % VECTORS];
          }
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; r++)
          sums[r][group] = add_neighbours(add_neighbours(four[r][0], four[r][1]), add_neighbours(four[r][2], four[r][3]));
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < R; r++) {
        Vector sum = add_neighbours(sums[r][0], sums[r][1]);
        if constexpr (LANES == 16) sum = add_neighbours(sum, add_neighbours(sums[r][2], sums[r][3]));
        float* out = scores_RJ + r * J + p;
        if (num - p >= LANES)
          store(out, sum);
        else
          for (int64_t j = 0; j < num - p; j++) out[j] = sum[j];
      }
    }
  }

  template <int64_t R>
  void add_some(const float* weights_RJ, int64_t J, const Number* v_PD, int64_t num, float* sums_RD) const {
    for (int64_t d = 0; d < D; d += COLUMNS) {
      Vector sums[R * VECTORS];
#pragma GCC unroll 16
      for (int64_t i = 0; i < R * VECTORS; i++) sums[i] = load(sums_RD + i / VECTORS * D + d + i % VECTORS * LANES);
      for (int64_t p = 0; p < num; p++) {
        const Number* v_D = v_PD + p * D + d;
        Vector x[VECTORS];
        load_two(v_D, x);
        load_two(v_D + COLUMNS / 2, x + 2);
#pragma GCC unroll 16
        for (int64_t i = 0; i < R * VECTORS; i++) sums[i] += weights_RJ[i / VECTORS * J + p] * x[i % VECTORS];
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < R * VECTORS; i++) store(sums_RD + i / VECTORS * D + d + i % VECTORS * LANES, sums[i]);
    }
  }
};

constexpr int64_t TOGETHER = 128;  // keys, about, between whose scores and values the processor's cache holds what is fetched ahead

// softmax(q K^T / sqrt(D)) V of one query for heads that share keys and values, into q_HD: pages of some keys, then of their values,
// as FlashAttention does (Dao et al. 2022), and ever the others are fetched meanwhile.
template <typename Heads>
void attend_alone(const Pages& keys, const Pages& values, int64_t first, int64_t stop, int64_t num_heads, Floats& room, float* q_HD) {
  const int64_t H = num_heads, D = keys.shape.head_width, P = keys.shape.page_size;
  const int64_t together = std::max<int64_t>(1, TOGETHER / P), J = together * P, num_pages = (stop + P - 1) / P;
  const Heads heads(H, D, q_HD);
  const float scale = 1 / std::sqrt((float)D);
  room.resize(H * (J + D + 2));
  float *scores_HJ = room.data(), *sums_HD = scores_HJ + H * J, *totals_H = sums_HD + H * D, *largest_H = totals_H + H;
  std::fill(sums_HD, largest_H, 0.0f);
  std::fill_n(largest_H, H, -std::numeric_limits<float>::infinity());
  for (int64_t m = first / P; m < std::min(first / P + together, num_pages); m++) keys.fetch(m, stop);
  for (int64_t m = first / P; m < num_pages; m += together) {
    const int64_t from = std::max(first, m * P), num_keys = std::min(stop, (m + together) * P) - from;
    keys.template each<typename Heads::Number>(from, from + num_keys, [&](int64_t j, const auto* k_PD, int64_t num, int64_t page) {
      values.fetch(page, stop);
      heads.score(k_PD, num, &scores_HJ[j], J);
    });
    for (int64_t h = 0; h < H; h++) {
      float *scores_J = &scores_HJ[h * J], largest = largest_H[h], total = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t j = 0; j < num_keys; j++) largest = std::max(largest, scores_J[j] * scale);
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < num_keys; j++) total += scores_J[j] = exponential(scores_J[j] * scale - largest);
      const float factor = exponential(largest_H[h] - largest);
      totals_H[h] = totals_H[h] * factor + total;
      largest_H[h] = largest;
#pragma omp simd
      for (int64_t d = 0; d < D; d++) sums_HD[h * D + d] *= factor;
    }
    values.template each<typename Heads::Number>(from, from + num_keys, [&](int64_t j, const auto* v_PD, int64_t num, int64_t page) {
      if (page + together < num_pages) keys.fetch(page + together, stop);
      heads.add(&scores_HJ[j], J, v_PD, num, sums_HD);
    });
  }
  for (int64_t h = 0; h < H; h++) heads.finish(sums_HD + h * D, 1 / totals_H[h], q_HD + h * D);
}

constexpr int64_t VECTORS = 2, COLUMNS = LANES * VECTORS;  // with ROWS, of sums that registers hold
constexpr int64_t QUERIES = 32, KEYS = 32;                 // of a tile
static_assert(QUERIES <= KEYS, "whatever the window, a query sees one of the first keys that a tile looks at");

// c_RN += a_RJ b_JN; R a whole number of ROWS, N of COLUMNS.
void accumulate(const float* a_RJ, const float* b_JN, float* c_RN, int64_t R, int64_t J, int64_t N) {
  for (int64_t r = 0; r < R; r += ROWS)
    for (int64_t n = 0; n < N; n += COLUMNS) {
      Vector sums[ROWS][VECTORS];
#pragma GCC unroll 16
      for (int64_t i = 0; i < ROWS * VECTORS; i++)
        sums[i / VECTORS][i % VECTORS] = load(c_RN + (r + i / VECTORS) * N + n + i % VECTORS * LANES);
      for (int64_t j = 0; j < J; j++)
#pragma GCC unroll 16
        for (int64_t i = 0; i < ROWS * VECTORS; i++)
          sums[i / VECTORS][i % VECTORS] += a_RJ[(r + i / VECTORS) * J + j] * load(b_JN + j * N + n + i % VECTORS * LANES);
#pragma GCC unroll 16
      for (int64_t i = 0; i < ROWS * VECTORS; i++)
        store(c_RN + (r + i / VECTORS) * N + n + i % VECTORS * LANES, sums[i / VECTORS][i % VECTORS]);
    }
}

// The same for some queries of a sequence, of all the heads that share a key/value head: a part of the keys at a time, as
// FlashAttention does (Dao et al. 2022), by products of small matrices. `positions_Q` are those of the queries at q_QHD.
void attend_tile(
    const Pages& keys, const Pages& values, int64_t window, const int64_t* positions_Q, int64_t num_queries, float* q_QHD) {
  const Shape& shape = keys.shape;
  const int64_t D = shape.head_width, G = shape.num_heads / shape.num_kv_heads, R = num_queries * G, V = round_up(D, COLUMNS);
  const int64_t stop = positions_Q[num_queries - 1] + 1;
  const float scale = 1 / std::sqrt((float)D);
  Floats q_RD(round_up(R, ROWS) * D, 0.0f), scores_RJ(round_up(R, ROWS) * KEYS), out_RV(round_up(R, ROWS) * V, 0.0f);
  Floats k_DJ(D * KEYS, 0.0f), v_JV(KEYS * V, 0.0f), largest_R(R, -std::numeric_limits<float>::infinity()), totals_R(R, 0.0f);
  for (int64_t r = 0; r < R; r++)
    for (int64_t d = 0; d < D; d++) q_RD[r * D + d] = q_QHD[(r / G * shape.num_heads + r % G) * D + d] * scale;
  for (int64_t first = window ? std::max<int64_t>(0, positions_Q[0] - window + 1) : 0; first < stop; first += KEYS) {
    const int64_t end = std::min(stop, first + KEYS);
    keys.each<float>(first, end, [&](int64_t j, const float* k_PD, int64_t num, int64_t page) {
      values.fetch(page, end);
      for (int64_t p = 0; p < num; p++)
        for (int64_t d = 0; d < D; d++) k_DJ[d * KEYS + j + p] = k_PD[p * D + d];
    });
    values.each<float>(first, end, [&](int64_t j, const float* v_PD, int64_t num, int64_t page) {
      for (int64_t p = 0; p < num; p++) std::copy_n(v_PD + p * D, D, &v_JV[(j + p) * V]);
    });
    std::fill_n(scores_RJ.data(), round_up(R, ROWS) * KEYS, 0.0f);
    accumulate(q_RD.data(), k_DJ.data(), scores_RJ.data(), round_up(R, ROWS), D, KEYS);
    for (int64_t r = 0; r < R; r++) {
      const int64_t position = positions_Q[r / G];
      const int32_t seen_from = window ? std::clamp<int64_t>(position - window + 1 - first, 0, KEYS) : 0;
      const int32_t seen_to = std::clamp<int64_t>(position + 1 - first, 0, KEYS);
      float *scores_J = &scores_RJ[r * KEYS], largest = largest_R[r], total = 0;
#pragma omp simd reduction(max : largest)
      for (int32_t j = seen_from; j < seen_to; j++) largest = std::max(largest, scores_J[j]);
      const float factor = exponential(largest_R[r] - largest);
#pragma omp simd reduction(+ : total)
      for (int32_t j = 0; j < KEYS; j++) {
        const float weight = exponential(scores_J[j] - largest);
        total += scores_J[j] = j >= seen_from && j < seen_to ? weight : 0;
      }
      totals_R[r] = totals_R[r] * factor + total;
      largest_R[r] = largest;
      for (int64_t v = 0; v < V; v++) out_RV[r * V + v] *= factor;
    }
    accumulate(scores_RJ.data(), v_JV.data(), out_RV.data(), round_up(R, ROWS), KEYS, V);
  }
  for (int64_t r = 0; r < R; r++)
    for (int64_t d = 0; d < D; d++) q_QHD[(r / G * shape.num_heads + r % G) * D + d] = out_RV[r * V + d] / totals_R[r];
}

struct Task {  // queries of some heads that share keys and values
  int64_t sequence, head, num_heads, first, num_queries;
};

// Heads that share keys and values stay together, which finds these in the processor's cache; or not, where there is too little else.
std::vector<Task> share_out(const Shape& shape, const Step& step) {
  const int64_t G = shape.num_heads / shape.num_kv_heads;
  const int64_t together = step.num_sequences * shape.num_kv_heads < 4 * step.num_threads ? 1 : G;
  std::vector<Task> tasks;
  for (int64_t n = 0; n < step.num_sequences; n++) {
    const int64_t start = step.starts_N[n], stop = step.starts_N[n + 1], num_heads = stop - start == 1 ? together : G;
    for (int64_t h = 0; h < shape.num_heads; h += num_heads)
      for (int64_t t = start; t < stop; t += QUERIES) tasks.push_back({n, h, num_heads, t, std::min(QUERIES, stop - t)});
  }
  return tasks;
}
// Of few rows one thread is as fast.
inline int64_t threads_for(int64_t num_tokens, int64_t num_threads) { return num_tokens < 4 ? 1 : num_threads; }

void normalise_rows(const Norm& norm, const float* x_TC, const Rows& out, int64_t num_tokens, int64_t num_threads) {
#pragma omp parallel num_threads(threads_for(num_tokens, num_threads))
  {
    Floats room;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < num_tokens; t++) {
      float* out_C = out.target(t, room);
      normalise(norm, x_TC + t * out.width, out_C, out.width);
      out.write(t, out_C);
    }
  }
}

// silu(gate) x up.
void gate_rows(const float* gate_up_T2F, const Rows& out, int64_t num_tokens, int64_t num_threads) {
#pragma omp parallel num_threads(threads_for(num_tokens, num_threads))
  {
    Floats room;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < num_tokens; t++) {
      const float *gate_F = gate_up_T2F + 2 * t * out.width, *up_F = gate_F + out.width;
      float* out_F = out.target(t, room);
#pragma omp simd
      for (int64_t f = 0; f < out.width; f++) out_F[f] = gate_F[f] / (1 + exponential(-gate_F[f])) * up_F[f];
      out.write(t, out_F);
    }
  }
}

void attend_rows(const Shape& shape, const Step& step, const Block& block, const float* qkv_TAD, const Rows& out) {
  const int64_t T = step.num_tokens, H = shape.num_heads, K = shape.num_kv_heads, D = shape.head_width;
  const bool is_half = shape.number_bytes == 2, is_whole = D % WholeVectors<float>::COLUMNS == 0;
  const auto whole = is_half ? attend_alone<WholeVectors<uint16_t>> : attend_alone<WholeVectors<float>>;
  const auto alone = is_whole ? whole : attend_alone<AnyWidth>;
  const std::vector<Task> tasks = share_out(shape, step);
  Floats heads_THD(T * H * D);
  std::vector<int64_t> sequences_T(T);
  for (int64_t n = 0; n < step.num_sequences; n++)
    std::fill(sequences_T.begin() + step.starts_N[n], sequences_T.begin() + step.starts_N[n + 1], n);
#pragma omp parallel num_threads(step.num_threads)
  {
    Floats room;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) place(shape, step, block, qkv_TAD + t * (H + 2 * K) * D, t, sequences_T[t], &heads_THD[t * H * D]);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++) {
      const Task& task = tasks[i];
      const int64_t* table_M = step.tables_NM + task.sequence * step.num_pages;
      const int64_t offset = task.head / (H / K) * shape.num_slots * D * shape.number_bytes, last = step.positions_T[task.first];
      const Pages keys{shape, table_M, block.keys + offset}, values{shape, table_M, block.values + offset};
      float* q_D = &heads_THD[(task.first * H + task.head) * D];
      if (step.starts_N[task.sequence + 1] - step.starts_N[task.sequence] > 1) {
        attend_tile(keys, values, block.window, step.positions_T + task.first, task.num_queries, q_D);
        continue;
      }
      const int64_t first = block.window ? std::max<int64_t>(0, last - block.window + 1) : 0;
      alone(keys, values, first, last + 1, task.num_heads, room, q_D);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
      const float* heads_HD = &heads_THD[t * H * D];
      if (float* out_HD = out.target(t, room); out_HD != room.data()) std::copy_n(heads_HD, H * D, out_HD);
      out.write(t, heads_HD);
    }
  }
}
}  // namespace

extern "C" {

// Whether products of a kind can be had here.
bool multiplies(int64_t kind) { return kind == CODES || (kind == BFLOAT16 && HAS_BFLOAT16) || (kind == INT8 && HAS_INT8); }

void norm(const Norm* norm, const float* x_TC, float* out_TC, int64_t num_tokens, int64_t width, int64_t num_threads) {
  normalise_rows(*norm, x_TC, Rows(out_TC, width), num_tokens, num_threads);
}

void product(const Product* product, const float* x_TI, float* out_TO, int64_t num_tokens, int64_t num_threads) {
  const int64_t I = product->num_inputs;
  Floats room(num_tokens * I), factors_T(num_tokens);
  const Rows rows(*product, room.data(), factors_T.data());
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t t = 0; t < num_tokens; t++) {
    if (product->kind == CODES) std::copy_n(x_TI + t * I, I, (float*)rows.data + t * I);
    rows.write(t, x_TI + t * I);
  }
  multiply(*product, rows, out_TO, num_tokens, num_threads, false);
}

void attend(const Shape* shape, const Step* step, const Block* block, const float* qkv_TAD, float* out_THD) {
  attend_rows(*shape, *step, *block, qkv_TAD, Rows(out_THD, shape->num_heads * shape->head_width));
}

// Each row over its largest number, which is told too.
void unit(const float* x_TI, float* out_TI, float* largest_T, int64_t num_tokens, int64_t width, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t t = 0; t < num_tokens; t++) {
    const float *x_I = x_TI + t * width, largest = largest_of(x_I, width);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) out_TI[t * width + i] = x_I[i] / largest;
    largest_T[t] = largest;
  }
}

void gate(const float* gate_up_T2F, float* out_TF, int64_t num_tokens, int64_t width, int64_t num_threads) {
  gate_rows(gate_up_T2F, Rows(out_TF, width), num_tokens, num_threads);
}

// All blocks of a stage, all of whose products are of a kind that is here; x_TC is changed.
void run(const Shape* shape, const Step* step, const Block* blocks, int64_t num_blocks, float* x_TC) {
  const int64_t T = step->num_tokens, num_threads = step->num_threads;
  const int64_t most = std::max(blocks->qkv_proj.num_outputs, blocks->gate_up_proj.num_outputs);
  const int64_t widest = std::max({shape->width, blocks->o_proj.num_inputs, blocks->down_proj.num_inputs});
  Floats room(T * widest), factors_T(T), out(T * most);
  float* out_TO = out.data();
  for (const Block* block = blocks; block < blocks + num_blocks; block++) {
    const auto rows_of = [&](const Product& product) { return Rows(product, room.data(), factors_T.data()); };
    normalise_rows(block->input_norm, x_TC, rows_of(block->qkv_proj), T, num_threads);
    multiply(block->qkv_proj, rows_of(block->qkv_proj), out_TO, T, num_threads, false);
    attend_rows(*shape, *step, *block, out_TO, rows_of(block->o_proj));
    multiply(block->o_proj, rows_of(block->o_proj), x_TC, T, num_threads, true);
    normalise_rows(block->mlp_norm, x_TC, rows_of(block->gate_up_proj), T, num_threads);
    multiply(block->gate_up_proj, rows_of(block->gate_up_proj), out_TO, T, num_threads, false);
    gate_rows(out_TO, rows_of(block->down_proj), T, num_threads);
    multiply(block->down_proj, rows_of(block->down_proj), x_TC, T, num_threads, true);
  }
}
}
