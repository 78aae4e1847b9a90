// Linear layers with quantised weights for one instruction set; included by quantize_weight.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "activation_body.h"
#include "gemm.h"
#include "rows.h"
#include "epilogue_body.h"

namespace lmk {
namespace LMK_NS {
namespace {

// A register of weights, 4 bytes to a column; two words are 4 integers of x, in the order that `step` wants:
//   load, low, high     weights; the halves of their bytes
//   pack                the two words
//   Sum, start, step    integers; from starts[2]; += weights * x
//   value               as float, exact below 2^24
#if LMK_BF16_DOT
// vpdpbusd multiplies unsigned by signed bytes: x = 256 high + low, both signed, in a word and a sum each.
struct Integers {
  using W = __m512i;
  struct Sum {
    __m512i high, low;
  };
  static constexpr int kLargest = 127 * 256 + 127;
  static W load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static W low(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
  static W high(W w) { return low(_mm512_srli_epi16(w, 4)); }
  static Sum start(const int32_t* s) { return {_mm512_set1_epi32(s[0]), _mm512_set1_epi32(s[1])}; }
  static void step(Sum& sum, W w, const uint32_t* x) {
    sum.high = _mm512_dpbusd_epi32(sum.high, w, _mm512_set1_epi32(int(x[0])));
    sum.low = _mm512_dpbusd_epi32(sum.low, w, _mm512_set1_epi32(int(x[1])));
  }
  static Vec<float> value(Sum sum) {
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low))};
  }
  // x (32,) to words (8, 2) and to -zero times the sums of both parts, added to starts[2]
  static void pack(const float* x, float factor, int zero, uint32_t* words, int32_t* starts) {
    __m512i highs = _mm512_setzero_si512(), lows = highs;
    for (int i = 0; i < 32; i += 16) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
      const __m128i low_bytes = _mm512_cvtepi32_epi8(v);
      const __m512i low = _mm512_cvtepi8_epi32(low_bytes);
      const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(v, low), 8);
      const __m128i high_bytes = _mm512_cvtepi32_epi8(high);
      highs = _mm512_add_epi32(highs, high), lows = _mm512_add_epi32(lows, low);
      __m128i* dst = reinterpret_cast<__m128i*>(words + i / 2);
      _mm_storeu_si128(dst, _mm_unpacklo_epi32(high_bytes, low_bytes));
      _mm_storeu_si128(dst + 1, _mm_unpackhi_epi32(high_bytes, low_bytes));
    }
    starts[0] -= zero * _mm512_reduce_add_epi32(highs);
    starts[1] -= zero * _mm512_reduce_add_epi32(lows);
  }
};
#else
// Products of 16-bit integers: a word holds elements 0 and 2 of the four, the other 1 and 3, as the even and the odd
// bytes of the weights stand. Sums wrap, and the last one fits.
#if LMK_LANES == 16
struct IntegerVec {
  using W = __m512i;
  static W load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static W broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static W low(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
  static W high(W w) { return low(_mm512_srli_epi16(w, 4)); }
  static W products(W w, uint32_t even, uint32_t odd) {
    const W evens = _mm512_and_si512(w, _mm512_set1_epi16(255)), odds = _mm512_srli_epi16(w, 8);
    return add(_mm512_madd_epi16(evens, broadcast(int(even))), _mm512_madd_epi16(odds, broadcast(int(odd))));
  }
  static W add(W a, W b) { return _mm512_add_epi32(a, b); }
  static Vec<float> value(W w) { return {_mm512_cvtepi32_ps(w)}; }
};
#elif LMK_LANES == 8
struct IntegerVec {
  using W = __m256i;
  static W load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static W broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  static W low(W w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
  static W high(W w) { return low(_mm256_srli_epi16(w, 4)); }
  static W products(W w, uint32_t even, uint32_t odd) {
    const W evens = _mm256_and_si256(w, _mm256_set1_epi16(255)), odds = _mm256_srli_epi16(w, 8);
    return add(_mm256_madd_epi16(evens, broadcast(int(even))), _mm256_madd_epi16(odds, broadcast(int(odd))));
  }
  static W add(W a, W b) { return _mm256_add_epi32(a, b); }
  static Vec<float> value(W w) { return {_mm256_cvtepi32_ps(w)}; }
};
#else
struct IntegerVec {
  typedef uint32_t W __attribute__((vector_size(16)));
  static W load(const uint8_t* p) {
    W w;
    memcpy(&w, p, sizeof(w));
    return w;
  }
  static W broadcast(int32_t x) { return W{} + uint32_t(x); }
  static W low(W w) { return w & 0x0f0f0f0fu; }
  static W high(W w) { return (w >> 4) & 0x0f0f0f0fu; }
  static uint32_t half(uint32_t x, int i) { return uint32_t(int32_t(int16_t(x >> (16 * i)))); }
  static W products(W w, uint32_t even, uint32_t odd) {
    return (w & 255u) * half(even, 0) + (w >> 16 & 255u) * half(even, 1) + (w >> 8 & 255u) * half(odd, 0) +
           (w >> 24) * half(odd, 1);
  }
  static W add(W a, W b) { return a + b; }
  static Vec<float> value(W w) {
    float lanes[4];
    for (int i = 0; i < 4; ++i) lanes[i] = float(int32_t(w[i]));
    return Vec<float>::load(lanes);
  }
};
#endif
struct Integers : IntegerVec {
  struct Sum {
    W v;
  };
  static constexpr int kLargest = 127 * 256 + 127;
  static Sum start(const int32_t* s) { return {broadcast(s[0])}; }
  static void step(Sum& sum, W w, const uint32_t* x) { sum.v = add(sum.v, products(w, x[0], x[1])); }
  static Vec<float> value(Sum sum) { return IntegerVec::value(sum.v); }
  static void pack(const float* x, float factor, int zero, uint32_t* words, int32_t* starts) {
    int32_t v[32], sum = 0;
    for (int i = 0; i < 32; i += Vec<float>::kLanes) {
      float lanes[Vec<float>::kLanes];
      const Vec<float> rounded = round_small(Vec<float>::load(x + i) * Vec<float>::set1(factor));
      rounded.store(lanes);
      for (int l = 0; l < Vec<float>::kLanes; ++l) v[i + l] = int32_t(lanes[l]);
    }
    for (int i = 0; i < 32; ++i) sum += v[i];
    for (int i = 0; i < 8; ++i) {
      words[2 * i] = uint32_t(v[4 * i] & 0xffff) | uint32_t(v[4 * i + 2]) << 16;
      words[2 * i + 1] = uint32_t(v[4 * i + 1] & 0xffff) | uint32_t(v[4 * i + 3]) << 16;
    }
    starts[0] -= zero * sum;
  }
};
#endif

#if LMK_LANES == 16
constexpr int kTileOfRows = 4, kTilePanels = 2;
#else
constexpr int kTileOfRows = 2, kTilePanels = 1;
#endif
constexpr int kPanelVecs = kPanelCols / LMK_LANES;

inline int64_t quantized_pack_scratch(const QuantizedArgs& a) { return a.padded * int64_t(sizeof(float)); }

void pack_quantized_x(const QuantizedArgs& a, int64_t row, void* scratch) {
  using V = Vec<float>;
  float* x = static_cast<float*>(scratch);
  load_row(a.dtype, static_cast<const char*>(a.x) + row * a.x_row * element_size(a.dtype), a.depth, x);
  for (int64_t k = a.depth; k < a.padded; ++k) x[k] = 0.f;
  V largest = V::zero(), nothing = V::zero();
  for (int64_t k = 0; k < a.padded; k += V::kLanes) {
    const V v = V::load(x + k);
    largest = max(max(v, V::zero() - v), largest);
    nothing = fma(v, V::zero(), nothing);  // NaN where x is not finite
  }
  const float most = reduce_max(largest), none = reduce_add(nothing);
  constexpr float kTiny = 1e-33f;  // whose factor is still finite
  const bool finite = none == 0.f;
  const float factor = finite ? float(Integers::kLargest) / (most > kTiny ? most : kTiny) : 0.f;
  a.x_scales[row] = finite ? 1.f / factor : none;
  if (!finite)
    for (int64_t k = 0; k < a.padded; ++k) x[k] = 0.f;
  uint32_t* words = a.words + row * a.padded / 2;
  int32_t* starts = a.starts + row * a.groups * 2;
  const int64_t group = a.bits == 4 ? kWeightGroup : kByteGroup;
  for (int64_t i = 0; i < a.groups * 2; ++i) starts[i] = 0;
  for (int64_t k = 0; k < a.padded; k += kWeightGroup)
    Integers::pack(x + k, factor, a.bits == 4 ? 8 : 128, words + k / 2, starts + k / group * 2);
}

// The scales of a vector of columns.
inline Vec<float> load_scales(const float* p) { return Vec<float>::load(p); }
inline Vec<float> load_scales(const uint16_t* p) {
  float lanes[LMK_LANES];
  load_row(DType::bf16, p, LMK_LANES, lanes);
  return Vec<float>::load(lanes);
}

// product[row][:] = x[row] * weights of kPanels panels, of which the last may be missing. fetch: what is read later.
template <int kBits, int kRows, int kPanels>
[[gnu::noinline]] void quantized_tile(const QuantizedArgs& a, int64_t row, int64_t panel, bool fetch, bool last,
                                      float* product, int64_t product_row) {
  using V = Vec<float>;
  constexpr int kVecs = kPanels * kPanelVecs;
  constexpr int64_t kStepBytes = kPanelCols * 4, kGroupSteps = kWeightGroup / 4;
  const int64_t panels = (a.cols + kPanelCols - 1) / kPanelCols;
  const int64_t panel_bytes = a.padded * kPanelCols * kBits / 8;
  const uint8_t* data[kPanels];
  for (int p = 0; p < kPanels; ++p) data[p] = a.data + (panel + p < panels ? panel + p : panel) * panel_bytes;
  const auto scales_of = [&](int p, int64_t group) {
    const int64_t at = panel + p < panels ? panel + p : panel;
    if constexpr (kBits == 4)
      return static_cast<const uint16_t*>(a.scales) + (at * a.groups + group) * kPanelCols;
    else
      return static_cast<const float*>(a.scales) + at * kPanelCols;
  };
  // what the next tile reads, at most 32 kB per panel on
  constexpr int64_t kFarthest = 32 * 1024;
  int64_t ahead = panel_bytes * kPanels < kFarthest ? panel_bytes * kPanels : kFarthest;
  if (last && a.next.data) ahead = a.next.data - reinterpret_cast<const char*>(data[0]);
  const uint32_t* words = a.words + row * a.padded / 2;
  const int32_t* starts = a.starts + row * a.groups * 2;
  const int64_t words_row = a.padded / 2, starts_row = a.groups * 2;
  V total[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) total[r][v] = V::zero();
  int64_t left = a.padded / 4;  // steps
  for (int64_t group = 0; group < a.groups; ++group) {
    Integers::Sum sum[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[r][v] = Integers::start(starts + r * starts_row);
    if constexpr (kBits == 4) {
      for (int i = 0; i < kGroupSteps / 2; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const uint8_t* p = data[v / kPanelVecs] + v % kPanelVecs * LMK_LANES * 4;
          if (fetch && v % kPanelVecs == 0) fetch_to_l2(p + ahead);
          const Integers::W w = Integers::load(p), low = Integers::low(w), high = Integers::high(w);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            Integers::step(sum[r][v], low, words + r * words_row);
            Integers::step(sum[r][v], high, words + r * words_row + kGroupSteps);
          }
        }
        words += 2;
        for (int p = 0; p < kPanels; ++p) data[p] += kStepBytes;
      }
      words += kGroupSteps;
    } else {
      constexpr int64_t kSteps = kByteGroup / 4;
      const int64_t steps = left < kSteps ? left : kSteps;
      left -= steps;
      for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const uint8_t* p = data[v / kPanelVecs] + v % kPanelVecs * LMK_LANES * 4;
          if (fetch && v % kPanelVecs == 0) fetch_to_l2(p + ahead);
          const Integers::W w = Integers::load(p);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) Integers::step(sum[r][v], w, words + r * words_row);
        }
        words += 2;
        for (int p = 0; p < kPanels; ++p) data[p] += kStepBytes;
      }
    }
    starts += 2;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      V scale = V::set1(1.f);
      if constexpr (kBits == 4) scale = load_scales(scales_of(v / kPanelVecs, group) + v % kPanelVecs * LMK_LANES);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        if constexpr (kBits == 4)
          total[r][v] = fma(Integers::value(sum[r][v]), scale, total[r][v]);
        else
          total[r][v] = total[r][v] + Integers::value(sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      V y = total[r][v] * V::set1(a.x_scales[row + r]);
      if constexpr (kBits == 8) y = y * load_scales(scales_of(v / kPanelVecs, 0) + v % kPanelVecs * LMK_LANES);
      y.store(product + r * product_row + v * LMK_LANES);
    }
}

