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

// sums (rows, 32) = or += x (rows, kTileK) times a panel, two tiles one behind the other
template <bool kLower>
void multiply_columns(const RowGroup& g, const uint16_t* x, int64_t x_row, const char* panel, bool zero, float* sums,
                      int64_t sums_row) {
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
  _tile_loadd(6, panel, 64);
  _tile_loadd(7, panel + kTileSize, 64);
  _tile_loadd(4, x, x_row * 2);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kLower) {
    _tile_loadd(5, x + g.upper * x_row, x_row * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + 16, bytes);
  if constexpr (kLower) {
    _tile_stored(2, lower, bytes);
    _tile_stored(3, lower + 16, bytes);
  }
}

// panel (2, 16, 32): kTileK rows of 32 columns, two rows at a time interleaved as SkinnyBf16::load_columns does it;
// fetches as much as it reads.
inline void interleave_panel(const uint16_t* w, int64_t w_row, int64_t depth, int64_t cols, RunWalk& ahead,
                             char* panel) {
  const __mmask32 mask = cols >= kTilePanel ? ~0u : (1u << cols) - 1;
  for (int64_t d = 0; d < kTileK; d += 2, panel += 64) {
    if (d % kStreams == 0) ahead.fetch(1);
    const __m512i even = _mm512_maskz_loadu_epi16(d < depth ? mask : 0, w + d * w_row);
    const __m512i odd = _mm512_maskz_loadu_epi16(d + 1 < depth ? mask : 0, w + (d + 1) * w_row);
    _mm512_storeu_si512(panel, _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(panel + kTileSize, _mm512_unpackhi_epi16(even, odd));
  }
}

// part (cols,): sums as tiles leave them; out (cols,) = them in the order of the columns, or is added to them
inline void join_columns(const float* part, int64_t cols, bool add, float* out) {
  for (int64_t c = 0; c < cols; c += kTilePanel) {
    __m512 one = _mm512_loadu_ps(part + c), other = _mm512_loadu_ps(part + c + 16);
    SkinnyBf16::order(one, other);
    if (add)
      one = _mm512_add_ps(_mm512_loadu_ps(out + c), one), other = _mm512_add_ps(_mm512_loadu_ps(out + c + 16), other);
    _mm512_storeu_ps(out + c, one);
    _mm512_storeu_ps(out + c + 16, other);
  }
}

// Some kTileK rows of the weight that a task on `cols` columns reads from row k on, or that come after it
inline RunWalk rows_after(const SkinnyArgs& a, int64_t first, int64_t cols, int64_t k) {
  if (k >= a.depth) return RunWalk(a.next, kTileK, a.streams);
  const uint16_t* rows = static_cast<const uint16_t*>(a.weight) + k * a.weight_row + first;
  return RunWalk({reinterpret_cast<const char*>(rows), cols * 2, a.weight_row * 2},
                 a.depth - k < kTileK ? a.depth - k : kTileK, a.streams);
}

// All columns take kTileK rows of the weight in turn: these lie pages apart, and the TLB holds few pages.
inline void run_tile_columns(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  const int64_t ld = round_up(cols, kTilePanel), groups = row_groups(a.rows);
  const int64_t sum_depth = is_in_parts(a) ? a.sum_depth : a.depth;
  const bool alike = a.rows % groups == 0;  // or tiles are configured for each group
  const int64_t at_once = alike ? kTilePanel : ld;
  float *sums = static_cast<float*>(scratch), *part = sums + a.rows * ld;
  char* panels = reinterpret_cast<char*>(part + a.rows * ld);
  const uint16_t* weight = static_cast<const uint16_t*>(a.weight) + first;
  const uint16_t* x = static_cast<const uint16_t*>(a.packed);
  Epilogue epilogue = a.epilogue;
  if (a.depth == 0) memset(sums, 0, size_t(a.rows * ld) * sizeof(float));
  for (int64_t k = 0, later = kTileK; k < a.depth; k = later, later += kTileK) {
    const int64_t depth = a.depth - k < kTileK ? a.depth - k : kTileK;
    const bool begins = k % sum_depth == 0, ends = later >= a.depth || later % sum_depth == 0;
    RunWalk ahead = rows_after(a, first, cols, later);
    for (int64_t from = 0; from < ld; from += at_once) {
      for (int64_t c = from; c < from + at_once; c += kTilePanel)
        interleave_panel(weight + k * a.weight_row + c, a.weight_row, depth, cols - c, ahead,
                         panels + (c - from) * kTileK * 2);
      for (int64_t i = 0; i < groups; ++i) {
        const RowGroup g = row_group(a.rows, i);
        if (!alike || (k == 0 && from == 0 && i == 0)) configure_tiles(g.upper, g.lower);
        const uint16_t* rows = x + g.first * a.packed_row + k;
        for (int64_t c = from; c < from + at_once; c += kTilePanel)
          (g.lower ? multiply_columns<true> : multiply_columns<false>)(g, rows, a.packed_row,
                                                                       panels + (c - from) * kTileK * 2, begins,
                                                                       part + g.first * ld + c, ld);
      }
    }
    if (!ends) continue;
    for (int64_t r = 0; r < a.rows; ++r) join_columns(part + r * ld, ld, k >= sum_depth, sums + r * ld);
    if (k < sum_depth && sum_depth < a.depth && epilogue.bias) {  // it belongs to the first part
      const char* bias = static_cast<const char*>(epilogue.bias) + first * element_size(epilogue.bias_dtype);
      for (int64_t r = 0; r < a.rows; ++r) add_row(epilogue.bias_dtype, bias, cols, sums + r * ld);
      epilogue.bias = nullptr;
    }
  }
  _tile_release();
  for (int64_t r = 0; r < a.rows; ++r) finish_row(epilogue, r, first, cols, sums + r * ld);
}

// What tiles make of a single row of x, up to subnormals, which they take for zeros: four rows of the weight at a time,
// in the order of memory. Of 32 columns the even ones come first, then the odd ones, until all is summed up.
inline void run_one_row(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  using V = Vec<float>;
  constexpr int64_t kRows = 4;
  const int64_t ld = round_up(cols, kTilePanel);
  float* sums = static_cast<float*>(scratch);
  float *even_part = sums + ld, *odd_part = even_part + ld;  // of even and of odd places in the depth
  const uint16_t* weight = static_cast<const uint16_t*>(a.weight) + first;
  const uint16_t* x = static_cast<const uint16_t*>(a.packed);
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  RunWalk ahead;
  for (int64_t k = 0; k < a.depth; k += kRows) {
    const bool begins = k % kTileK == 0, ends = (k + kRows) % kTileK == 0 || k + kRows >= a.depth,
               is_first = k < kTileK;
    if (begins) ahead = rows_after(a, first, cols, k + kTileK);
    const uint16_t* row[kRows];
    V places[kRows];
    __mmask32 is_row[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      const bool is_there = k + i < a.depth;
      row[i] = weight + (is_there ? k + i : k) * a.weight_row;
      places[i] = V::set1(is_there ? from_bits(uint32_t(x[k + i]) << 16) : 0.0f);
      is_row[i] = is_there ? ~0u : 0u;
    }
    for (int64_t c = 0; c < cols; c += 32) {
      if (c % 64 == 0) ahead.fetch(1);
      const __mmask32 lanes = cols - c < 32 ? (1u << (cols - c)) - 1 : ~0u;
      __m512i w[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) w[i] = _mm512_maskz_loadu_epi16(lanes & is_row[i], row[i] + c);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t at = c + 16 * half;
        V wide[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
          wide[i] = {_mm512_castsi512_ps(half ? _mm512_and_si512(w[i], upper) : _mm512_slli_epi32(w[i], 16))};
        V even = begins ? V::zero() : V::load(even_part + at), odd = begins ? V::zero() : V::load(odd_part + at);
#pragma GCC unroll 2
        for (int i = 0; i < kRows; i += 2)
          even = fma(wide[i], places[i], even), odd = fma(wide[i + 1], places[i + 1], odd);
        if (ends) {
          const V sum = even + odd;
          (is_first ? sum : V::load(sums + at) + sum).store(sums + at);
        } else {
          even.store(even_part + at), odd.store(odd_part + at);
        }
      }
    }
  }
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t c = 0; c < cols; c += 32) {
    const __m512 even = _mm512_loadu_ps(sums + c), odd = _mm512_loadu_ps(sums + c + 16);
    _mm512_storeu_ps(sums + c, _mm512_permutex2var_ps(even, low, odd));
    _mm512_storeu_ps(sums + c + 16, _mm512_permutex2var_ps(even, high, odd));
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

// sums (kTiles, 16, 16): of tiles of 16 rows of the weight
template <int kTiles>
void multiply_rows(const char* w, int64_t w_bytes, const char* x, int64_t x_bytes, int64_t steps, RunWalk ahead,
                   float* sums) {
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
    ahead.fetch(16 * kTiles / kStreams);
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
void multiply_rows_twice(const char* w, int64_t w_bytes, const char* x, int64_t steps, RunWalk ahead, float* sums) {
  const int64_t tile = 16 * w_bytes;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, w += 64) {
    ahead.fetch(16 * kTiles / kStreams);
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
    const int64_t later = c + 16 * tiles;
    RunWalk ahead({reinterpret_cast<const char*>(weight + later * a.weight_row), a.depth * 2, a.weight_row * 2},
                  cols - later < 16 * tiles ? cols - later : 16 * tiles, a.streams);
    if (later >= cols) ahead = RunWalk(a.next, 16 * tiles, a.streams);
    for (int64_t i = 0; i < groups; ++i, ahead = {}) {
      const RowGroup g = row_group(a.rows, i);
      if (groups > 1 || c == 0) configure_rows(g);
      const char* own = is_one ? static_cast<const char*>(a.packed) : x + i * steps * 2 * kTileSize;
      if (g.lower)
        (tiles > 1 ? multiply_rows_twice<2> : multiply_rows_twice<1>)(w, w_bytes, own, steps, ahead, sums);
      else
        (tiles > 1 ? multiply_rows<6> : multiply_rows<1>)(w, w_bytes, own, is_one ? 4 : 64, steps, ahead, sums);
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
  if (is_one_row(a)) return 3 * ld * 4;
  if (a.transposed) return 2 * a.rows * ld * 4 + kTileK * ld * 2;
  return row_groups(a.rows) * steps * 2 * kTileSize + 16 * padded_row(a) + (7 * 256 + a.rows * ld) * 4;
}

inline void run_tiles(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  if (!a.transposed) return run_tile_rows(a, first, cols, scratch);
  is_one_row(a) ? run_one_row(a, first, cols, scratch) : run_tile_columns(a, first, cols, scratch);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
