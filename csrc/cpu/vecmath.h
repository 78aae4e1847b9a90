// exp and tanh on vectors, log on rows. Included once per instruction set after vec.h, hence no include guard.
// The stated errors are maxima against float64: for float over all 2^32 arguments, of which
// tests/micro/test_micro_math.py tries every 2003rd on every instruction set.

namespace lmk {
namespace LMK_NS {
namespace {

constexpr double kLog2e = 1.4426950408889634074;

// e^x for x <= 88: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial for e^r that is 1 at 0 (minimax in relative
// error). ln 2 comes in two parts, of which n times the first is exact. What is too small for a normal number is 0
// (-inf too); NaN gives NaN.

// Degree 6 (2.6e-9 before rounding): 1.2 ulp, 1.5 without fused multiply-add.
inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V least = V::set1(-87.33654f);  // ln of the least normal number
#if LMK_LANES == 16
  const __mmask16 normal = _mm512_cmp_ps_mask(x.v, least.v, _CMP_NLT_UQ);
#else
  const V y = x;
  x = max(least, x);
#endif
  const V n = round_small(x * V::set1(float(kLog2e)));
  const V r = fma(n, V::set1(2.12194440e-4f), fma(n, V::set1(-0.693359375f), x));
  V p = V::set1(0.001406123991f);
  p = fma(p, r, V::set1(0.008379011126f));
  p = fma(p, r, V::set1(0.0416647773f));
  p = fma(p, r, V::set1(0.1666636544f));
  p = fma(p, r, V::set1(0.5000000434f));
  p = fma(p, r, V::set1(1.00000005f));
  p = fma(p, r, V::set1(1.f));
#if LMK_LANES == 16
  return {_mm512_maskz_scalef_ps(normal, p.v, n.v)};  // Intel takes 100 cycles and more where a lane underflows
#else
  return select_less(y, least, V::zero(), scale_by_power(p, n));
#endif
}

// Degree 11 (1.8e-17 before rounding): 2 ulp.
inline Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  const V least = V::set1(-708.3964185322641), y = x;  // ln of the least normal number
  x = max(least, x);
  const V n = round_small(x * V::set1(kLog2e));
  const V r = fma(n, V::set1(-1.4286068203094172321e-6), fma(n, V::set1(-0.693145751953125), x));
  V p = V::set1(2.2981310730188986964e-8);
  p = fma(p, r, V::set1(2.762629648283823248e-7));
  p = fma(p, r, V::set1(2.7564254933064211638e-6));
  p = fma(p, r, V::set1(0.000024801504511273601439));
  p = fma(p, r, V::set1(0.00019841261491387473839));
  p = fma(p, r, V::set1(0.0013888888932340544049));
  p = fma(p, r, V::set1(0.0083333333377154633942));
  p = fma(p, r, V::set1(0.041666666666573636859));
  p = fma(p, r, V::set1(0.16666666666657302367));
  p = fma(p, r, V::set1(0.50000000000000055724));
  p = fma(p, r, V::set1(1.0000000000000005588));
  p = fma(p, r, V::set1(1.0));
  return select_less(y, least, V::zero(), scale_by_power(p, n));
}

#if LMK_BF16_DOT
// 2^x and e^x for weights that are rounded to bfloat16 (2e-3) at once: x = n + r, 0 <= r < 1, and degree 4: relative
// error 3e-6, and of e^x what the rounding of x / ln 2 adds, 8e-6 in all.
inline Vec<float> exp2_bf16(Vec<float> x) {
  using V = Vec<float>;
  const V r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  V p = V::set1(1.34266902e-2f);
  p = fma(p, r, V::set1(5.22424647e-2f));
  p = fma(p, r, V::set1(2.41280209e-1f));
  p = fma(p, r, V::set1(6.93044844e-1f));
  p = fma(p, r, V::set1(1.f));
  return scale_by_power(p, x);  // by 2^floor(x); -inf, of which r is 0, gives 0
}
// 2^x likewise, of degree 5: relative error 2.0e-7.
inline Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
  const V r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  V p = V::set1(1.86713145e-3f);
  p = fma(p, r, V::set1(9.01702512e-3f));
  p = fma(p, r, V::set1(5.57999201e-2f));
  p = fma(p, r, V::set1(2.40164444e-1f));
  p = fma(p, r, V::set1(6.93151295e-1f));
  p = fma(p, r, V::set1(1.f));
  return scale_by_power(p, x);
}
inline Vec<float> exp_bf16(Vec<float> x) { return exp2_bf16(x * Vec<float>::set1(float(kLog2e))); }
#endif

// Odd polynomial below 0.625, 1 - 2 / (e^2x + 1) above: 1.4 ulp.
inline Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  const V z = x * x;
  V p = V::set1(2.29274481e-3f);
  p = fma(p, z, V::set1(-8.34394551e-3f));
  p = fma(p, z, V::set1(2.17689186e-2f));
  p = fma(p, z, V::set1(-5.39592596e-2f));
  p = fma(p, z, V::set1(1.33333036e-1f));
  p = fma(p, z, V::set1(-3.33333332e-1f));
  const V small = fma(p * z, x, x);
  // |x| through max: NaN stays NaN
  const V a = min(V::set1(20.f), max(V::zero() - x, x));
  const V big = V::set1(1.f) - V::set1(2.f) / (exp(a + a) + V::set1(1.f));
  const V signed_big = select_less(x, V::zero(), V::zero() - big, big);
  return select_less(z, V::set1(0.390625f), small, signed_big);
}

inline Vec<double> tanh(Vec<double> x) {
  double lanes[Vec<double>::kLanes];
  x.store(lanes);
  for (double& lane : lanes) lane = std::tanh(lane);
  return Vec<double>::load(lanes);
}

// y (n,) = natural logarithm of x (n,), positive and normal; NaN stays NaN. x = 2^e (1 + f) with 1 + f in
// [sqrt(1/2), sqrt(2)), and a polynomial of degree 8 in f. The error is 2.6e-8, or 1 ulp of float where that is less:
// what is added to it next is rounded once.
inline void log_row(const float* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    const int32_t e = (bits - 0x3f3504f3) >> 23;
    bits -= e * (1 << 23);
    float f;
    memcpy(&f, &bits, 4);
    f -= 1.f;
    float p = 0.0697161147f;
    p = p * f - 0.1147973385f;
    p = p * f + 0.1168541992f;
    p = p * f - 0.1242568733f;
    p = p * f + 0.1424905766f;
    p = p * f - 0.1666780232f;
    p = p * f + 0.2000071575f;
    p = p * f - 0.2499999696f;
    p = p * f + 0.3333333118f;
    const double log = double(f + f * f * (f * p - 0.5f)) + e * 0.69314718055994530942;
    y[i] = x[i] == x[i] ? log : double(x[i]);
  }
}

inline void log_row(const double* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = std::log(x[i]);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
