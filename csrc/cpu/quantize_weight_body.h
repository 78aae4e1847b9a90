// Linear layers with quantised weights for one instruction set; included by quantize_weight.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "activation_body.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "epilogue_body.h"

namespace lmk {
namespace LMK_NS {
namespace {

// Products of weights of kBits with integers of x, 4 neighbours along the depth to a lane:
//   load, low, high   a register of weights; those in the halves of its bytes, with 4 bits
//   Sum, step         integers; += weights * x, of up to a group
//   value             as float, given the sum of x
#if LMK_BF16_DOT
// vpdpbusd multiplies unsigned by signed bytes.
template <int kBits>
struct Integers {
  using W = __m512i;
  typedef int32_t Sum __attribute__((vector_size(64)));  // many of an __m512i, which may alias, gcc keeps in memory
  static W load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static W low(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
  static W high(W w) { return low(_mm512_srli_epi16(w, 4)); }
  static Sum zero() { return Sum{}; }
  static Sum step(Sum sum, W w, int32_t x) { return Sum(_mm512_dpbusd_epi32(__m512i(sum), w, _mm512_set1_epi32(x))); }
  static Vec<float> value(Sum sum, int32_t x) {
    constexpr int kZero = kBits == 4 ? 8 : 128;
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(__m512i(sum), _mm512_set1_epi32(kZero * x)))};
  }
};
#elif LMK_LANES >= 8
// Products of bytes that are added in pairs of 16 bits, of an unsigned with a signed factor.
#if LMK_LANES == 16
struct IntegerVec {
  using W = __m512i;
  static W load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static W low(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
  static W high(W w) { return low(_mm512_srli_epi16(w, 4)); }
  static W zero() { return _mm512_setzero_si512(); }
  static W broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static W less_128(W w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
  static W magnitude(W w) { return _mm512_abs_epi8(w); }
  static W with_sign(W x, W w) { return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), zero(), x); }
  static W pairs(W w, W x) { return _mm512_maddubs_epi16(w, x); }
  static W add_pairs(W a, W b) { return _mm512_add_epi16(a, b); }
  static W quads(W pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
  static W add(W a, W b) { return _mm512_add_epi32(a, b); }
  static Vec<float> to_float(W w) { return {_mm512_cvtepi32_ps(w)}; }
};
#else
struct IntegerVec {
  using W = __m256i;
  static W load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static W low(W w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
  static W high(W w) { return low(_mm256_srli_epi16(w, 4)); }
  static W zero() { return _mm256_setzero_si256(); }
  static W broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  static W less_128(W w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }
  static W magnitude(W w) { return _mm256_abs_epi8(w); }
  static W with_sign(W x, W w) { return _mm256_sign_epi8(x, w); }
  static W pairs(W w, W x) { return _mm256_maddubs_epi16(w, x); }
  static W add_pairs(W a, W b) { return _mm256_add_epi16(a, b); }
  static W quads(W pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
  static W add(W a, W b) { return _mm256_add_epi32(a, b); }
  static Vec<float> to_float(W w) { return {_mm256_cvtepi32_ps(w)}; }
};
#endif
// With 4 bits, 8 products of at most 15 * 127 fit in a pair: those of a group.
template <int kBits>
struct Integers : IntegerVec {
  using Sum = W;
  static Sum step(Sum sum, W w, int32_t x) { return add_pairs(sum, pairs(w, broadcast(x))); }
  static Vec<float> value(Sum sum, int32_t x) { return to_float(add(quads(sum), broadcast(-8 * x))); }
};
// Two products of at most 128 * 127 fit in a pair where both factors are signed, and the sign of one goes to the other.
template <>
struct Integers<8> : IntegerVec {
  using Sum = W;
  static W load(const uint8_t* p) { return less_128(IntegerVec::load(p)); }
  static Sum step(Sum sum, W w, int32_t x) { return add(sum, quads(pairs(magnitude(w), with_sign(broadcast(x), w)))); }
  static Vec<float> value(Sum sum, int32_t) { return to_float(sum); }
};
#else
template <int kBits>
struct Integers {
  typedef int32_t W __attribute__((vector_size(16)));
  using Sum = W;
  static W load(const uint8_t* p) {
    W w;
    memcpy(&w, p, sizeof(w));
    return w;
  }
  static W low(W w) { return w & 0x0f0f0f0f; }
  static W high(W w) { return (w >> 4) & 0x0f0f0f0f; }
  static Sum zero() { return Sum{}; }
  static Sum step(Sum sum, W w, int32_t x) {
    for (int i = 0; i < 32; i += 8) sum += ((w >> i) & 255) * int32_t(int8_t(x >> i));
    return sum;
  }
  static Vec<float> value(Sum sum, int32_t x) {
    float lanes[4];
    for (int i = 0; i < 4; ++i) lanes[i] = float(sum[i] - (kBits == 4 ? 8 : 128) * x);
    return Vec<float>::load(lanes);
  }
};
#endif

constexpr int kLargestLevel = 127;

// levels (n,) = x (n,) * factor, rounded; n is a multiple of 16.
inline void round_to_levels(const float* x, float factor, int64_t n, int8_t* levels) {
#if LMK_LANES == 16
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(levels + i), _mm512_cvtepi32_epi8(rounded));
  }
#elif LMK_LANES == 8
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(factor)));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(levels + i), _mm_packs_epi16(words, words));
  }
