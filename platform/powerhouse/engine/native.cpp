// What torch has no kernel for in a decoding step on a CPU, in float32: it is compiled where it runs, by engine/native.py.
//
// Shapes: T tokens, one for each request; C model width, H query and K key/value heads of width D, I and O a product's width in
// and out, F width between gate and down, N slots of a head's pages, P slots in a page, M pages of the longest context.
// Loops that must become vectors say so: a sum in any order is allowed there and nowhere else.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

extern "C" {

struct Product {  // weights of about codes x scales
  const int8_t* codes_OI;
  const float* scales_O;
  const float* bias_O;  // or null
  int64_t num_inputs, num_outputs;
  int64_t levels;  // a row of inputs is rounded to that many steps on both sides of 0, by its largest
};

struct Norm {
  const float* weight;
  float eps;
};

struct Block {
  Norm input_norm, mlp_norm;
  Norm q_norm, k_norm;  // null weights: none
  Product qkv_proj, o_proj, gate_up_proj, down_proj;
  float *k_KND, *v_KND;
  int64_t window;  // 0: none
};

struct Shape {
  int64_t width, num_heads, num_kv_heads, head_width, num_slots, page_size;
  const float *cos_SD, *sin_SD;  // by position; of the first half minus the sine
};

struct Step {
  int64_t num_tokens, num_pages;
  const int64_t *positions_T, *tables_TM;
  int64_t num_threads;
};
}

namespace {

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

// The sum is of 32 bits: num_inputs x levels x the largest code are below 2^31.
void multiply(const Product& product, const float* x_TI, float* out_TO, int64_t num_tokens, int64_t num_threads, bool adds) {
  const int64_t I = product.num_inputs, O = product.num_outputs;
  std::vector<int16_t> rounded_TI(num_tokens * I);
  std::vector<float> steps_T(num_tokens);
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
    const int8_t* codes_I = product.codes_OI + o * I;
    for (int64_t t = 0; t < num_tokens; t++) {
      const int16_t* rounded_I = &rounded_TI[t * I];
      int32_t sum = 0;
      for (int64_t i = 0; i < I; i++) sum += rounded_I[i] * (int16_t)codes_I[i];
      float& out = out_TO[t * O + o];
      out = sum * product.scales_O[o] * steps_T[t] + (product.bias_O ? product.bias_O[o] : 0) + (adds ? out : 0);
    }
  }
}

// Queries turn where they are; keys turn and go into their pages with the values.
void place(const Shape& shape, const Step& step, const Block& block, float* qkv_TAD, int64_t t) {
  const int64_t D = shape.head_width, position = step.positions_T[t];
  const int64_t page = step.tables_TM[t * step.num_pages + position / shape.page_size];
  const int64_t slot = page * shape.page_size + position % shape.page_size;
  const float *cos_D = shape.cos_SD + position * D, *sin_D = shape.sin_SD + position * D;
  float* x_AD = qkv_TAD + t * (shape.num_heads + 2 * shape.num_kv_heads) * D;
  std::vector<float> before_D(D);
  for (int64_t a = 0; a < shape.num_heads + shape.num_kv_heads; a++, x_AD += D) {
    const bool is_query = a < shape.num_heads;
    const Norm& norm = is_query ? block.q_norm : block.k_norm;
    if (norm.weight)
      normalise(norm, x_AD, before_D.data(), D);
    else
      std::copy_n(x_AD, D, before_D.data());
    float* out_D = is_query ? x_AD : block.k_KND + ((a - shape.num_heads) * shape.num_slots + slot) * D;
    for (int64_t d = 0; d < D; d++) out_D[d] = before_D[d] * cos_D[d] + before_D[(d + D / 2) % D] * sin_D[d];
  }
  for (int64_t k = 0; k < shape.num_kv_heads; k++, x_AD += D) std::copy_n(x_AD, D, block.v_KND + (k * shape.num_slots + slot) * D);
}

// Calls visit(i, x) for the i-th key or value, at x, of those that a head of one request sees.
template <typename Visit>
inline void each(const Shape& shape, const Step& step, const float* x_KND, int64_t t, int64_t h, int64_t first, Visit visit) {
  const int64_t D = shape.head_width, P = shape.page_size, last = step.positions_T[t];
  const float* x_ND = x_KND + h / (shape.num_heads / shape.num_kv_heads) * shape.num_slots * D;
  for (int64_t m = first / P; m <= last / P; m++) {
    const int64_t* page = step.tables_TM + t * step.num_pages + m;
    const float *x_PD = x_ND + page[0] * P * D, *next_PD = x_ND + page[m < last / P] * P * D;
    const int64_t stop = std::min(P, last + 1 - m * P);
    for (int64_t p = std::max<int64_t>(0, first - m * P); p < stop; p++) {
      for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(next_PD + p * D + d);  // pages lie anywhere
      visit(m * P + p - first, x_PD + p * D);
    }
  }
}

