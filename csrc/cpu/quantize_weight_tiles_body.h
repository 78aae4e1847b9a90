// Quantised weights on many rows by AMX's tiles. Included by quantize_weight_body.h.

namespace lmk {
namespace LMK_NS {
namespace {

// More rows than these are multiplied in tiles, with the same bits.
constexpr int64_t kFewLevels = 16;
constexpr int64_t kTileBytes = 1024, kTileDepth = 64;

inline bool goes_by_tiles(const QuantizedArgs& a) { return a.rows > kFewLevels && (a.bits == 4 || a.groups == 1); }

// Two by two tiles of sums, of which any may be empty.
struct TileBlock {
  int64_t row, rows = 0, col, cols;
  alignas(64) int32_t sums[2 * kTileSide][2 * kTileSide];
};

inline Vec<float> value_in_block(const QuantizedArgs& a, const TileBlock& b, int64_t r, int half, Vec<float> scale) {
  const Vec<float> value =
      Integers<8>::value(Integers<8>::Sum(_mm512_load_si512(b.sums[r] + half * kTileSide)), a.sums[b.row + r]);
  return value * Vec<float>::set1(a.x_scales[b.row + r]) * scale;
}

inline Vec<float> block_scales(const QuantizedArgs& a, const TileBlock& b, int half) {
  return Vec<float>::load(static_cast<const float*>(a.scales) + b.col +
                          (half * kPanelCols < b.cols ? half * kPanelCols : 0));
}

// Rows [first, last) of a block, from sums to the result.
void finish_block(const QuantizedArgs& a, const TileBlock& b, int64_t first, int64_t last) {
  const Vec<float> scale[2] = {block_scales(a, b, 0), block_scales(a, b, 1)};
  for (int64_t r = first; r < last; ++r) {
    float product[2 * kTileSide];
    for (int i = 0; i < 2; ++i) value_in_block(a, b, r, i, scale[i]).store(product + i * kTileSide);
    finish_row(a.epilogue, b.row + r, b.col, b.cols, product);
  }
}

// The same of a whole block, the result and the residual of which hold E and the bias B.
template <class E, class B>
void finish_whole_block(const QuantizedArgs& a, const TileBlock& b, int64_t first, int64_t last) {
  using V = Vec<float>;
  const Epilogue& e = a.epilogue;
  const V scale[2] = {block_scales(a, b, 0), block_scales(a, b, 1)};
  V bias[2] = {V::zero(), V::zero()};
  if (e.bias)
    for (int i = 0; i < 2; ++i) bias[i] = load_vec(static_cast<const B*>(e.bias) + b.col + i * kTileSide);
  for (int64_t r = first; r < last; ++r) {
    const E* residual = static_cast<const E*>(e.residual) + (b.row + r) * e.residual_row + b.col;
    V y[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      y[i] = value_in_block(a, b, r, i, scale[i]);
      if (e.bias) y[i] = y[i] + bias[i];
      if (e.activation != Activation::none) y[i] = activate<float>(e.activation, y[i]);
      if (e.residual) y[i] = y[i] + load_vec(residual + i * kTileSide);
    }
    store_pair(y[0], y[1], static_cast<E*>(e.out) + (b.row + r) * e.out_row + b.col);
  }
}

using FinishBlock = void (*)(const QuantizedArgs&, const TileBlock&, int64_t first, int64_t last);

FinishBlock finish_of_whole_blocks(const Epilogue& e) {
  const bool alike = !e.bias || e.bias_dtype == e.dtype, single = e.bias_dtype == DType::f32;
  if (e.dtype == DType::f32 && alike) return finish_whole_block<float, float>;
  if (e.dtype == DType::bf16 && alike) return finish_whole_block<Bf16, Bf16>;
  if (e.dtype == DType::bf16 && single) return finish_whole_block<Bf16, float>;
  return finish_block;
}

// block.sums = levels times two panels of bytes, of which the second may be missing. `meanwhile`(i) is called at each
// of ceil(padded / 64) steps: what vectors do there costs tiles nothing. fetch: the panels behind are read next.
template <bool kLower, class Meanwhile>
void multiply_byte_tiles(const QuantizedArgs& a, int64_t panel, const char* fetch, TileBlock& block,
                         const Meanwhile& meanwhile) {
  constexpr int64_t kSumsRow = 2 * kTileSide * 4;
  const int64_t panel_bytes = a.padded * kPanelCols, ld = a.levels_row;
  const uint8_t* left = a.data + panel * panel_bytes;
  const uint8_t* right = block.cols > kPanelCols ? left + panel_bytes : left;
  const int8_t *upper = a.levels + block.row * ld, *lower = upper + kTileSide * ld;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kLower) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto step = [&](const uint8_t* b0, const uint8_t* b1, int64_t k) {
    _tile_loadd(6, b0, 64);
    _tile_loadd(4, upper + k, ld);
    _tile_loadd(7, b1, 64);
    _tile_dpbsud(0, 4, 6);
    if constexpr (kLower) _tile_loadd(5, lower + k, ld);
    _tile_dpbsud(1, 4, 7);
    if constexpr (kLower) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    meanwhile(k / kTileDepth);
  };
  int64_t k = 0;
  for (; k + kTileDepth <= a.padded; k += kTileDepth) {
    if (fetch)
      for (int64_t i = 0; i < kTileBytes; i += 64) {
        fetch_to_l2(fetch + k * kPanelCols + i);
        fetch_to_l2(fetch + panel_bytes + k * kPanelCols + i);
      }
    step(left + k * kPanelCols, right + k * kPanelCols, k);
  }
  if (k < a.padded) {  // half a tile, and levels of zero
    alignas(64) uint8_t rest[2][kTileBytes] = {};
    memcpy(rest[0], left + k * kPanelCols, kTileBytes / 2);
    memcpy(rest[1], right + k * kPanelCols, kTileBytes / 2);
    step(rest[0], rest[1], k);
  }
  _tile_stored(0, block.sums[0], kSumsRow);
  _tile_stored(1, block.sums[0] + kTileSide, kSumsRow);
  if constexpr (kLower) {
    _tile_stored(2, block.sums[kTileSide], kSumsRow);
    _tile_stored(3, block.sums[kTileSide] + kTileSide, kSumsRow);
  }
}

// A task with 8 bits. While tiles are multiplied, vectors finish the block before.
void run_byte_tiles(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  constexpr int64_t kSide = 2 * kTileSide;
  const FinishBlock finish_whole = finish_of_whole_blocks(a.epilogue);
  const int64_t steps = (a.padded + kTileDepth - 1) / kTileDepth, rows_per_step = (kSide + steps - 1) / steps;
  TileBlock blocks[2];
  int64_t number = 0, configured = 0;
  const auto finish = [&](const TileBlock& b, int64_t first, int64_t last) {
    (b.cols == kSide ? finish_whole : finish_block)(a, b, first, last < b.rows ? last : b.rows);
  };
  for (int64_t r = 0; r < rows; r += kSide) {
    const int64_t n = rows - r < kSide ? rows - r : kSide, upper = n < kTileSide ? n : kTileSide;
    if (configured != n) configure_tiles(upper, n - upper), configured = n;
    for (int64_t c = 0; c < cols; c += kSide, ++number) {
      TileBlock& block = blocks[number % 2];
      const TileBlock& before = blocks[(number + 1) % 2];
      block.row = row + r, block.rows = n, block.col = col + c, block.cols = cols - c < kSide ? cols - c : kSide;
      const char* fetch = nullptr;
      if (r == 0)
        fetch = c + kSide < cols ? reinterpret_cast<const char*>(a.data + (block.col + kSide) * a.padded) : a.next.data;
      const auto meanwhile = [&](int64_t i) {
        if (i * rows_per_step < before.rows) finish(before, i * rows_per_step, (i + 1) * rows_per_step);
      };
      if (n > upper)
        multiply_byte_tiles<true>(a, block.col / kPanelCols, fetch, block, meanwhile);
      else
        multiply_byte_tiles<false>(a, block.col / kPanelCols, fetch, block, meanwhile);
    }
  }
  const TileBlock& last = blocks[(number + 1) % 2];
  finish(last, 0, last.rows);
  _tile_release();
}

// bytes (padded / 4, 16, 4) = a panel of 4 bits, signed
void spread_panel(const uint8_t* panel, int64_t padded, int8_t* bytes) {
  const __m512i zero = _mm512_set1_epi8(8);
  for (int64_t k = 0; k < padded; k += kWeightGroup)
    for (int i = 0; i < 4; ++i) {
      const __m512i w = Integers<4>::load(panel + k * kPanelCols / 2 + i * 64);
      int8_t* dst = bytes + k * kPanelCols + i * 64;
      _mm512_store_si512(dst, _mm512_sub_epi8(Integers<4>::low(w), zero));
      _mm512_store_si512(dst + 4 * 64, _mm512_sub_epi8(Integers<4>::high(w), zero));
    }
}

inline void configure_group_tiles(int64_t rows) {
  TileShapes s;
  for (int i = 0; i < 4; ++i) s.set(i, rows, kTileSide);
  for (int i = 4; i < 6; ++i) s.set(i, rows, kWeightGroup / 4), s.set(i + 2, kWeightGroup / 4, kTileSide);
  s.load();
}

// product (rows, 16) = x times a panel of 4 bits that is spread to bytes; up to 16 rows. The products of four groups
// are under way at once, in as many tiles.
void group_tiles(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t panel, const int8_t* bytes, float* product,
                 int64_t product_row) {
  const int8_t* levels = a.levels + row * a.levels_row;
  const uint16_t* scales = static_cast<const uint16_t*>(a.scales) + panel * a.groups * kPanelCols;
  constexpr int64_t kGroupBytes = kWeightGroup * kPanelCols;
  alignas(64) int32_t sums[4][kTileSide][kTileSide] = {};
  __m512 total[kTileSide];
#pragma GCC unroll 16
  for (int r = 0; r < kTileSide; ++r) total[r] = _mm512_setzero_ps();
  const auto join = [&](int64_t group, const int32_t (&sum)[kTileSide][kTileSide]) {
    const __m512 scale = load_scales(scales + group * kPanelCols).v;
#pragma GCC unroll 16
    for (int r = 0; r < kTileSide; ++r)
      total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sum[r])), scale, total[r]);
  };
  int64_t group = 0;
  for (; group + 4 <= a.groups; group += 4) {
    const int8_t *x = levels + group * kWeightGroup, *w = bytes + group * kGroupBytes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, x, a.levels_row);
    _tile_loadd(6, w, 64);
    _tile_loadd(5, x + kWeightGroup, a.levels_row);
    _tile_loadd(7, w + kGroupBytes, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 5, 7);
    _tile_loadd(4, x + 2 * kWeightGroup, a.levels_row);
    _tile_loadd(6, w + 2 * kGroupBytes, 64);
    _tile_loadd(5, x + 3 * kWeightGroup, a.levels_row);
    _tile_loadd(7, w + 3 * kGroupBytes, 64);
    _tile_dpbssd(2, 4, 6);
    _tile_dpbssd(3, 5, 7);
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int i = 0; i < 4; ++i) join(group + i, sums[i]);
  }
  for (; group < a.groups; ++group) {
    _tile_zero(0);
    _tile_loadd(4, levels + group * kWeightGroup, a.levels_row);
    _tile_loadd(6, bytes + group * kGroupBytes, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_stored(0, sums[0], 64);
    join(group, sums[0]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileSide; ++r)
    if (r < rows)
      _mm512_storeu_ps(product + r * product_row, _mm512_mul_ps(total[r], _mm512_set1_ps(a.x_scales[row + r])));
}

// A task with 4 bits.
void run_group_tiles(const QuantizedArgs& a, int64_t row, int64_t rows, int64_t col, int64_t cols, void* scratch) {
  const int64_t ld = product_cols(a), panel_bytes = a.padded * kPanelCols;
  const int64_t panel = col / kPanelCols, panels = (cols + kPanelCols - 1) / kPanelCols;
  float* product = static_cast<float*>(scratch);
  int8_t* bytes = reinterpret_cast<int8_t*>(product + kTileSide * ld);
  for (int64_t p = 0; p < panels; ++p)
    spread_panel(a.data + (panel + p) * panel_bytes / 2, a.padded, bytes + p * panel_bytes);
  for (int64_t r = 0; r < rows; r += kTileSide) {
    const int64_t n = rows - r < kTileSide ? rows - r : kTileSide;
    if (r == 0 || n < kTileSide) configure_group_tiles(n);
    for (int64_t p = 0; p < panels; ++p)
      group_tiles(a, row + r, n, panel + p, bytes + p * panel_bytes, product + p * kPanelCols, ld);
    for (int64_t i = 0; i < n; ++i) finish_row(a.epilogue, row + r + i, col, cols, product + i * ld);
  }
  _tile_release();
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
