// Activations and their derivatives on vectors. Included once per instruction set after vecmath.h and after
// activation.h, hence no include guard.
//
// Tails come from formulas of their own, not from 1 minus something near 1, so gelu(-5) keeps its digits. The stated
// errors are of float; tests/micro/test_micro_math.py sweeps them on every instruction set. A call names its type,
// activate<float>(...), because generic vectors convert.

namespace lmk {
namespace LMK_NS {
namespace {

template <class T, class F>
inline Vec<T> each_lane(F function, Vec<T> x) {
  T lanes[Vec<T>::kLanes];
  x.store(lanes);
  for (T& lane : lanes) lane = function(lane);
  return Vec<T>::load(lanes);
}

// |x|; NaN stays NaN
template <class T>
inline Vec<T> absolute(Vec<T> x) {
  return max(Vec<T>::zero() - x, x);
}

// s and 1 - s, both exact in the tails.
template <class T>
struct Complements {
  Vec<T> s, rest;
};

// Functions with kRounded are for results that are rounded to bfloat16 at once, where the instruction set has it.
#if LMK_BF16_DOT
inline Vec<float> inverse_bf16(Vec<float> x) { return {_mm512_rcp14_ps(x.v)}; }  // relative error 6e-5
#endif

// 1 / (1 + e^-x)
template <class T, bool kRounded = false>
inline Complements<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  const V one = V::set1(T(1)), minus = V::zero() - absolute<T>(x);
  V e, near;
#if LMK_BF16_DOT
  if constexpr (kRounded)
    e = exp_bf16(minus), near = inverse_bf16(one + e);
  else
#endif
    e = exp(minus), near = one / (one + e);
  const V far = e * near;
  return {select_less(x, V::zero(), far, near), select_less(x, V::zero(), near, far)};
}

// Phi(x) and the density phi(x) of the normal distribution
template <class T>
struct Normal {
  Vec<T> cdf, density;
};

// 1 - Phi(a) = e^(-a^2 / 2) m(a) for a >= 0, where m is a polynomial in (a - 3) / (a + 3) (degree 9, minimax in
// relative error: 6.6e-9 before rounding). Beyond 20 everything is 0.
inline Normal<float> normal(Vec<float> x) {
  using V = Vec<float>;
  const V a = min(V::set1(20.f), absolute(x)), half_a = a * V::set1(0.5f), h = half_a * a;
  const V lost = fma(half_a, a, V::zero() - h);  // of h, by rounding: its exponential would magnify it
  const V e = exp(V::zero() - h), kernel = fma(V::zero() - e, lost, e);
  const V t = (a - V::set1(3.f)) / (a + V::set1(3.f));
  V m = V::set1(5.415085871e-05f);
  m = fma(m, t, V::set1(0.0001160373792f));
  m = fma(m, t, V::set1(-0.0003399113378f));
  m = fma(m, t, V::set1(-0.0009841827703f));
  m = fma(m, t, V::set1(0.00290470263f));
  m = fma(m, t, V::set1(0.006132183066f));
  m = fma(m, t, V::set1(-0.04621331381f));
  m = fma(m, t, V::set1(0.1232250217f));
  m = fma(m, t, V::set1(-0.2064026179f));
  m = fma(m, t, V::set1(0.1215139477f));
  const V tail = kernel * m;
  return {select_less(x, V::zero(), tail, V::set1(1.f) - tail), kernel * V::set1(0.3989422804f)};
}

#if LMK_BF16_DOT
// The same with degree 5 (8.3e-5), relative error 2e-4 in all.
inline Normal<float> normal_bf16(Vec<float> x) {
  using V = Vec<float>;
  const V a = min(V::set1(20.f), absolute(x)), kernel = exp2_bf16(a * a * V::set1(float(-0.5 * kLog2e)));
  const V t = (a - V::set1(3.f)) * inverse_bf16(a + V::set1(3.f));
  V m = V::set1(0.0025430358946f);
  m = fma(m, t, V::set1(0.0051854918711f));
  m = fma(m, t, V::set1(-0.045988406986f));
  m = fma(m, t, V::set1(0.12345488369f));
  m = fma(m, t, V::set1(-0.20644827187f));
  m = fma(m, t, V::set1(0.12150771171f));
  const V tail = kernel * m;
  return {select_less(x, V::zero(), tail, V::set1(1.f) - tail), kernel * V::set1(0.3989422804f)};
}
#endif

inline double normal_cdf(double x) { return 0.5 * std::erfc(x * -0.70710678118654752440); }
inline double normal_density(double x) { return 0.39894228040143267794 * std::exp(-0.5 * x * x); }
inline Normal<double> normal(Vec<double> x) { return {each_lane(normal_cdf, x), each_lane(normal_density, x)}; }

// gelu_tanh(x) = x sigmoid<T>(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class T>
inline Vec<T> gelu_tanh_argument(Vec<T> x) {  // 2 u
  using V = Vec<T>;
  return x * fma(x * x, V::set1(T(0.071354816272600247)), V::set1(T(1.5957691216057307117)));
}
template <class T>
inline Vec<T> gelu_tanh_slope(Vec<T> x) {  // of 2 u
  using V = Vec<T>;
  const V square = min(V::set1(T(1e4)), x * x);  // far out the slope meets a 0, which must win
  return fma(square, V::set1(T(0.214064448817800741)), V::set1(T(1.5957691216057307117)));
}

template <class T>
struct Activated {
  Vec<T> value, slope;
};

// An activation and its derivative, of which only what is used is computed. Values: silu, relu and tanh 4 ulp; gelu 4
// ulp for |x| <= 4; gelu_tanh 20 ulp there, as the exponential magnifies the rounding of its argument. Without fused
// multiply-add gelu has 7. The error beyond is below 1e-8. Slopes: 2 ulp of 1; relu has 0 at 0. With kRounded the
// relative error of gelu, gelu_tanh and silu is 3e-4, that of slopes 3e-4 of 1.
template <class T, bool kRounded = false>
[[gnu::always_inline]] inline Activated<T> activated(Activation activation, Vec<T> x) {
  using V = Vec<T>;
  const V one = V::set1(T(1));
  switch (activation) {
    case Activation::none:
      break;
    case Activation::gelu: {
      Normal<T> n;
#if LMK_BF16_DOT
      if constexpr (kRounded)
        n = normal_bf16(x);
      else
#endif
        n = normal(x);
      return {x * n.cdf, fma(x, n.density, n.cdf)};
    }
    case Activation::gelu_tanh: {
      const Complements<T> c = sigmoid<T, kRounded>(gelu_tanh_argument(x));
      const V value = x * c.s;
      return {value, fma(value, c.rest * gelu_tanh_slope(x), c.s)};
    }
    case Activation::silu: {
      const Complements<T> c = sigmoid<T, kRounded>(x);
      const V value = x * c.s;
      return {value, fma(value, c.rest, c.s)};
    }
    case Activation::relu:
      return {max(V::zero(), x), select_less(V::zero(), x, one, V::zero())};
    case Activation::tanh: {
      const Complements<T> c = sigmoid<T>(x + x);
      return {tanh(x), V::set1(T(4)) * c.s * c.rest};
    }
  }
  return {x, one};
}

template <class T, bool kRounded = false>
[[gnu::always_inline]] inline Vec<T> activate(Activation activation, Vec<T> x) {
  return activated<T, kRounded>(activation, x).value;
}
template <class T, bool kRounded = false>
inline Vec<T> activate_grad(Activation activation, Vec<T> x) {
  return activated<T, kRounded>(activation, x).slope;
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
