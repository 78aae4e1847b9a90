// Vec<float> and Vec<double>: one SIMD register of the instruction set that this file is included for.
// Included once per instruction set (see foreach_isa.h), hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

template <class T>
struct Vec;

#if LMK_LANES == 4  // generic: 16-byte vectors of the compiler, for any architecture

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef double D2 __attribute__((vector_size(16)));
typedef int64_t L2 __attribute__((vector_size(16)));

template <class T, class Native, class NativeInt, int kN>
struct GenericVec {
  static constexpr int kLanes = kN;
  Native v;

  static GenericVec set1(T x) {
    GenericVec r;
    for (int i = 0; i < kN; ++i) r.v[i] = x;
    return r;
  }
  static GenericVec zero() { return {Native{}}; }
  static GenericVec load(const T* p) {
    GenericVec r;
    memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  void store(T* p) const { memcpy(p, &v, sizeof(v)); }

  friend GenericVec operator+(GenericVec a, GenericVec b) { return {a.v + b.v}; }
  friend GenericVec operator-(GenericVec a, GenericVec b) { return {a.v - b.v}; }
  friend GenericVec operator*(GenericVec a, GenericVec b) { return {a.v * b.v}; }
  friend GenericVec operator/(GenericVec a, GenericVec b) { return {a.v / b.v}; }
  // a * b + c
  friend GenericVec fma(GenericVec a, GenericVec b, GenericVec c) { return {a.v * b.v + c.v}; }
  // b where either is NaN
  friend GenericVec max(GenericVec a, GenericVec b) { return {a.v > b.v ? a.v : b.v}; }
  friend GenericVec min(GenericVec a, GenericVec b) { return {a.v < b.v ? a.v : b.v}; }
  // a < b ? x : y
  friend GenericVec select_less(GenericVec a, GenericVec b, GenericVec x, GenericVec y) {
    return {a.v < b.v ? x.v : y.v};
  }
  // Nearest integer, ties to even, for |x| < 2^22 (float) or 2^51 (double).
  friend GenericVec round_small(GenericVec x) {
    const GenericVec magic = set1(sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0));
    // volatile: (x + magic) - magic must not be simplified
    volatile Native sum = (x + magic).v;
    return {Native(sum) - magic.v};
  }
  // x * 2^n for integral n in [-126, 127] (float) or [-1022, 1023] (double)
  friend GenericVec scale_by_power(GenericVec x, GenericVec n) {
    // n + magic holds n + the bias in its low bits, by which it becomes the exponent
    const T magic = sizeof(T) == 4 ? T(12582912 + 127) : T(6755399441055744 + 1023);
    const Native sum = n.v + set1(magic).v;
    NativeInt bits;
    memcpy(&bits, &sum, sizeof(bits));
    bits <<= sizeof(T) == 4 ? 23 : 52;
    Native power;
    memcpy(&power, &bits, sizeof(power));
    return {x.v * power};
  }
  friend T reduce_add(GenericVec a) {
    T s = a.v[0];
    for (int i = 1; i < kN; ++i) s += a.v[i];
    return s;
  }
  friend T reduce_max(GenericVec a) {
    T s = a.v[0];
    for (int i = 1; i < kN; ++i) s = s > a.v[i] ? s : a.v[i];
    return s;
  }
};

template <>
struct Vec<float> : GenericVec<float, F4, I4, 4> {
  Vec() = default;
  Vec(GenericVec g) : GenericVec(g) {}
};
template <>
struct Vec<double> : GenericVec<double, D2, L2, 2> {
  Vec() = default;
  Vec(GenericVec g) : GenericVec(g) {}
};

#else

// The two widths differ in names only; LMK_SIMD(add, ps) is _mm256_add_ps or _mm512_add_ps.
#if LMK_LANES == 8
#define LMK_SIMD(op, type) _mm256_##op##_##type
#define LMK_REG_F __m256
#define LMK_REG_D __m256d
#else
#define LMK_SIMD(op, type) _mm512_##op##_##type
#define LMK_REG_F __m512
#define LMK_REG_D __m512d
#endif

