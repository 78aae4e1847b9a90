// Rotary position embedding for one instruction set; included by rotary.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"

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
  for (int64_t i = 0; i < n; i += V::kLanes) {
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
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const int64_t at = i + V::kLanes <= n ? i : n - V::kLanes;
    const V a = load_vec(x + at);
    store_vec(fma(swap_pairs(a), V::load(sin + at), a * V::load(cos + at)), out + at);
  }
}

// cos and sin of a token as the loops above read them.
template <class T>
void token_angles(const RotaryArgs& a, int64_t b, int64_t row, T* cos, T* sin) {
  const int64_t n = a.pairs, bytes = element_size(a.table_dtype);
  load_row(a.table_dtype, static_cast<const char*>(a.cos.data) + (b * a.cos.batch + row * a.cos.row) * bytes, n, cos);
  load_row(a.table_dtype, static_cast<const char*>(a.sin.data) + (b * a.sin.batch + row * a.sin.row) * bytes, n, sin);
  if (a.inverse)
    for (int64_t i = 0; i < n; ++i) sin[i] = -sin[i];
  if (!a.interleaved) return;
  for (int64_t i = n - 1; i >= 0; --i) {
    const T s = sin[i];
    cos[2 * i + 1] = cos[2 * i] = cos[i];
    sin[2 * i] = -s;
    sin[2 * i + 1] = s;
  }
}

template <class E>
inline void prefetch_row(const E* x, int64_t n) {
  const char* p = reinterpret_cast<const char*>(x);
  for (int64_t i = 0; i < n * int64_t(sizeof(E)); i += 64) __builtin_prefetch(p + i);
}

template <class E>
void rotary(const RotaryArgs& a, int64_t first, int64_t n, void* scratch) {
  using T = Acc<E>;
  T *cos = static_cast<T*>(scratch), *sin = cos + 2 * a.pairs;
  const int64_t rotated = 2 * a.pairs, rest = a.head_dim - rotated;
  E* out = static_cast<E*>(a.out) + first * a.heads * a.head_dim;
  for (int64_t token = first; token < first + n; ++token) {
    const int64_t b = token / a.seq, s = token % a.seq;
    token_angles(a, b, a.positions.at(b, s), cos, sin);
    const E* x = static_cast<const E*>(a.x) + b * a.x_batch + s * a.x_seq;
    if (s + 1 < a.seq)
      for (int64_t h = 0; h < a.heads; ++h) prefetch_row(x + a.x_seq + h * a.x_head, a.head_dim);
    for (int64_t h = 0; h < a.heads; ++h, x += a.x_head, out += a.head_dim) {
      if (a.interleaved)
        rotate_pairs(x, cos, sin, rotated, out);
      else
        rotate_halves(x, cos, sin, a.pairs, out);
      if (rest > 0) memcpy(out + rotated, x + rotated, size_t(rest) * sizeof(E));
    }
  }
}

// One per DType, in its order.
constexpr RotaryFn kRotary[] = {rotary<float>, rotary<Bf16>, rotary<F16>, rotary<double>};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
