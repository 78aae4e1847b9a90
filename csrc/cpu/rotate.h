// Rotations of a row's column pairs by the angles of its position. Included once per instruction set after elements.h,
// hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

// (a, b, c, d, ...) -> (b, a, d, c, ...)
#if LMK_LANES == 16
inline Vec<float> swap_pairs(Vec<float> x) { return {_mm512_permute_ps(x.v, 0xb1)}; }
inline Vec<double> swap_pairs(Vec<double> x) { return {_mm512_permute_pd(x.v, 0x55)}; }
#elif LMK_LANES == 8
inline Vec<float> swap_pairs(Vec<float> x) { return {_mm256_permute_ps(x.v, 0xb1)}; }
inline Vec<double> swap_pairs(Vec<double> x) { return {_mm256_permute_pd(x.v, 0x5)}; }
#else
template <class V>
inline V swap_pairs(V x) {
  V y;
  for (int i = 0; i < V::kLanes; ++i) y.v[i] = x.v[i ^ 1];
  return y;
}
#endif

// out = (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 (n,) of a row. The last vector overlaps the one
// before.
template <class E>
inline void rotate_halves(const E* x, const Acc<E>* cos, const Acc<E>* sin, int64_t n, E* out) {
  using V = Vec<Acc<E>>;
  if (n < V::kLanes) {
    for (int64_t i = 0; i < n; ++i) {
      const Acc<E> a = widen(x[i]), b = widen(x[n + i]);
      narrow(a * cos[i] - b * sin[i], out + i);
      narrow(b * cos[i] + a * sin[i], out + n + i);
    }
    return;
  }
  int64_t i = 0;
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
    V low[2], high[2];
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * V::kLanes;
      const V a = load_vec(x + at), b = load_vec(x + n + at), c = V::load(cos + at), s = V::load(sin + at);
      low[k] = a * c - b * s, high[k] = fma(a, s, b * c);
    }
    store_pair(low[0], low[1], out + i);
    store_pair(high[0], high[1], out + n + i);
  }
  for (; i < n; i += V::kLanes) {
    const int64_t at = i + V::kLanes <= n ? i : n - V::kLanes;
    const V a = load_vec(x + at), b = load_vec(x + n + at), c = V::load(cos + at), s = V::load(sin + at);
    store_vec(a * c - b * s, out + at);
    store_vec(fma(a, s, b * c), out + n + at);
  }
}

// out = x cos + swapped(x) sin over a row of n columns, where the tables hold each angle twice: cos, cos and -sin, sin.
template <class E>
inline void rotate_pairs(const E* x, const Acc<E>* cos, const Acc<E>* sin, int64_t n, E* out) {
  using V = Vec<Acc<E>>;
  if (n < V::kLanes) {
    for (int64_t i = 0; i < n; ++i) narrow(widen(x[i]) * cos[i] + widen(x[i ^ 1]) * sin[i], out + i);
    return;
  }
  int64_t i = 0;
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
    V y[2];
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * V::kLanes;
      const V a = load_vec(x + at);
      y[k] = fma(swap_pairs(a), V::load(sin + at), a * V::load(cos + at));
    }
    store_pair(y[0], y[1], out + i);
  }
  for (; i < n; i += V::kLanes) {
    const int64_t at = i + V::kLanes <= n ? i : n - V::kLanes;
    const V a = load_vec(x + at);
    store_vec(fma(swap_pairs(a), V::load(sin + at), a * V::load(cos + at)), out + at);
  }
}

// The angles (n,) of a position twice each, as rotate_pairs reads them: cos, cos and -sin, sin; in place.
template <class T>
inline void repeat_angles(int64_t n, T* cos, T* sin) {
  for (int64_t i = n - 1; i >= 0; --i) {
    const T s = sin[i];
    cos[2 * i + 1] = cos[2 * i] = cos[i];
    sin[2 * i] = -s;
    sin[2 * i + 1] = s;
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