// The operators stand outside the struct: gcc gives friends defined inside it the baseline target.
#define LMK_DEFINE_VEC(T, Reg, suffix, lanes)                                                          \
  template <>                                                                                          \
  struct Vec<T> {                                                                                      \
    static constexpr int kLanes = lanes;                                                               \
    Reg v;                                                                                             \
    static Vec set1(T x) { return {LMK_SIMD(set1, suffix)(x)}; }                                       \
    static Vec zero() { return {LMK_SIMD(setzero, suffix)()}; }                                        \
    static Vec load(const T* p) { return {LMK_SIMD(loadu, suffix)(p)}; }                               \
    void store(T* p) const { LMK_SIMD(storeu, suffix)(p, v); }                                         \
  };                                                                                                   \
  inline Vec<T> operator+(Vec<T> a, Vec<T> b) { return {LMK_SIMD(add, suffix)(a.v, b.v)}; }            \
  inline Vec<T> operator-(Vec<T> a, Vec<T> b) { return {LMK_SIMD(sub, suffix)(a.v, b.v)}; }            \
  inline Vec<T> operator*(Vec<T> a, Vec<T> b) { return {LMK_SIMD(mul, suffix)(a.v, b.v)}; }            \
  inline Vec<T> operator/(Vec<T> a, Vec<T> b) { return {LMK_SIMD(div, suffix)(a.v, b.v)}; }            \
  /* a * b + c */                                                                                      \
  inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) { return {LMK_SIMD(fmadd, suffix)(a.v, b.v, c.v)}; } \
  /* b where either is NaN */                                                                          \
  inline Vec<T> max(Vec<T> a, Vec<T> b) { return {LMK_SIMD(max, suffix)(a.v, b.v)}; }                  \
  inline Vec<T> min(Vec<T> a, Vec<T> b) { return {LMK_SIMD(min, suffix)(a.v, b.v)}; }
LMK_DEFINE_VEC(float, LMK_REG_F, ps, LMK_LANES)
LMK_DEFINE_VEC(double, LMK_REG_D, pd, LMK_LANES / 2)
#undef LMK_DEFINE_VEC
#undef LMK_REG_F
#undef LMK_REG_D

#if LMK_LANES == 8
// a < b ? x : y
inline Vec<float> select_less(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec<double> select_less(Vec<double> a, Vec<double> b, Vec<double> x, Vec<double> y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ))};
}
#else
// a < b ? x : y
inline Vec<float> select_less(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline Vec<double> select_less(Vec<double> a, Vec<double> b, Vec<double> x, Vec<double> y) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
#endif

#if LMK_LANES == 8

inline Vec<float> round_small(Vec<float> x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec<double> round_small(Vec<double> x) {
  return {_mm256_round_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// x * 2^n for integral n in [-126, 127]
inline Vec<float> scale_by_power(Vec<float> x, Vec<float> n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(bits))};
}
// x * 2^n for integral n in [-1022, 1023]
inline Vec<double> scale_by_power(Vec<double> x, Vec<double> n) {
  const __m256i wide = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n.v));
  const __m256i bits = _mm256_slli_epi64(_mm256_add_epi64(wide, _mm256_set1_epi64x(1023)), 52);
  return {_mm256_mul_pd(x.v, _mm256_castsi256_pd(bits))};
}

inline float reduce_add(Vec<float> a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec<float> a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline double reduce_add(Vec<double> a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline double reduce_max(Vec<double> a) {
  const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
}

#else

inline Vec<float> round_small(Vec<float> x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec<double> round_small(Vec<double> x) {
  return {_mm512_roundscale_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec<float> scale_by_power(Vec<float> x, Vec<float> n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline Vec<double> scale_by_power(Vec<double> x, Vec<double> n) { return {_mm512_scalef_pd(x.v, n.v)}; }
inline float reduce_add(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec<float> a) { return _mm512_reduce_max_ps(a.v); }
inline double reduce_add(Vec<double> a) { return _mm512_reduce_add_pd(a.v); }
inline double reduce_max(Vec<double> a) { return _mm512_reduce_max_pd(a.v); }

#endif
#undef LMK_SIMD
#endif

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