template <int kBits>
void quantized_rows(const QuantizedArgs& a, int64_t rows, int64_t row, int64_t panel, bool fetch, bool last,
                    float* product, int64_t product_row) {
  switch (rows) {
    case 1:
      return quantized_tile<kBits, 1, kTilePanels>(a, row, panel, fetch, last, product, product_row);
    case 2:
      return quantized_tile<kBits, 2, kTilePanels>(a, row, panel, fetch, last, product, product_row);
#if LMK_LANES == 16
    case 3:
      return quantized_tile<kBits, 3, kTilePanels>(a, row, panel, fetch, last, product, product_row);
    case 4:
      return quantized_tile<kBits, 4, kTilePanels>(a, row, panel, fetch, last, product, product_row);
#endif
  }
}

inline int64_t product_cols(const QuantizedArgs& a) { return round_up(a.panels_per_task, kTilePanels) * kPanelCols; }

inline int64_t quantized_scratch(const QuantizedArgs& a) {
  return a.rows_per_task * product_cols(a) * int64_t(sizeof(float));
}

void run_quantized(const QuantizedArgs& a, int64_t task, void* scratch) {
  const int64_t row_blocks = (a.rows + a.rows_per_task - 1) / a.rows_per_task;
  const int64_t row = task % row_blocks * a.rows_per_task, panel = task / row_blocks * a.panels_per_task;
  const int64_t rows = a.rows - row < a.rows_per_task ? a.rows - row : a.rows_per_task;
  const int64_t col = panel * kPanelCols, most = a.panels_per_task * kPanelCols;
  const int64_t cols = a.cols - col < most ? a.cols - col : most, ld = product_cols(a);
  const int64_t tiles = (rows + kTileOfRows - 1) / kTileOfRows;
  float* product = static_cast<float*>(scratch);
  int64_t p = 0;
  if (rows == 1 && a.streams && a.bits == 8)  // with 4 bits it gains nothing: panels are short, and have scales
    for (; (p + kStreams) * kPanelCols <= cols; p += kStreams)
      quantized_tile<8, 1, kStreams>(a, row, panel + p, false, false, product + p * kPanelCols, ld);
  for (; p * kPanelCols < cols; p += kTilePanels)
    for (int64_t i = 0, r = 0; i < tiles; ++i) {
      const int64_t have = (rows - r + tiles - i - 1) / (tiles - i);
      float* dst = product + r * ld + p * kPanelCols;
      const bool last = (p + kTilePanels) * kPanelCols >= cols;
      if (a.bits == 4)
        quantized_rows<4>(a, have, row + r, panel + p, i == 0, last, dst, ld);
      else
        quantized_rows<8>(a, have, row + r, panel + p, i == 0, last, dst, ld);
      r += have;
    }
  for (int64_t r = 0; r < rows; ++r) finish_row(a.epilogue, row + r, col, cols, product + r * ld);
}

constexpr QuantizedKernels kQuantized[] = {
    {kTilePanels, quantized_pack_scratch, pack_quantized_x, quantized_scratch, run_quantized}};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