#else
  for (int64_t i = 0; i < n; i += Vec<float>::kLanes) {
    float lanes[Vec<float>::kLanes];
    round_small(Vec<float>::load(x + i) * Vec<float>::set1(factor)).store(lanes);
    for (int l = 0; l < Vec<float>::kLanes; ++l) levels[i + l] = int8_t(lanes[l]);
  }
#endif
}

// n is a multiple of 32
inline int32_t sum_of_levels(const int8_t* levels, int64_t n) {
#if LMK_BF16_DOT
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 32)
    sum =
        _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels + i)));
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  const __m128i quarter = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1)));
#else
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += levels[i];
  return sum;
#endif
}

// What tiles of sums are wide, in panels.
constexpr int kTilePanels = LMK_LANES == 16 ? 2 : 1;
constexpr int kPanelVecs = kPanelCols / LMK_LANES;

inline int64_t quantized_pack_scratch(const QuantizedArgs& a) { return a.padded * int64_t(sizeof(float)); }

// x (padded,) = a row (n,) as float; returns the largest |x|, infinity or NaN if there is one.
template <class E>
float widen_row(const E* row, int64_t n, int64_t padded, float* x) {
  using V = Vec<float>;
  constexpr int64_t kStep = 4 * V::kLanes;  // so that no vector waits for the one before
  V largest[4], nothing[4];
  for (int j = 0; j < 4; ++j) largest[j] = nothing[j] = V::zero();
  int64_t i = 0;
  const auto take = [&](V v, int j) {
    v.store(x + i);
    largest[j] = max(max(v, V::zero() - v), largest[j]);
    nothing[j] = fma(v, V::zero(), nothing[j]);  // NaN where x is not finite
  };
  for (; i + kStep <= n;)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, i += V::kLanes) take(load_vec(row + i), j);
  for (int64_t k = i; k < n; ++k) x[k] = widen(row[k]);
  for (int64_t k = n; k < padded; ++k) x[k] = 0.f;
  for (; i < padded; i += V::kLanes) take(V::load(x + i), 0);
  const V most = max(max(largest[0], largest[1]), max(largest[2], largest[3]));
  return reduce_max(most) + reduce_add((nothing[0] + nothing[1]) + (nothing[2] + nothing[3]));
}

