// Softmax of rows for one instruction set; included by softmax.cpp through foreach_isa.h. A row comes from memory once:
// the passes after the first find it in the cache, and the longest one fetches the next row.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "passes.h"

namespace lmk {
namespace LMK_NS {
namespace {

// The largest element; NaN is passed over.
template <class E>
Acc<E> largest(const E* x, int64_t cols) {
  using T = Acc<E>;
  using V = Vec<T>;
  const T least_of_all = -std::numeric_limits<T>::infinity();
  V m[kUnroll];
  for (V& part : m) part = V::set1(least_of_all);
  int64_t i = 0;
  for (; i + kUnroll * V::kLanes <= cols; i += kUnroll * V::kLanes)
    for (int u = 0; u < kUnroll; u += 2) {
      V a, b;
      load_pair(x + i + u * V::kLanes, a, b);
      m[u] = max(a, m[u]);
      m[u + 1] = max(b, m[u + 1]);
    }
  for (; i < cols; i += V::kLanes) m[0] = max(load_up_to(x + i, cols - i, least_of_all), m[0]);
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

// e^x, exact enough for a result of elements E.
template <class E, class V>
inline V weight(V x) {
#if LMK_BF16_DOT
  if constexpr (std::is_same_v<E, Bf16>) return exp_bf16(x);
#endif
  return exp(x);
}

// e = exp(x - m), and its sum; next: the row to fetch
template <class E>
double exponentials(const E* x, int64_t cols, Acc<E> m, Acc<E>* e, const E* next) {
  using T = Acc<E>;
  using V = Vec<T>;
  const V shift = V::set1(m);
  double all = 0;
  for (int64_t b = 0; b < cols; b += kBlock<V>) {
    const int64_t end = least(cols, b + kBlock<V>);
    Sums<V> sum = no_sums<V>();
    int64_t i = b;
    for (; i + kUnroll * V::kLanes <= end; i += kUnroll * V::kLanes)
      for (int u = 0; u < kUnroll; ++u) {
        fetch_vec(next + i + u * V::kLanes, u);
        const V p = weight<E>(load_vec(x + i + u * V::kLanes) - shift);
        p.store(e + i + u * V::kLanes);
        sum.part[u] = sum.part[u] + p;
      }
    for (; i < end; i += V::kLanes) {
      const V p = weight<E>(load_up_to(x + i, end - i, -std::numeric_limits<T>::infinity()) - shift);
      store_up_to(p, end - i, e + i);
      sum.part[0] = sum.part[0] + p;
    }
    all += total(sum);
  }
  return all;
}

template <class E>
void fwd(const SoftmaxArgs& a, int64_t begin, int64_t end, void* scratch) {
  using T = Acc<E>;
  using V = Vec<T>;
  const int64_t cols = a.cols;
  T* buffer = static_cast<T*>(scratch);
  for (int64_t row = begin; row < end; ++row) {
    E* y = static_cast<E*>(a.out) + row * cols;
    T* e = buffer;  // in y itself where that has room
    if constexpr (sizeof(E) == sizeof(T)) e = reinterpret_cast<T*>(y);
    const E *x = row_in_dtype<E>(a.x, row, cols, buffer), *next = row_of<E>(a.x, row + 1);
    const T m = largest(x, cols);
    // a row of nothing but -inf: 0 in its place keeps the exponentials 0, and NaN
    const double sum = exponentials(x, cols, m > -std::numeric_limits<T>::infinity() ? m : T(0), e, next);
    const V factor = V::set1(sum == 0 ? T(0) : T(1 / sum));
    int64_t i = 0;
    for (; i + 2 * V::kLanes <= cols; i += 2 * V::kLanes)
      store_pair(V(V::load(e + i) * factor), V(V::load(e + i + V::kLanes) * factor), y + i);
    for (; i + V::kLanes <= cols; i += V::kLanes) store_vec(V(V::load(e + i) * factor), y + i);
    if (i < cols) store_up_to(V(load_up_to(e + i, cols - i) * factor), cols - i, y + i);
  }
}

// dx = y (dy - sum(y dy))
template <class E>
void bwd(const SoftmaxArgs& a, int64_t begin, int64_t end, void*) {
  using T = Acc<E>;
  using V = Vec<T>;
  const int64_t cols = a.cols;
  for (int64_t row = begin; row < end; ++row) {
    const E *y = row_of<E>(a.y, row), *dy = row_of<E>(a.dy, row);
    const E *next_y = row_of<E>(a.y, row + 1), *next_dy = row_of<E>(a.dy, row + 1);
    double all = 0;
    for (int64_t b = 0; b < cols; b += kBlock<V>) {
      const int64_t stop = least(cols, b + kBlock<V>);
      Sums<V> sum = no_sums<V>();
      int64_t i = b;
      for (; i + kUnroll * V::kLanes <= stop; i += kUnroll * V::kLanes)
        for (int u = 0; u < kUnroll; ++u)
          sum.part[u] = fma(load_vec(y + i + u * V::kLanes), load_vec(dy + i + u * V::kLanes), sum.part[u]);
      for (; i < stop; i += V::kLanes)
        sum.part[0] = fma(load_up_to(y + i, stop - i), load_up_to(dy + i, stop - i), sum.part[0]);
      all += total(sum);
    }
    const V delta = V::set1(T(all));
    E* dx = static_cast<E*>(a.out) + row * cols;
    int64_t i = 0;
    for (; i + V::kLanes <= cols; i += V::kLanes) {
      __builtin_prefetch(next_y + i);
      __builtin_prefetch(next_dy + i);
      store_vec(V(load_vec(y + i) * (load_vec(dy + i) - delta)), dx + i);
    }
    if (i < cols)
      store_up_to(V(load_up_to(y + i, cols - i) * (load_up_to(dy + i, cols - i) - delta)), cols - i, dx + i);
  }
}

template <class E>
constexpr SoftmaxKernels kernels_of() {
  return {int64_t(sizeof(Acc<E>)), fwd<E>, bwd<E>};
}

// One row per DType, in its order.
constexpr SoftmaxKernels kSoftmax[] = {kernels_of<float>(), kernels_of<Bf16>(), kernels_of<F16>(),
                                       kernels_of<double>()};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
