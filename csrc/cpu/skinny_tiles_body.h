// Weights of bfloat16 on tiles (AMX), in either layout and for any number of rows. Included by skinny_body.h.
//
// A sum runs along 32 elements of the depth, those at even and at odd places apart, and then joins those before it: so
// an instruction does it, and a row has the same bits whatever is beside it.

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kTileHeight = 16, kTileK = 32, kTileSize = 1024, kTilePanel = 32;

// Rows of x come in groups of one tile or two, as even as they can be, and alike in that.
struct RowGroup {
  int64_t first, upper, lower;
};

inline int64_t row_groups(int64_t rows) { return (rows + 2 * kTileHeight - 1) / (2 * kTileHeight); }

inline RowGroup row_group(int64_t rows, int64_t group) {
  const int64_t groups = row_groups(rows), first = rows * group / groups, n = rows * (group + 1) / groups - first;
  const int64_t lower = rows > groups * kTileHeight ? n / 2 : 0;
  return {first, n - lower, lower};
}

// Whether vectors do what tiles would.
inline bool is_one_row(const SkinnyArgs& a) { return a.rows == 1 && a.depth > 0 && a.transposed && !is_in_parts(a); }

// sums (rows, 32 columns) += x (rows, 32 steps) times a panel, whose two tiles per step follow each other.
template <bool kLower>
void multiply_columns(const RowGroup& g, const uint16_t* x, int64_t x_row, const char* panel, int64_t steps, bool zero,
                      float* sums, int64_t sums_row) {
  const int64_t bytes = sums_row * 4;
  float* lower = sums + g.upper * sums_row;
  if (zero) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kLower) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + 16, bytes);
    if constexpr (kLower) {
      _tile_loadd(2, lower, bytes);
      _tile_loadd(3, lower + 16, bytes);
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    _tile_loadd(6, panel + 2 * k * kTileSize, 64);
    _tile_loadd(7, panel + (2 * k + 1) * kTileSize, 64);
    _tile_loadd(4, x + k * kTileK, x_row * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLower) {
      _tile_loadd(5, x + g.upper * x_row + k * kTileK, x_row * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + 16, bytes);
  if constexpr (kLower) {
    _tile_stored(2, lower, bytes);
    _tile_stored(3, lower + 16, bytes);
  }
}

// tiles (steps, 2, 16, 32): a panel of 32 columns, two rows at a time interleaved as SkinnyBf16::load_columns does it;
// fetches as much as it reads.
inline void interleave_panel(const uint16_t* w, int64_t w_row, int64_t depth, int64_t cols, RunWalk& ahead,
                             char* tiles) {
  const __mmask32 mask = cols >= kTilePanel ? ~0u : (1u << cols) - 1;
  RunWalk walk = ahead;
  for (int64_t d = 0; d < round_up(depth, kTileK); d += 2) {
    walk.fetch(64);
    walk.fetch(64);
    const __m512i even = _mm512_maskz_loadu_epi16(d < depth ? mask : 0, w + d * w_row);
    const __m512i odd = _mm512_maskz_loadu_epi16(d + 1 < depth ? mask : 0, w + (d + 1) * w_row);
    char* dst = tiles + (d / kTileK * 2 * kTileHeight + d % kTileK / 2) * 64;
    _mm512_storeu_si512(dst, _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(dst + kTileSize, _mm512_unpackhi_epi16(even, odd));
  }
  ahead = walk;
}

// Rows of the weight that make a panel: those of a sum, or where that is all of them, so many that sums are seldom read
// and written again.
inline int64_t panel_depth(const SkinnyArgs& a) {
  const int64_t most = is_in_parts(a) ? a.sum_depth : 128, depth = round_up(a.depth, kTileK);
  return depth < most ? depth : most;
}

// sums (rows, 32) as tiles leave them; out (rows, 32) = their columns in order, or is added to them.
inline void join_columns(const float* sums, int64_t rows, bool add, float* out, int64_t out_row) {
  for (int64_t r = 0; r < rows; ++r, sums += 32, out += out_row) {
    __m512 one = _mm512_loadu_ps(sums), other = _mm512_loadu_ps(sums + 16);
    SkinnyBf16::order(one, other);
    if (add) one = _mm512_add_ps(_mm512_loadu_ps(out), one), other = _mm512_add_ps(_mm512_loadu_ps(out + 16), other);
    _mm512_storeu_ps(out, one);
    _mm512_storeu_ps(out + 16, other);
  }
}

inline void run_tile_columns(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  const int64_t ld = round_up(cols, kTilePanel), block = panel_depth(a), groups = row_groups(a.rows);
  const bool in_parts = is_in_parts(a);
  float *sums = static_cast<float*>(scratch), *part = sums + a.rows * ld;
  char* panel = reinterpret_cast<char*>(part + 32 * 32);
  const uint16_t* weight = static_cast<const uint16_t*>(a.weight) + first;
  const uint16_t* x = static_cast<const uint16_t*>(a.packed);
  Epilogue epilogue = a.epilogue;
  if (a.depth == 0) memset(sums, 0, size_t(a.rows * ld) * sizeof(float));
  for (int64_t k = 0; k < a.depth; k += block) {
    const int64_t depth = a.depth - k < block ? a.depth - k : block, steps = (depth + kTileK - 1) / kTileK;
    // the next rows, each in one run
    RunWalk ahead{reinterpret_cast<const char*>(weight + (k + block) * a.weight_row), ld * 2, ld * 2, a.weight_row * 2};
    if (k + block >= a.depth && a.next.data) ahead = {a.next.data, a.next.run, a.next.run, a.next.stride};
    for (int64_t c = 0; c < ld; c += kTilePanel) {
      interleave_panel(weight + k * a.weight_row + c, a.weight_row, depth, cols - c, ahead, panel);
      for (int64_t i = 0; i < groups; ++i) {
        const RowGroup g = row_group(a.rows, i);
        if (groups > 1 || (k == 0 && c == 0)) configure_tiles(g.upper, g.lower);
        const uint16_t* rows = x + g.first * a.packed_row + k;
        float *total = sums + g.first * ld + c, *out = in_parts ? part : total;
        const int64_t out_row = in_parts ? 32 : ld;
        if (g.lower)
          multiply_columns<true>(g, rows, a.packed_row, panel, steps, in_parts || k == 0, out, out_row);
        else
          multiply_columns<false>(g, rows, a.packed_row, panel, steps, in_parts || k == 0, out, out_row);
        if (in_parts) join_columns(part, g.upper + g.lower, k > 0, total, ld);
      }
    }
    if (in_parts && k == 0 && epilogue.bias) {  // it belongs to the first part
      const char* bias = static_cast<const char*>(epilogue.bias) + first * element_size(epilogue.bias_dtype);
      for (int64_t r = 0; r < a.rows; ++r) add_row(epilogue.bias_dtype, bias, cols, sums + r * ld);
      epilogue.bias = nullptr;
    }
  }
  _tile_release();
  for (int64_t r = 0; r < a.rows; ++r) {
    if (!in_parts) SkinnyBf16::order_columns(sums + r * ld, ld);
    finish_row(epilogue, r, first, cols, sums + r * ld);
  }
}

// What tiles make of a single row of x, up to subnormals, which they take for zeros: two rows of the weight at a time,
// in the order of memory, which comes faster than panel by panel.
inline void run_one_row(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  using V = Vec<float>;
  constexpr int64_t kAhead = 8192;
  const int64_t ld = round_up(cols, kTilePanel), apart = round_up((kAhead + cols * 2 - 1) / (cols * 2), 2);
  float *sums = static_cast<float*>(scratch), *part[2] = {sums + ld, sums + 2 * ld};  // of even and of odd places
  uint16_t* tail[2] = {reinterpret_cast<uint16_t*>(sums + 3 * ld), reinterpret_cast<uint16_t*>(sums + 3 * ld) + 16};
  const uint16_t* weight = static_cast<const uint16_t*>(a.weight) + first;
  const uint16_t* x = static_cast<const uint16_t*>(a.packed);
  const auto later = [&](int64_t row) {
    return row < a.depth || !a.next.data ? reinterpret_cast<const char*>(weight + row * a.weight_row)
                                         : a.next.data + (row - a.depth) * a.next.stride;
  };
  for (int64_t k = 0; k < a.depth; k += 2) {
    const bool has_odd = k + 1 < a.depth, begins = k % kTileK == 0, is_first = k < kTileK;
    const bool ends = k % kTileK == kTileK - 2 || k + 2 >= a.depth;
    const uint16_t *even_row = weight + k * a.weight_row, *odd_row = even_row + (has_odd ? a.weight_row : 0);
    const char *fetch_even = later(k + apart), *fetch_odd = later(k + apart + 1);
    const V even_x = V::set1(from_bits(uint32_t(x[k]) << 16));
    const V odd_x = V::set1(has_odd ? from_bits(uint32_t(x[k + 1]) << 16) : 0.0f);
    for (int64_t c = 0; c < cols; c += 16) {
      if (c % 32 == 0) fetch_to_l2(fetch_even + c * 2), fetch_to_l2(fetch_odd + c * 2);
      const uint16_t *even_w = even_row + c, *odd_w = odd_row + c;
      if (c + 16 > cols) {
        for (int64_t i = 0; i < 16; ++i)
          tail[0][i] = c + i < cols ? even_w[i] : 0, tail[1][i] = c + i < cols ? odd_w[i] : 0;
        even_w = tail[0], odd_w = tail[1];
      }
      const V even = fma(load_bf16(even_w), even_x, begins ? V::zero() : V::load(part[0] + c));
      const V odd = fma(load_bf16(odd_w), odd_x, begins ? V::zero() : V::load(part[1] + c));
      if (ends) {
        const V sum = even + odd;
        (is_first ? sum : V::load(sums + c) + sum).store(sums + c);
      } else {
        even.store(part[0] + c), odd.store(part[1] + c);
      }
    }
  }
  finish_row(a.epilogue, 0, first, cols, sums);
}

// The transpose of 16 vectors of 32-bit words, in place.
[[gnu::always_inline]] inline void transpose_words(__m512i (&a)[16]) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  // a[4 i + j]: word j of each of four lanes, of rows 4 i .. 4 i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88), a[8 + j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd);
    a[4 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88);
    a[12 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd);
  }
}