void pack_quantized_x(const QuantizedArgs& a, int64_t row, void* scratch) {
  float* x = static_cast<float*>(scratch);
  const char* src = static_cast<const char*>(a.x) + row * a.x_row * element_size(a.dtype);
  const float most = a.dtype == DType::f32    ? widen_row(reinterpret_cast<const float*>(src), a.depth, a.padded, x)
                     : a.dtype == DType::bf16 ? widen_row(reinterpret_cast<const Bf16*>(src), a.depth, a.padded, x)
                                              : widen_row(reinterpret_cast<const F16*>(src), a.depth, a.padded, x);
  constexpr float kTiny = 1e-33f;  // whose factor is still finite
  const bool finite = most - most == 0.f;
  const float factor = finite ? float(kLargestLevel) / (most > kTiny ? most : kTiny) : 0.f;
  a.x_scales[row] = finite ? 1.f / factor : most - most;
  if (!finite)
    for (int64_t k = 0; k < a.padded; ++k) x[k] = 0.f;
  int8_t* levels = a.levels + row * a.levels_row;
  round_to_levels(x, factor, a.padded, levels);
  for (int64_t k = a.padded; k < a.levels_row; ++k) levels[k] = 0;
  const int64_t group = a.bits == 4 ? kWeightGroup : kByteGroup;
  for (int64_t i = 0, left = a.padded; i < a.groups; ++i, left -= group)
    a.sums[row * a.groups + i] = sum_of_levels(levels + i * group, left < group ? left : group);
}

inline int32_t four_levels(const int8_t* levels) {
  int32_t four;
  memcpy(&four, levels, 4);
  return four;
}

// The scales of a vector of columns.
inline Vec<float> load_scales(const uint16_t* p) { return load_vec(reinterpret_cast<const Bf16*>(p)); }

// Panels that a tile reads: the first of them in place of one that is missing.
template <int kBits, int kPanels>
struct PanelsOfTile {
  int64_t first, have;
  const uint8_t* data[kPanels];
  int64_t ahead;  // from there to what the next tile reads, at most 32 kB per panel on

  PanelsOfTile(const QuantizedArgs& a, int64_t panel, bool last) : first(panel) {
    const int64_t panels = (a.cols + kPanelCols - 1) / kPanelCols, bytes = a.padded * kPanelCols * kBits / 8;
    have = panels - panel < kPanels ? panels - panel : kPanels;
    for (int p = 0; p < kPanels; ++p) data[p] = a.data + number(p) * bytes;
    constexpr int64_t kFarthest = 32 * 1024;
    ahead = bytes * kPanels < kFarthest ? bytes * kPanels : kFarthest;
    if (last && a.next.data) ahead = a.next.data - reinterpret_cast<const char*>(data[0]);
  }
  int64_t number(int p) const { return first + (p < have ? p : 0); }
};

// product[row][:] = x[row] * bytes of kPanels panels, of which the last may be missing. fetch: what is read later.
template <int kRows, int kPanels>
[[gnu::noinline]] void byte_tile(const QuantizedArgs& a, int64_t row, int64_t panel, bool fetch, bool last,
                                 float* product, int64_t product_row) {
  using V = Vec<float>;
  using I = Integers<8>;
  constexpr int kVecs = kPanels * kPanelVecs;
  constexpr int64_t kStepBytes = kPanelCols * 4, kSteps = kByteGroup / 4;
  PanelsOfTile<8, kPanels> w(a, panel, last);
  const int64_t ld = a.levels_row;
  const int8_t* levels = a.levels + row * ld;
  for (int64_t group = 0, left = a.padded / 4; group < a.groups; ++group, left -= kSteps) {
    typename I::Sum sum[kRows][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[r][v] = I::zero();
    for (int64_t i = left < kSteps ? left : kSteps; i > 0; --i) {
      typename I::W weights[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const uint8_t* p = w.data[v / kPanelVecs] + v % kPanelVecs * LMK_LANES * 4;
        if (fetch && v % kPanelVecs == 0) fetch_to_l2(p + w.ahead);
        weights[v] = I::load(p);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const int32_t x = four_levels(levels + r * ld);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sum[r][v] = I::step(sum[r][v], weights[v], x);
      }
      levels += 4;
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) w.data[p] += kStepBytes;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const V scale = V::load(static_cast<const float*>(a.scales) + w.number(v / kPanelVecs) * kPanelCols +
                              v % kPanelVecs * LMK_LANES);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float* dst = product + r * product_row + v * LMK_LANES;
        V y = I::value(sum[r][v], a.sums[(row + r) * a.groups + group]);
        if (group > 0) y = V::load(dst) + y;
        if (group + 1 == a.groups) y = y * V::set1(a.x_scales[row + r]) * scale;
        y.store(dst);
      }
    }
  }
}

