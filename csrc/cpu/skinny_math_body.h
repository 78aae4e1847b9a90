// How a vector of weights meets x. Included by skinny_body.h.
//
// Each struct gives
//   Acc, V, Elem, X   of sums, of a vector of sums, of the weight and of packed x
//   W                 a register of weights or of x
//   kDepth            weights along the depth in one register, where they are neighbours in memory
//   kPack             weights along the depth in one lane, where columns are neighbours in memory

namespace lmk {
namespace LMK_NS {
namespace {

inline Vec<float> load_bf16(const uint16_t* p) {
#if LMK_LANES == 16
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
#elif LMK_LANES == 8
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
#else
  float lanes[LMK_LANES];
  for (int i = 0; i < LMK_LANES; ++i) lanes[i] = from_bits(uint32_t(p[i]) << 16);
  return Vec<float>::load(lanes);
#endif
}

inline Vec<float> load_f16(const uint16_t* p) {
#if LMK_LANES == 16
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#elif LMK_LANES == 8
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#else
  float lanes[LMK_LANES];
  for (int i = 0; i < LMK_LANES; ++i) lanes[i] = from_f16(p[i]);
  return Vec<float>::load(lanes);
#endif
}

// Register tiles: rows of x by columns of the result where a weight's row is contiguous, rows by vectors of columns
// where a column's neighbours are.
#if LMK_LANES == 16
constexpr int kDotRows = 6, kColumnVecs = 4;
#else
constexpr int kDotRows = 3, kColumnVecs = 2;
#endif
constexpr int kDotCols = 4, kColumnRows = 6;

template <class T>
struct SkinnySame {
  using Acc = T;
  using V = Vec<T>;
  using Elem = T;
  using X = T;
  using W = V;
  static constexpr int kDepth = V::kLanes, kPack = 1;
  static W load(const Elem* p) { return V::load(p); }
  static W load_x(const X* p) { return V::load(p); }
  static W broadcast_x(const X* p) { return V::set1(*p); }
  static V dot(V acc, W w, W x) { return fma(w, x, acc); }
  static void load_columns(const Elem* p, int64_t, W (&w)[kColumnVecs]) {
    for (int i = 0; i < kColumnVecs; ++i) w[i] = load(p + i * V::kLanes);
  }
  static void order_columns(Acc*, int64_t) {}
};

// 16-bit weights become float in a register.
template <Vec<float> (*kLoad)(const uint16_t*)>
struct SkinnyWiden : SkinnySame<float> {
  using Elem = uint16_t;
  static W load(const Elem* p) { return kLoad(p); }
  static void load_columns(const Elem* p, int64_t, W (&w)[kColumnVecs]) {
    for (int i = 0; i < kColumnVecs; ++i) w[i] = load(p + i * V::kLanes);
  }
};

#if LMK_BF16_DOT
// Pairs along the depth, multiplied and added by vdpbf16ps.
struct SkinnyBf16 {
  using Acc = float;
  using V = Vec<float>;
  using Elem = uint16_t;
  using X = uint16_t;
  using W = __m512bh;
  static constexpr int kDepth = 32, kPack = 2;
  static W load(const Elem* p) { return reinterpret_cast<W>(_mm512_loadu_si512(p)); }
  static W load_x(const X* p) { return load(p); }
  static W broadcast_x(const X* p) {
    int pair;
    memcpy(&pair, p, 4);
    return reinterpret_cast<W>(_mm512_set1_epi32(pair));
  }
  static V dot(V acc, W w, W x) { return {_mm512_dpbf16_ps(acc.v, w, x)}; }
  // Of two rows: interleaving within 128 bits leaves columns 0-3, 8-11, ... of 32 in one register, 4-7, 12-15, ... in
  // the next.
  static void load_columns(const Elem* p, int64_t row, W (&w)[kColumnVecs]) {
    for (int i = 0; i < kColumnVecs; i += 2) {
      const __m512i even = _mm512_loadu_si512(p + i * 16), odd = _mm512_loadu_si512(p + row + i * 16);
      w[i] = reinterpret_cast<W>(_mm512_unpacklo_epi16(even, odd));
      w[i + 1] = reinterpret_cast<W>(_mm512_unpackhi_epi16(even, odd));
    }
  }
  // two vectors of sums as load_columns leaves them, into the order of the columns
  static void order(__m512& one, __m512& other) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const __m512 a = one, b = other;
    one = _mm512_permutex2var_ps(a, first, b), other = _mm512_permutex2var_ps(a, second, b);
  }
  // x (n,): such sums, in place; n is a multiple of 32
  static void order_columns(Acc* x, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) {
      __m512 one = _mm512_loadu_ps(x + i), other = _mm512_loadu_ps(x + i + 16);
      order(one, other);
      _mm512_storeu_ps(x + i, one);
      _mm512_storeu_ps(x + i + 16, other);
    }
  }
};
#endif

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
