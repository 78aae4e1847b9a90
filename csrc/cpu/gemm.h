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

// A register tile of kRows x kTileVecs vectors: 24 accumulators of 32 registers with AVX-512, 12 of 16 without.
constexpr int kTileRows = 6;
#if LMK_LANES == 16
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 2;
#endif

enum class Start { zero, add, scale_and_add };  // C = A B; C += A B; C = factor[row] * C + A B

template <class M>
struct GemmArgs {
  const typename M::Elem* a;
  int64_t a_row, a_depth;  // strides of A in elements
  const typename M::Elem* b;
  int64_t b_depth, b_panel;  // strides of B: to the next depth, and to the next panel of kTileVecs vectors
  typename M::Acc* c;
  int64_t c_row;
  int64_t depth;                  // in elements
  const typename M::Acc* factor;  // (rows,), for scale_and_add
};

template <class M, Start kStart, int kRows, int kVecs>
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
  const typename M::Elem* a = g.a + row * g.a_row;
  const int64_t a_row = g.a_row, a_depth = g.a_depth, b_depth = g.b_depth;
  for (int64_t k = g.depth; k > 0; --k) {
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

template <class M, Start kStart, int kVecs>
void gemm_panel(const GemmArgs<M>& g, int64_t rows, int64_t col, const typename M::Elem* b) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) gemm_tile<M, kStart, kTileRows, kVecs>(g, row, col, b);
  switch (rows - row) {
    case 1:
      return gemm_tile<M, kStart, 1, kVecs>(g, row, col, b);
    case 2:
      return gemm_tile<M, kStart, 2, kVecs>(g, row, col, b);
    case 3:
      return gemm_tile<M, kStart, 3, kVecs>(g, row, col, b);
    case 4:
      return gemm_tile<M, kStart, 4, kVecs>(g, row, col, b);
    case 5:
      return gemm_tile<M, kStart, 5, kVecs>(g, row, col, b);
  }
}

// vecs: columns of C in vectors. B's panels are kTileVecs wide; where b_panel says that they are neighbours in rows
// of B, uneven widths such as 5 are split evenly (3 + 2).
template <class M, Start kStart>
void gemm(const GemmArgs<M>& g, int64_t rows, int64_t vecs) {
  constexpr int kLanes = M::V::kLanes;
  const bool in_rows = g.b_panel == kTileVecs * kLanes;
  for (int64_t n = 0; n < vecs;) {
    const int64_t left = vecs - n, panels = (left + kTileVecs - 1) / kTileVecs;
    const int64_t width = in_rows ? (left + panels - 1) / panels : (left < kTileVecs ? left : kTileVecs);
    const typename M::Elem* b = in_rows ? g.b + n * kLanes : g.b + n / kTileVecs * g.b_panel;
    switch (width) {
      case 1:
        gemm_panel<M, kStart, 1>(g, rows, n * kLanes, b);
        break;
      case 2:
        gemm_panel<M, kStart, 2>(g, rows, n * kLanes, b);
        break;
#if LMK_LANES == 16
      case 3:
        gemm_panel<M, kStart, 3>(g, rows, n * kLanes, b);
        break;
      case 4:
        gemm_panel<M, kStart, 4>(g, rows, n * kLanes, b);
        break;
#endif
    }
    n += width;
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
