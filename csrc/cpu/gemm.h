// Register-blocked matrix products: C (rows, cols) [+]= A (rows, depth) * B (depth, cols).
// Included once per instruction set after vecmath.h, hence no include guard.
//
// A is read by broadcast and may have any strides; rows of B and C are contiguous. An element of A and B is one T, or,
// for bfloat16, a pair of neighbours along the depth, which vdpbf16ps multiplies and adds in one instruction.

namespace lmk {
namespace LMK_NS {
namespace {

template <class T>
struct MathFma {
  using Acc = T;
  using Elem = T;
  using V = Vec<T>;
  using B = Vec<T>;
  static constexpr int kPack = 1;  // depth per element
  static B load(const Elem* p) { return V::load(p); }
  static B broadcast(const Elem* p) { return V::set1(*p); }
  static V dot(V acc, B a, B b) { return fma(a, b, acc); }
  static V exp(V x) { return LMK_NS::exp(x); }
};

#if LMK_BF16_DOT
struct MathBf16 {
  using Acc = float;
  using Elem = uint32_t;  // two bfloat16, the earlier one in the low half
  using V = Vec<float>;
  using B = __m512bh;
  static constexpr int kPack = 2;
  static B load(const Elem* p) { return reinterpret_cast<B>(_mm512_loadu_si512(p)); }
  static B broadcast(const Elem* p) { return reinterpret_cast<B>(_mm512_set1_epi32(int(*p))); }
  static V dot(V acc, B a, B b) { return {_mm512_dpbf16_ps(acc.v, a, b)}; }
  static V exp(V x) { return exp_bf16(x); }

  // 32 or 16 neighbours as pairs
  static void store_pairs(V a, V b, Elem* dst) {
    _mm512_storeu_si512(dst, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
  }
  static void store_pairs(V a, Elem* dst) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
  }

  // dst (n / 2,): neighbours in x (n,) as pairs; n is a multiple of 16
  static void pack_row(const float* x, int64_t n, Elem* dst) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) store_pairs(V::load(x + i), V::load(x + i + 16), dst + i / 2);
    if (i < n) store_pairs(V::load(x + i), dst + i / 2);
  }

  // dst (n,): element c of two rows as a pair; n is a multiple of 16
  static void pack_row_pair(const float* even, const float* odd, int64_t n, Elem* dst) {
    for (int64_t i = 0; i < n; i += 16) {
      const __m512i low =
          _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(even + i))));
      const __m512i high =
          _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(odd + i))));
      _mm512_storeu_si512(dst + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
};
#endif

#if LMK_BF16_DOT
using MathForBf16 = MathBf16;
#else
using MathForBf16 = MathFma<float>;
#endif

// Whether products go by AMX's tiles, and what the columns of B are padded to with zeros.
template <class M>
constexpr bool kByTiles = LMK_TILES && M::kPack == 2;
template <class M>
constexpr int64_t kColumnUnit = kByTiles<M> ? 32 : M::V::kLanes;
constexpr int64_t kTileSide = 16;  // rows of C, columns of C, and elements of the depth in one tile

// A register tile of kRows x kTileVecs vectors: 24 accumulators of 32 registers with AVX-512, 12 of 16 without.
constexpr int kTileRows = 6;
#if LMK_LANES == 16
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 2;
#endif

// Memory that is wanted soon, brought in a few lines at a time while a product is computed, the last block first. Into
// the L1 cache, which passes it on to L2: of what was asked for in L2, a Zen 4 often had nothing there afterwards.
class LinesAhead {
 public:
  static constexpr int kDepth = kTileVecs == 4 ? 32 : 128;  // of a product, to a step: some 800 cycles

  void clear() { count_ = 0, offset_ = 0; }

  // Lines of so many bytes, each `stride` bytes after the one before. for_write: what another core wrote last is to be
  // had for writing at once.
  void add(const void* data, int64_t lines, int64_t bytes, int64_t stride, bool for_write = false) {
    if (lines > 0 && bytes > 0) blocks_[count_++] = {static_cast<const char*>(data), lines, bytes, stride, for_write};
  }

  void step() {
    for (int i = 0; i < 8 && count_ > 0; ++i) {
      Block& block = blocks_[count_ - 1];
      if (block.for_write)
        __builtin_prefetch(block.data + offset_, 1);
      else
        __builtin_prefetch(block.data + offset_);
      offset_ += 64;
      if (offset_ < block.bytes) continue;
      offset_ = 0;
      block.data += block.stride;
      if (--block.lines == 0) --count_;
    }
  }

 private:
  struct Block {
    const char* data;
    int64_t lines, bytes, stride;
    bool for_write;
  };
  Block blocks_[7];
  int64_t count_ = 0, offset_ = 0;
};

