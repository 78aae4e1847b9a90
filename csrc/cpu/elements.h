// Elements of tensors, one vector at a time, as the vectors that sums are made in: float, double for double.
// Included once per instruction set after vec.h and rows.h, hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// The type that arithmetic on elements E is done in.
template <class E>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class E>
using Acc = typename AccOf<E>::type;

// Whether what is computed for an E may be as short as activation_body.h makes it with kRounded.
template <class E>
constexpr bool kRounds = LMK_BF16_DOT && std::is_same_v<E, Bf16>;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float widen(F16 x) { return from_f16(x.bits); }

inline void narrow(float x, float* p) { *p = x; }
inline void narrow(double x, double* p) { *p = x; }
inline void narrow(float x, Bf16* p) { p->bits = to_bf16(x); }
inline void narrow(float x, F16* p) { p->bits = to_f16(x); }

inline Vec<float> load_vec(const float* p) { return Vec<float>::load(p); }
inline Vec<double> load_vec(const double* p) { return Vec<double>::load(p); }
inline void store_vec(Vec<float> x, float* p) { x.store(p); }
inline void store_vec(Vec<double> x, double* p) { x.store(p); }

#if LMK_LANES == 16

inline Vec<float> load_vec(const Bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec<float> load_vec(const F16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Rounds as to_bf16 does, whose way subnormals always take: vcvtneps2bf16 would turn them into zeros.
inline void store_vec(Vec<float> x, Bf16* p) {
#if LMK_BF16_DOT
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(x.v, kSubnormal) == 0, 1)) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
    return;
  }
#endif
  const __m512i bits = _mm512_castps_si512(x.v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), nan, 0x7fc0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
inline void store_vec(Vec<float> x, F16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif LMK_LANES == 8

inline Vec<float> load_vec(const Bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec<float> load_vec(const F16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_vec(Vec<float> x, Bf16* p) {
  const __m256i bits = _mm256_castps_si256(x.v),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store_vec(Vec<float> x, F16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

template <class E>
inline Vec<float> load_vec(const E* p) {
  float lanes[Vec<float>::kLanes];
  for (int i = 0; i < Vec<float>::kLanes; ++i) lanes[i] = widen(p[i]);
  return Vec<float>::load(lanes);
}
template <class E>
inline void store_vec(Vec<float> x, E* p) {
  float lanes[Vec<float>::kLanes];
  x.store(lanes);
  for (int i = 0; i < Vec<float>::kLanes; ++i) narrow(lanes[i], p + i);
}

#endif

// Two vectors of neighbours in any order, for sums: bfloat16 needs no shuffle for that.
template <class E>
inline void load_pair(const E* p, Vec<Acc<E>>& a, Vec<Acc<E>>& b) {
  a = load_vec(p);
  b = load_vec(p + Vec<Acc<E>>::kLanes);
}
#if LMK_LANES == 16
inline void load_pair(const Bf16* p, Vec<float>& a, Vec<float>& b) {
  const __m512i bits = _mm512_loadu_si512(p);
  a = {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  b = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)))};
}
#endif

// Two vectors to neighbouring places: bfloat16 takes fewer instructions for both at once.
template <class E, class V>
inline void store_pair(V a, V b, E* p) {
  store_vec(a, p);
  store_vec(b, p + V::kLanes);
}
#if LMK_BF16_DOT
inline void store_pair(Vec<float> a, Vec<float> b, Bf16* p) {
  constexpr int kSubnormal = 0x20;
  const __mmask16 few = _mm512_fpclass_ps_mask(a.v, kSubnormal), more = _mm512_fpclass_ps_mask(b.v, kSubnormal);
  if (__builtin_expect(_mm512_kortestz(few, more), 1)) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
    return;
  }
  store_vec(a, p);
  store_vec(b, p + 16);
}
#endif

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
