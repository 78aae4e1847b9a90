// exp2 and tanh on vectors, log on rows. Included once per instruction set after vec.h, hence no include guard.
// The stated errors are the maxima over the whole range, found by sweeping against float64 (tests/ops/test_vecmath).

namespace lmk {
namespace LMK_NS {
namespace {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// 2^x for x <= 127: x = n + r, |r| <= 1/2, and a polynomial in r that is 1 at 0 (minimax in relative error).
// Below -126 the result fades to 0 (-inf gives exactly 0); NaN gives NaN.

// Degree 6 (2.6e-9 before rounding): 1.0 ulp.
inline Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
#if LMK_LANES == 16
  x = max(V::set1(-200.f), x);  // scalef gives 0; -inf - round(-inf) would be NaN
#else
  const V y = x;
  x = max(V::set1(-126.f), x);
#endif
  const V n = round_small(x);
  const V r = x - n;
  V p = V::set1(1.5594677015e-4f);
  p = fma(p, r, V::set1(1.3406643847e-3f));
  p = fma(p, r, V::set1(9.6176929762e-3f));
  p = fma(p, r, V::set1(5.5503105512e-2f));
  p = fma(p, r, V::set1(2.4022652783e-1f));
  p = fma(p, r, V::set1(6.9314721497e-1f));
  p = fma(p, r, V::set1(1.f));
#if LMK_LANES == 16
  return scale_by_power(p, n);
#else
  return select_less(y, V::set1(-126.f), V::zero(), scale_by_power(p, n));
#endif
}

// Degree 11 (1.8e-17 before rounding): 1.0 ulp.
inline Vec<double> exp2(Vec<double> x) {
  using V = Vec<double>;
  const V y = x;
  x = max(V::set1(-1022.0), x);
  const V n = round_small(x);
  const V r = x - n;
  V p = V::set1(4.0780717860928704165e-10);
  p = fma(p, r, V::set1(7.0725703945407994337e-9));
  p = fma(p, r, V::set1(1.0180647660573069343e-7));
  p = fma(p, r, V::set1(1.3215442675455852182e-6));
  p = fma(p, r, V::set1(1.525272738527518948e-5));
  p = fma(p, r, V::set1(1.5403530441571850099e-4));
  p = fma(p, r, V::set1(1.333355815343996974e-3));
  p = fma(p, r, V::set1(9.6181291076070026171e-3));
  p = fma(p, r, V::set1(5.5504108664790394528e-2));
  p = fma(p, r, V::set1(2.4022650695910098006e-1));
  p = fma(p, r, V::set1(6.9314718055994569675e-1));
  p = fma(p, r, V::set1(1.0));
  return select_less(y, V::set1(-1022.0), V::zero(), scale_by_power(p, n));
}

#if LMK_BF16_DOT
// Degree 4: relative error 3.6e-6, for weights that are rounded to bfloat16 (2e-3) at once.
inline Vec<float> exp2_bf16(Vec<float> x) {
  using V = Vec<float>;
  x = max(V::set1(-200.f), x);
  const V n = round_small(x);
  const V r = x - n;
  V p = V::set1(9.7829111866e-3f);
  p = fma(p, r, V::set1(5.5976883149e-2f));
  p = fma(p, r, V::set1(2.4020711101e-1f));
  p = fma(p, r, V::set1(6.9311360448e-1f));
  p = fma(p, r, V::set1(1.f));
  return scale_by_power(p, n);
}
#endif

// Odd polynomial below 0.625, 1 - 2 / (e^2x + 1) above: 2 ulp.
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
  const V big = V::set1(1.f) - V::set1(2.f) / (exp2(a * V::set1(float(2 * kLog2e))) + V::set1(1.f));
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
// [sqrt(1/2), sqrt(2)), and a polynomial of degree 8 in f: 1 ulp.
inline void log_row(const float* x, int64_t n, float* y) {
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
    // ln 2 in two parts: the high one times e is exact
    const float low = f * f * (f * p - 0.5f) + float(e) * -2.12194440e-4f;
    const float log = f + low + float(e) * 0.693359375f;
    y[i] = x[i] == x[i] ? log : x[i];
  }
}

inline void log_row(const double* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = std::log(x[i]);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