// Vectors of a packed panel of B. Two of tiles lie side by side: of wider panels, a column of tiles would fill only
// some of the sets of the L1 cache.
template <class M>
constexpr int64_t kPackedVecs = kByTiles<M> ? 2 : kTileVecs;

enum class Start { zero, add, scale_and_add };  // C = A B; C += A B; C = factor[row] * C + A B

template <class M>
struct GemmArgs {
  const typename M::Elem* a;
  int64_t a_row, a_depth;  // strides of A in elements
  const typename M::Elem* b;
  int64_t b_depth, b_panel;  // strides of B: to the next depth, and to the next panel of kPackedVecs vectors
  typename M::Acc* c;
  int64_t c_row;
  int64_t depth;                  // in elements
  const typename M::Acc* factor;  // (rows,), for scale_and_add
  LinesAhead* ahead = nullptr;    // to be brought in meanwhile
  int64_t a_step = kTileSide;     // by tiles: from one tile of A to the next along the depth
};

// kAhead: g.ahead takes its steps.
template <class M, Start kStart, bool kAhead, int kRows, int kVecs>
[[gnu::noinline]] void gemm_tile(const GemmArgs<M>& g, int64_t row, int64_t col, const typename M::Elem* b) {
  using V = typename M::V;
  constexpr int kLanes = V::kLanes;
  typename M::Acc* c = g.c + row * g.c_row + col;
  // the product of this depth starts from zero and joins C at the end: one running sum over all depths would round as
  // often, but at the size of the whole sum
  V acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) acc[r][n] = V::zero();
  // the tile of C may lie in the L2 cache or beyond, and is wanted at the end
  if constexpr (kStart == Start::add)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) __builtin_prefetch(c + r * g.c_row + n * kLanes, 1, 3);
  const typename M::Elem* a = g.a + row * g.a_row;
  const int64_t a_row = g.a_row, a_depth = g.a_depth, b_depth = g.b_depth;
  const int64_t part = kAhead ? LinesAhead::kDepth : g.depth;
  for (int64_t left = g.depth; left > 0; left -= part) {
    if constexpr (kAhead) g.ahead->step();
    // unrolled: a step has 37 instructions, 24 of which count, and more than 2 per cycle (Intel) may be too many
#pragma GCC unroll 4
    for (int64_t k = left < part ? left : part; k > 0; --k) {
      typename M::B bv[kVecs];
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) bv[n] = M::load(b + n * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename M::B av = M::broadcast(a + r * a_row);
#pragma GCC unroll 8
        for (int n = 0; n < kVecs; ++n) acc[r][n] = M::dot(acc[r][n], av, bv[n]);
      }
      a += a_depth;
      b += b_depth;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) {
      typename M::Acc* p = c + r * g.c_row + n * kLanes;
      if constexpr (kStart == Start::add) acc[r][n] = V::load(p) + acc[r][n];
      if constexpr (kStart == Start::scale_and_add) acc[r][n] = fma(V::load(p), V::set1(g.factor[row + r]), acc[r][n]);
      acc[r][n].store(p);
    }
}

template <class M, Start kStart, bool kAhead, int kVecs>
void gemm_panel(const GemmArgs<M>& g, int64_t rows, int64_t col, const typename M::Elem* b) {
  constexpr int kMost = kVecs == 1 ? 8 : kTileRows;  // two units of four cycles have eight sums under way
  int64_t row = 0;
  for (; row + kMost <= rows; row += kMost) gemm_tile<M, kStart, kAhead, kMost, kVecs>(g, row, col, b);
  switch (rows - row) {
    case 1:
      return gemm_tile<M, kStart, kAhead, 1, kVecs>(g, row, col, b);
    case 2:
      return gemm_tile<M, kStart, kAhead, 2, kVecs>(g, row, col, b);
    case 3:
      return gemm_tile<M, kStart, kAhead, 3, kVecs>(g, row, col, b);
    case 4:
      return gemm_tile<M, kStart, kAhead, 4, kVecs>(g, row, col, b);
    case 5:
      return gemm_tile<M, kStart, kAhead, 5, kVecs>(g, row, col, b);
  }
  if constexpr (kMost == 8) {
    if (rows - row == 6) return gemm_tile<M, kStart, kAhead, 6, kVecs>(g, row, col, b);
    if (rows - row == 7) return gemm_tile<M, kStart, kAhead, 7, kVecs>(g, row, col, b);
  }
}

#if LMK_TILES
// The shapes of the eight tiles, of 32-bit columns. A tile without rows must have no columns.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t count, int64_t columns) {
    if (count == 0 || columns == 0) return;
    rows[tile] = uint8_t(count), row_bytes[tile] = uint16_t(columns * 4);
  }
  // gcc's own _tile_loadconfig says that it reads 8 bytes, so that stores to the others may be left out.
  void load() const { __asm__ volatile("ldtilecfg %0" ::"m"(*this)); }
};
static_assert(sizeof(TileShapes) == 64);