// softmax(q K^T / sqrt(D)) V over the pages of one request, for one head; sums of a width known to the compiler stay in registers.
template <int64_t WIDTH>
void attend_head(const Shape& shape, const Step& step, const Block& block, const float* q_D, int64_t t, int64_t h, float* out_D) {
  const int64_t D = WIDTH ? WIDTH : shape.head_width, last = step.positions_T[t];
  const int64_t first = block.window ? std::max<int64_t>(0, last - block.window + 1) : 0;
  const float scale = 1 / std::sqrt((float)D);
  std::vector<float> weights(last - first + 1), sums(WIDTH ? 0 : D);
  float largest = -std::numeric_limits<float>::infinity(), total = 0;
  each(shape, step, block.k_KND, t, h, first, [&](int64_t i, const float* k_D) {
    weights[i] = dot(q_D, k_D, D) * scale;
    largest = std::max(largest, weights[i]);
  });
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i <= last - first; i++) total += weights[i] = exponential(weights[i] - largest);
  float registers[WIDTH ? WIDTH : 1] = {};
  float* sums_D = WIDTH ? registers : sums.data();
  each(shape, step, block.v_KND, t, h, first, [&](int64_t i, const float* v_D) {
#pragma omp simd
    for (int64_t d = 0; d < D; d++) sums_D[d] += weights[i] * v_D[d];
  });
  for (int64_t d = 0; d < D; d++) out_D[d] = sums_D[d] / total;
}
}  // namespace

extern "C" {

void norm(const Norm* norm, const float* x_TC, float* out_TC, int64_t num_tokens, int64_t width) {
  for (int64_t t = 0; t < num_tokens; t++) normalise(*norm, x_TC + t * width, out_TC + t * width, width);
}

void product(const Product* product, const float* x_TI, float* out_TO, int64_t num_tokens, int64_t num_threads) {
  multiply(*product, x_TI, out_TO, num_tokens, num_threads, false);
}

// Changes queries where they are.
void attend(const Shape* shape, const Step* step, const Block* block, float* qkv_TAD, float* out_THD) {
  const int64_t T = step->num_tokens, H = shape->num_heads, D = shape->head_width, A = H + 2 * shape->num_kv_heads;
  const auto attend_one = D == 64 ? attend_head<64> : D == 128 ? attend_head<128> : attend_head<0>;
#pragma omp parallel num_threads(step->num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) place(*shape, *step, *block, qkv_TAD, t);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < T * H; i++) attend_one(*shape, *step, *block, qkv_TAD + (i / H * A + i % H) * D, i / H, i % H, out_THD + i * D);
  }
}

// Each row over its largest number, which is told too.
void unit(const float* x_TI, float* out_TI, float* largest_T, int64_t num_tokens, int64_t width) {
  for (int64_t t = 0; t < num_tokens; t++) {
    const float *x_I = x_TI + t * width, largest = largest_of(x_I, width);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) out_TI[t * width + i] = x_I[i] / largest;
    largest_T[t] = largest;
  }
}

// silu(gate) x up.
void gate(const float* gate_up_T2F, float* out_TF, int64_t num_tokens, int64_t width, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t t = 0; t < num_tokens; t++) {
    const float *gate_F = gate_up_T2F + 2 * t * width, *up_F = gate_F + width;
#pragma omp simd
    for (int64_t f = 0; f < width; f++) out_TF[t * width + f] = gate_F[f] / (1 + exponential(-gate_F[f])) * up_F[f];
  }
}

// All blocks of a stage, all of whose products are of codes; x_TC is changed.
void decode(const Shape* shape, const Step* step, const Block* blocks, int64_t num_blocks, float* x_TC) {
  const int64_t T = step->num_tokens, C = shape->width, num_threads = step->num_threads;
  const int64_t most = std::max(blocks->qkv_proj.num_outputs, blocks->gate_up_proj.num_outputs);
  const int64_t widest = std::max({C, blocks->o_proj.num_inputs, blocks->down_proj.num_inputs});
  std::vector<float> in(T * widest), out(T * most);
  for (const Block* block = blocks; block < blocks + num_blocks; block++) {
    norm(&block->input_norm, x_TC, in.data(), T, C);
    multiply(block->qkv_proj, in.data(), out.data(), T, num_threads, false);
    attend(shape, step, block, out.data(), in.data());
    multiply(block->o_proj, in.data(), x_TC, T, num_threads, true);
    norm(&block->mlp_norm, x_TC, in.data(), T, C);
    multiply(block->gate_up_proj, in.data(), out.data(), T, num_threads, false);
    gate(out.data(), in.data(), T, block->down_proj.num_inputs, num_threads);
    multiply(block->down_proj, in.data(), x_TC, T, num_threads, true);
  }
}
}
