// Dropout for one instruction set; included by dropout.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "philox.h"

namespace lmk {
namespace LMK_NS {
namespace {

// out (n,) = factor * x + residual
template <class E, class D>
void scale_and_add(const E* x, const D* residual, const Acc<E>* factor, int64_t n, D* out) {
  using V = Vec<Acc<E>>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) {
    V y = load_vec(x + i) * V::load(factor + i);
    if (residual) y = y + load_vec(residual + i);
    store_vec(y, out + i);
  }
  for (; i < n; ++i) {
    Acc<E> y = widen(x[i]) * factor[i];
    if (residual) y += widen(residual[i]);
    narrow(y, out + i);
  }
}

template <class E, class D>
void dropout_of(const DropoutArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kCounters = LMK_LANES, kUnit = 8 * kCounters;
  static_assert(kDropoutUnit % kUnit == 0);
  const Acc<E> scale = Acc<E>(kDropoutSteps) / Acc<E>(kDropoutSteps - a.dropped);
  const D* residual = static_cast<const D*>(a.residual);
  for (int64_t e = begin; e < end; e += kUnit) {
    const uint64_t counter = uint64_t(e) / 8;
    uint32_t words[4 * kCounters];
    philox(a.seed, uint32_t(counter), uint32_t(counter >> 32), 0, 0, words);
    Acc<E> factor[kUnit];
    for (int i = 0; i < kUnit / 2; ++i) {
      factor[2 * i] = int32_t(words[i] & 0xffff) < a.dropped ? 0 : scale;
      factor[2 * i + 1] = int32_t(words[i] >> 16) < a.dropped ? 0 : scale;
    }
    scale_and_add(static_cast<const E*>(a.x) + e, residual ? residual + e : nullptr, factor,
                  end - e < kUnit ? end - e : kUnit, static_cast<D*>(a.out) + e);
  }
}

template <class E>
void dropout_from(const DropoutArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == a.x_dtype) return dropout_of<E, E>(a, begin, end);
  if constexpr (sizeof(E) == 2) return dropout_of<E, float>(a, begin, end);
  if constexpr (sizeof(E) == 4)
    return a.dtype == DType::bf16 ? dropout_of<E, Bf16>(a, begin, end) : dropout_of<E, F16>(a, begin, end);
}

void dropout(const DropoutArgs& a, int64_t begin, int64_t end) {
  switch (a.x_dtype) {
    case DType::f32:
      return dropout_from<float>(a, begin, end);
    case DType::bf16:
      return dropout_from<Bf16>(a, begin, end);
    case DType::f16:
      return dropout_from<F16>(a, begin, end);
    case DType::f64:
      return dropout_from<double>(a, begin, end);
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