// x on the left: 0 and 1 are sums of its upper rows, 2 and 3 of its lower ones; 4 and 5 its rows, 6 and 7 columns of
// the right factor.
inline void configure_tiles(int64_t upper, int64_t lower) {
  TileShapes s;
  for (int half = 0; half < 2; ++half)
    s.set(half, upper, kTileSide), s.set(2 + half, lower, kTileSide), s.set(6 + half, kTileSide, kTileSide);
  s.set(4, upper, kTileSide), s.set(5, lower, kTileSide);
  s.load();
}

// C's rows from `row` on, one or two tiles of them, and kVecs vectors of columns.
template <Start kStart, int kRowTiles, int kVecs>
void multiply_tiles(const GemmArgs<MathBf16>& g, int64_t row, int64_t col, const uint32_t* b) {
  const uint32_t* a = g.a + row * g.a_row;
  const int64_t a_bytes = g.a_row * 4, b_bytes = g.b_depth * 4, c_bytes = g.c_row * 4;
  float* const c = g.c + row * g.c_row + col;
  float* const lower = c + kTileSide * g.c_row;
  if constexpr (kStart == Start::zero) {
    _tile_zero(0);
    if constexpr (kVecs == 2) _tile_zero(1);
    if constexpr (kRowTiles == 2) _tile_zero(2);
    if constexpr (kRowTiles == 2 && kVecs == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kVecs == 2) _tile_loadd(1, c + kTileSide, c_bytes);
    if constexpr (kRowTiles == 2) _tile_loadd(2, lower, c_bytes);
    if constexpr (kRowTiles == 2 && kVecs == 2) _tile_loadd(3, lower + kTileSide, c_bytes);
  }
  for (int64_t k = 0; k < g.depth; k += kTileSide) {
    // into the L1 cache: who shares the tile unit with another thread has it only while tiles are at hand
    const uint32_t* next = b + kTileSide * g.b_depth;
#pragma GCC unroll 16
    for (int i = 0; i < kTileSide; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) __builtin_prefetch(next + i * g.b_depth + v * kTileSide);
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    if constexpr (kVecs == 2) _tile_loadd(7, b + kTileSide, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRowTiles == 2) _tile_loadd(5, a + kTileSide * g.a_row, a_bytes);
    if constexpr (kVecs == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kRowTiles == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kRowTiles == 2 && kVecs == 2) _tile_dpbf16ps(3, 5, 7);
    a += g.a_step;
    b += kTileSide * g.b_depth;
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kVecs == 2) _tile_stored(1, c + kTileSide, c_bytes);
  if constexpr (kRowTiles == 2) _tile_stored(2, lower, c_bytes);
  if constexpr (kRowTiles == 2 && kVecs == 2) _tile_stored(3, lower + kTileSide, c_bytes);
}

template <Start kStart>
void multiply_pair(const GemmArgs<MathBf16>& g, int64_t row, int64_t col, const uint32_t* b, bool two_rows,
                   bool two_vecs) {
  if (two_rows && two_vecs)
    multiply_tiles<kStart, 2, 2>(g, row, col, b);
  else if (two_rows)
    multiply_tiles<kStart, 2, 1>(g, row, col, b);
  else if (two_vecs)
    multiply_tiles<kStart, 1, 2>(g, row, col, b);
  else
    multiply_tiles<kStart, 1, 1>(g, row, col, b);
}

// What gemm does where the depth is whole tiles and rows of A are contiguous along it. Sums go on from C.
template <Start kStart>
void gemm_tiles(const GemmArgs<MathBf16>& g, int64_t rows, int64_t vecs) {
  if constexpr (kStart == Start::scale_and_add)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < vecs; ++n) {
        float* p = g.c + r * g.c_row + n * kTileSide;
        (Vec<float>::load(p) * Vec<float>::set1(g.factor[r])).store(p);
      }
  const bool in_rows = g.b_panel == kPackedVecs<MathBf16> * kTileSide;
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, pair = 2 * kTileSide;
    const int64_t upper = left < kTileSide ? left : kTileSide;
    const int64_t lower = left < pair ? left - upper : kTileSide;
    const int64_t end = row + (left < pair ? left : left / pair * pair);
    configure_tiles(upper, lower);
    for (int64_t n = 0; n < vecs; n += 2) {
      const uint32_t* b = in_rows ? g.b + n * kTileSide : g.b + n / 2 * g.b_panel;
      for (int64_t r = row; r < end; r += pair) multiply_pair<kStart>(g, r, n * kTileSide, b, lower > 0, n + 2 <= vecs);
    }
    row = end;
  }
  _tile_release();
}