// dst (16, 16) = the transpose of `rows` rows of 64 bytes; the other columns are zero.
inline void transpose_words(const char* src, int64_t src_bytes, int64_t rows, char* dst) {
  __m512i a[16];
  for (int64_t r = 0; r < 16; ++r) a[r] = r < rows ? _mm512_loadu_si512(src + r * src_bytes) : _mm512_setzero_si512();
  transpose_words(a);
  for (int64_t r = 0; r < 16; ++r) _mm512_storeu_si512(dst + r * 64, a[r]);
}

// The weight on the left: sums are (16 rows of it, rows of x). With one tile of x, 0 to 5 are sums, 6 the weight and 7
// x; with two, 0 and 2 are sums of the upper rows, 1 and 3 of the lower ones, 4 and 5 the weight, 6 and 7 x.
inline void configure_rows(const RowGroup& g) {
  TileShapes s;
  for (int i = 0; i < 4; ++i) s.set(i, 16, i % 2 && g.lower ? g.lower : g.upper);
  s.set(4, 16, g.lower ? 16 : g.upper), s.set(5, 16, g.lower ? 16 : g.upper);
  s.set(6, 16, g.lower ? g.upper : 16), s.set(7, 16, g.lower ? g.lower : g.upper);
  s.load();
}

// sums (kTiles, 16, 16): of tiles of 16 rows of the weight, straight from memory, which comes fast from so many places
template <int kTiles>
void multiply_rows(const char* w, int64_t w_bytes, const char* x, int64_t x_bytes, int64_t steps, float* sums) {
  const int64_t tile = 16 * w_bytes;
  _tile_zero(0);
  if constexpr (kTiles == 6) {
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
  for (int64_t k = 0; k < steps; ++k, w += 64) {
    _tile_loadd(7, x + k * 16 * x_bytes, x_bytes);
    _tile_loadd(6, w, w_bytes);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (kTiles == 6) {
      _tile_loadd(6, w + tile, w_bytes);
      _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(6, w + 2 * tile, w_bytes);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(6, w + 3 * tile, w_bytes);
      _tile_dpbf16ps(3, 6, 7);
      _tile_loadd(6, w + 4 * tile, w_bytes);
      _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(6, w + 5 * tile, w_bytes);
      _tile_dpbf16ps(5, 6, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (kTiles == 6) {
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 2 * 256, 64);
    _tile_stored(3, sums + 3 * 256, 64);
    _tile_stored(4, sums + 4 * 256, 64);
    _tile_stored(5, sums + 5 * 256, 64);
  }
}

// sums (kTiles, 2, 16, 16): the same with two tiles of x, which alternate
template <int kTiles>
void multiply_rows_twice(const char* w, int64_t w_bytes, const char* x, int64_t steps, float* sums) {
  const int64_t tile = 16 * w_bytes;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, w += 64) {
    _tile_loadd(6, x + 2 * k * kTileSize, 64);
    _tile_loadd(7, x + (2 * k + 1) * kTileSize, 64);
    _tile_loadd(4, w, w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTiles == 2) {
      _tile_loadd(5, w + tile, w_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if constexpr (kTiles == 2) {
    _tile_stored(2, sums + 2 * 256, 64);
    _tile_stored(3, sums + 3 * 256, 64);
  }
}

// How rows of a weight are laid out where tiles cannot take them from it: an odd number of cache lines apart.
inline int64_t padded_row(const SkinnyArgs& a) { return (round_up(a.depth, kTileK) / kTileK | 1) * 64; }

// dst (16, padded_row): rows of the weight, and zeros
inline void pad_rows(const SkinnyArgs& a, const uint16_t* src, int64_t rows, char* dst) {
  memset(dst, 0, size_t(16 * padded_row(a)));
  for (int64_t r = 0; r < rows; ++r) memcpy(dst + r * padded_row(a), src + r * a.weight_row, size_t(a.depth) * 2);
}

inline void run_tile_rows(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  const int64_t steps = (a.depth + kTileK - 1) / kTileK, groups = row_groups(a.rows), ld = round_up(cols, kTilePanel);
  const bool is_one = a.rows == 1;        // of which every tile is a column, and lies there already
  char* x = static_cast<char*>(scratch);  // (groups, steps, 2) tiles
  char* padded = x + groups * steps * 2 * kTileSize;
  float* sums = reinterpret_cast<float*>(padded + 16 * padded_row(a));
  float *turned = sums + 6 * 256, *product = turned + 256;
  for (int64_t i = 0; i < groups && !is_one; ++i) {
    const RowGroup g = row_group(a.rows, i);
    const char* upper = static_cast<const char*>(a.packed) + g.first * a.packed_row * 2;
    const char* lower = upper + g.upper * a.packed_row * 2;
    char* tiles = x + i * steps * 2 * kTileSize;
    for (int64_t k = 0; k < steps; ++k) {
      transpose_words(upper + k * 64, a.packed_row * 2, g.upper, tiles);
      if (g.lower) transpose_words(lower + k * 64, a.packed_row * 2, g.lower, tiles + kTileSize);
      tiles += g.lower ? 2 * kTileSize : kTileSize;
    }
  }
  const uint16_t* weight = static_cast<const uint16_t*>(a.weight) + first * a.weight_row;
  const int64_t most = row_group(a.rows, 0).lower ? 2 : 6;
  for (int64_t c = 0, tiles; c < cols; c += 16 * tiles) {
    const bool is_whole = a.depth % kTileK == 0 && c + 16 <= cols;
    tiles = is_whole && c + 16 * most <= cols ? most : 1;
    const char* w = reinterpret_cast<const char*>(weight + c * a.weight_row);
    if (!is_whole) pad_rows(a, weight + c * a.weight_row, cols - c < 16 ? cols - c : 16, padded), w = padded;
    const int64_t w_bytes = is_whole ? a.weight_row * 2 : padded_row(a);
    for (int64_t i = 0; i < groups; ++i) {
      const RowGroup g = row_group(a.rows, i);
      if (groups > 1 || c == 0) configure_rows(g);
      const char* own = is_one ? static_cast<const char*>(a.packed) : x + i * steps * 2 * kTileSize;
      if (g.lower)
        (tiles > 1 ? multiply_rows_twice<2> : multiply_rows_twice<1>)(w, w_bytes, own, steps, sums);
      else
        (tiles > 1 ? multiply_rows<6> : multiply_rows<1>)(w, w_bytes, own, is_one ? 4 : 64, steps, sums);
      const int64_t halves = g.lower ? 2 : 1;
      for (int64_t part = 0; part < tiles * halves; ++part) {
        const bool is_lower = part % halves;
        float* to = product + (g.first + (is_lower ? g.upper : 0)) * ld + c + part / halves * 16;
        transpose_words(reinterpret_cast<const char*>(sums + part * 256), 64, 16, reinterpret_cast<char*>(turned));
        for (int64_t r = 0; r < (is_lower ? g.lower : g.upper); ++r)
          _mm512_storeu_ps(to + r * ld, _mm512_loadu_ps(turned + r * 16));
      }
    }
  }
  _tile_release();
  for (int64_t r = 0; r < a.rows; ++r) finish_row(a.epilogue, r, first, cols, product + r * ld);
}

inline int64_t tiles_scratch(const SkinnyArgs& a, int64_t cols) {
  const int64_t ld = round_up(cols, kTilePanel), steps = (a.depth + kTileK - 1) / kTileK;
  if (is_one_row(a)) return 3 * ld * 4 + 64;
  if (a.transposed) return (a.rows * ld + 32 * 32) * 4 + panel_depth(a) * kTilePanel * 2;
  return row_groups(a.rows) * steps * 2 * kTileSize + 16 * padded_row(a) + (7 * 256 + a.rows * ld) * 4;
}

inline void run_tiles(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  if (!a.transposed) return run_tile_rows(a, first, cols, scratch);
  is_one_row(a) ? run_one_row(a, first, cols, scratch) : run_tile_columns(a, first, cols, scratch);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
