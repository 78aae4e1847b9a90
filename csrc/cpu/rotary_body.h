// Rotary position embedding for one instruction set; included by rotary.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "rotate.h"

namespace lmk {
namespace LMK_NS {
namespace {

// cos and sin of a token as the loops above read them.
template <class T>
void token_angles(const RotaryArgs& a, int64_t b, int64_t row, T* cos, T* sin) {
  const int64_t n = a.pairs, bytes = element_size(a.table_dtype);
  load_row(a.table_dtype, static_cast<const char*>(a.cos.data) + (b * a.cos.batch + row * a.cos.row) * bytes, n, cos);
  load_row(a.table_dtype, static_cast<const char*>(a.sin.data) + (b * a.sin.batch + row * a.sin.row) * bytes, n, sin);
  if (a.inverse)
    for (int64_t i = 0; i < n; ++i) sin[i] = -sin[i];
  if (a.interleaved) repeat_angles(n, cos, sin);
}

template <class E>
[[gnu::always_inline]] inline void prefetch_row(const E* x, int64_t n) {
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
    for (int64_t h = 0; h < a.heads; ++h, x += a.x_head, out += a.head_dim) {
      if (s + 1 < a.seq) prefetch_row(x + a.x_seq, a.head_dim);
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