// The same with 4 bits.
template <int kRows, int kPanels>
[[gnu::noinline]] void nibble_tile(const QuantizedArgs& a, int64_t row, int64_t panel, bool fetch, bool last,
                                   float* product, int64_t product_row) {
  using V = Vec<float>;
  using I = Integers<4>;
  constexpr int kVecs = kPanels * kPanelVecs;
  constexpr int64_t kStepBytes = kPanelCols * 4, kGroupSteps = kWeightGroup / 4;
  PanelsOfTile<4, kPanels> w(a, panel, last);
  const int64_t ld = a.levels_row;
  const int8_t* levels = a.levels + row * ld;
  const int32_t* sums = a.sums + row * a.groups;
  V total[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) total[r][v] = V::zero();
  for (int64_t group = 0; group < a.groups; ++group) {
    typename I::Sum sum[kRows][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[r][v] = I::zero();
    for (int i = 0; i < kGroupSteps / 2; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const uint8_t* p = w.data[v / kPanelVecs] + v % kPanelVecs * LMK_LANES * 4;
        if (fetch && v % kPanelVecs == 0) fetch_to_l2(p + w.ahead);
        const typename I::W weights = I::load(p), low = I::low(weights), high = I::high(weights);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          sum[r][v] = I::step(sum[r][v], low, four_levels(levels + r * ld));
          sum[r][v] = I::step(sum[r][v], high, four_levels(levels + r * ld + kWeightGroup / 2));
        }
      }
      levels += 4;
      for (int p = 0; p < kPanels; ++p) w.data[p] += kStepBytes;
    }
    levels += kWeightGroup / 2;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = w.number(v / kPanelVecs) * a.groups + group;
      const V scale =
          load_scales(static_cast<const uint16_t*>(a.scales) + at * kPanelCols + v % kPanelVecs * LMK_LANES);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
        total[r][v] = fma(I::value(sum[r][v], sums[r * a.groups + group]), scale, total[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      (total[r][v] * V::set1(a.x_scales[row + r])).store(product + r * product_row + v * LMK_LANES);
}

using QuantizedTile = void (*)(const QuantizedArgs& a, int64_t row, int64_t panel, bool fetch, bool last,
                               float* product, int64_t product_row);

// Tiles by their rows: of bytes as many as there are registers for, of 4 bits as many whose sums of a group have
// registers too.
constexpr QuantizedTile kByteTiles[] = {
    byte_tile<1, kTilePanels>, byte_tile<2, kTilePanels>,
#if LMK_LANES == 16
    byte_tile<3, kTilePanels>, byte_tile<4, kTilePanels>,
#endif
#if LMK_BF16_DOT
    byte_tile<5, kTilePanels>, byte_tile<6, kTilePanels>,  byte_tile<7, kTilePanels>,  byte_tile<8, kTilePanels>,
    byte_tile<9, kTilePanels>, byte_tile<10, kTilePanels>, byte_tile<11, kTilePanels>, byte_tile<12, kTilePanels>,
#endif
};
constexpr QuantizedTile kNibbleTiles[] = {
    nibble_tile<1, kTilePanels>,
    nibble_tile<2, kTilePanels>,
#if LMK_LANES == 16
    nibble_tile<3, kTilePanels>,
    nibble_tile<4, kTilePanels>,
#endif
};
// Few rows take a panel at a time, in the order of memory.
constexpr int64_t kRowsInOrder = 4;
constexpr QuantizedTile kByteTilesInOrder[] = {byte_tile<1, 1>, byte_tile<2, 1>, byte_tile<3, 1>, byte_tile<4, 1>};
constexpr QuantizedTile kNibbleTilesInOrder[] = {
    nibble_tile<1, 1>,
    nibble_tile<2, 1>,
#if LMK_LANES == 16
    nibble_tile<3, 1>,
    nibble_tile<4, 1>,
#endif
};

// product (rows, cols) = x times the panels of a task, in as few tiles of kPanels as can be, of rows as even.
template <int kPanels, int64_t kMost>
void quantized_rows(const QuantizedTile (&tile_of)[kMost], const QuantizedArgs& a, int64_t row, int64_t rows,
                    int64_t panel, int64_t cols, float* product, int64_t product_row) {
  const int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t p = 0; p * kPanelCols < cols; p += kPanels)
    for (int64_t i = 0, r = 0; i < tiles; ++i) {
      const int64_t have = (rows - r + tiles - i - 1) / (tiles - i);
      const bool last = (p + kPanels) * kPanelCols >= cols;
      tile_of[have - 1](a, row + r, panel + p, i == 0, last, product + r * product_row + p * kPanelCols, product_row);
      r += have;
    }
}

inline int64_t product_cols(const QuantizedArgs& a) { return round_up(a.panels_per_task, kTilePanels) * kPanelCols; }

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#if LMK_TILES
#include "quantize_weight_tiles_body.h"
#endif

namespace lmk {
namespace LMK_NS {
namespace {

inline int64_t quantized_scratch(const QuantizedArgs& a) {
#if LMK_TILES
  if (goes_by_tiles(a) && a.bits == 8) return 0;
  if (goes_by_tiles(a)) return product_cols(a) * (kTileSide * int64_t(sizeof(float)) + a.padded);
#endif
  return a.rows_per_task * product_cols(a) * int64_t(sizeof(float));
}

void run_quantized(const QuantizedArgs& a, int64_t task, void* scratch) {
  const int64_t row_blocks = (a.rows + a.rows_per_task - 1) / a.rows_per_task;
  const int64_t row = task % row_blocks * a.rows_per_task, panel = task / row_blocks * a.panels_per_task;
  const int64_t rows = a.rows - row < a.rows_per_task ? a.rows - row : a.rows_per_task;
  const int64_t col = panel * kPanelCols, most = a.panels_per_task * kPanelCols;
  const int64_t cols = a.cols - col < most ? a.cols - col : most, ld = product_cols(a);
#if LMK_TILES
  if (goes_by_tiles(a) && a.bits == 8) return run_byte_tiles(a, row, rows, col, cols);
  if (goes_by_tiles(a)) return run_group_tiles(a, row, rows, col, cols, scratch);
#endif
  float* product = static_cast<float*>(scratch);
  int64_t p = 0;
  if (rows == 1 && a.streams && a.bits == 8)  // with 4 bits it gains nothing: panels are short, and have scales
    for (; (p + kStreams) * kPanelCols <= cols; p += kStreams)
      byte_tile<1, kStreams>(a, row, panel + p, false, false, product + p * kPanelCols, ld);
  const auto rows_by = [&](auto panels, const auto& tile_of) {
    quantized_rows<panels>(tile_of, a, row, rows, panel + p, cols - p * kPanelCols, product + p * kPanelCols, ld);
  };
  using One = std::integral_constant<int, 1>;
  using Several = std::integral_constant<int, kTilePanels>;
  if (rows <= kRowsInOrder && !a.streams)
    a.bits == 4 ? rows_by(One(), kNibbleTilesInOrder) : rows_by(One(), kByteTilesInOrder);
  else
    a.bits == 4 ? rows_by(Several(), kNibbleTiles) : rows_by(Several(), kByteTiles);
  for (int64_t r = 0; r < rows; ++r) finish_row(a.epilogue, row + r, col, cols, product + r * ld);
}

#if LMK_TILES
constexpr int64_t kMostRows = 512, kWidePanels = 24;
#else
constexpr int64_t kMostRows = 96, kWidePanels = 8;
#endif

constexpr QuantizedKernels kQuantized[] = {
    {kTilePanels, kMostRows, kWidePanels, quantized_pack_scratch, pack_quantized_x, quantized_scratch, run_quantized}};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