inline void transpose_tile(const void* const* rows, int64_t k, void* dst, int64_t dst_ld);  // in rows.h

// dst (rows, dst_ld) = the transpose of a (depth, a_depth); rows is at most 2 kTileSide, depth whole tiles.
inline void turn(const uint32_t* a, int64_t a_depth, int64_t rows, int64_t depth, uint32_t* dst, int64_t dst_ld) {
  for (int64_t r = 0; r < rows; r += kTileSide)
    for (int64_t k = 0; k < depth; k += kTileSide) {
      const void* lines[kTileSide];
      uint32_t part[kTileSide][kTileSide];
      for (int64_t i = 0; i < kTileSide; ++i) lines[i] = a + (k + i) * a_depth + r;
      if (rows - r < kTileSide)
        for (int64_t i = 0; i < kTileSide; ++i) {
          _mm512_storeu_si512(part[i], _mm512_maskz_loadu_epi32(__mmask16((1 << (rows - r)) - 1), lines[i]));
          lines[i] = part[i];
        }
      transpose_tile(lines, 0, dst + r * dst_ld + k, dst_ld);
    }
}

// The same where columns of A are contiguous: they are turned, some rows and some of the depth at a time.
template <Start kStart>
void gemm_tiles_turned(const GemmArgs<MathBf16>& g, int64_t rows, int64_t vecs) {
  constexpr int64_t kRows = 2 * kTileSide, kDepth = 256, kLd = kDepth + kTileSide;
  alignas(64) uint32_t turned[kRows * kLd];
  for (int64_t k = 0; k < g.depth; k += kDepth)
    for (int64_t row = 0; row < rows; row += kRows) {
      GemmArgs<MathBf16> part = g;
      const int64_t n = rows - row < kRows ? rows - row : kRows;
      part.depth = g.depth - k < kDepth ? g.depth - k : kDepth;
      turn(g.a + row + k * g.a_depth, g.a_depth, n, part.depth, turned, kLd);
      part.a = turned, part.a_row = kLd, part.a_depth = 1;
      part.b += k * g.b_depth;
      part.c += row * g.c_row;
      part.factor = kStart == Start::scale_and_add ? g.factor + row : nullptr;
      if (k == 0)
        gemm_tiles<kStart>(part, n, vecs);
      else
        gemm_tiles<Start::add>(part, n, vecs);
    }
}
#endif

// gemm by vectors.
template <class M, Start kStart, bool kAhead>
void gemm_vectors(const GemmArgs<M>& g, int64_t rows, int64_t vecs) {
  constexpr int kLanes = M::V::kLanes;
  constexpr int64_t kWide = kPackedVecs<M>;
  const bool in_rows = g.b_panel == kWide * kLanes;
  for (int64_t n = 0; n < vecs;) {
    const int64_t left = vecs - n, panels = (left + kWide - 1) / kWide;
    const int64_t width = in_rows ? (left + panels - 1) / panels : (left < kWide ? left : kWide);
    const typename M::Elem* b = in_rows ? g.b + n * kLanes : g.b + n / kWide * g.b_panel;
    switch (width) {
      case 1:
        gemm_panel<M, kStart, kAhead, 1>(g, rows, n * kLanes, b);
        break;
      case 2:
        gemm_panel<M, kStart, kAhead, 2>(g, rows, n * kLanes, b);
        break;
#if LMK_LANES == 16
      case 3:
        gemm_panel<M, kStart, kAhead, 3>(g, rows, n * kLanes, b);
        break;
      case 4:
        gemm_panel<M, kStart, kAhead, 4>(g, rows, n * kLanes, b);
        break;
#endif
    }
    n += width;
  }
}

// vecs: columns of C in vectors. B's panels are kPackedVecs wide; where b_panel says that they are neighbours in rows
// of B, uneven widths such as 5 are split evenly (3 + 2).
template <class M, Start kStart, bool kAhead = false>
void gemm(const GemmArgs<M>& g, int64_t rows, int64_t vecs) {
#if LMK_TILES
  if constexpr (kByTiles<M>)
    if (g.depth >= kTileSide && (g.a_depth == 1 || g.a_row == 1)) {
      GemmArgs<M> part = g;
      part.depth = g.depth / kTileSide * kTileSide;
      if (g.a_depth == 1)
        gemm_tiles<kStart>(part, rows, vecs);
      else
        gemm_tiles_turned<kStart>(part, rows, vecs);
      if (part.depth == g.depth) return;
      part.a += part.depth / kTileSide * (g.a_depth == 1 ? g.a_step : kTileSide * g.a_depth),
          part.b += part.depth * g.b_depth, part.depth = g.depth - part.depth;
      return gemm_vectors<M, Start::add, false>(part, rows, vecs);
    }
#endif
  gemm_vectors<M, kStart, kAhead>(g, rows, vecs);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
