// Layer norm and RMS norm for one instruction set; included by norms.cpp through foreach_isa.h.
//
// Rows go through the passes in groups that stay in the L1 cache: a row comes from memory once, and what one waits for
// at the end of its pass (the sum across a register, a square root) overlaps with the same pass of the next row.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "tails.h"

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kGroupRows = 8, kGroupBytes = 16 * 1024;

inline int64_t rows_of_group(const NormArgs& a) {
  const int64_t fit = kGroupBytes / (a.cols * element_size(a.dtype));
  return fit < 1 ? 1 : least(fit, kGroupRows);
}

constexpr int kUnroll = 4;  // independent sums hide the latency of an addition
// A sum grows by so many additions in the accumulator, and over these in double: a row of 50,000 is as exact as one of
// 768.
constexpr int64_t kAdditions = 32;
template <class V>
constexpr int64_t kBlock = kAdditions * kUnroll * V::kLanes;

template <class V>
struct Sums {
  V part[kUnroll];
};

template <class V>
inline Sums<V> no_sums() {
  return {{V::zero(), V::zero(), V::zero(), V::zero()}};
}

template <class V>
inline double total(const Sums<V>& s) {
  return double(reduce_add((s.part[0] + s.part[1]) + (s.part[2] + s.part[3])));
}

template <class E>
inline const E* row_of(const NormRows& x, int64_t row) {
  return static_cast<const E*>(x.data) + row * x.stride;
}

// The parameters as accumulators: in place where they are, else widened into the scratch.
template <class T>
const T* parameter(const NormVector& p, int64_t cols, T absent, T* scratch) {
  if (!p.data)
    for (int64_t i = 0; i < cols; ++i) scratch[i] = absent;
  else if (element_size(p.dtype) == sizeof(T))
    return static_cast<const T*>(p.data);
  else
    load_row(p.dtype, p.data, cols, scratch);
  return scratch;
}

// A row as elements E: in place where it is, else (16 bits beside float32) widened into the scratch.
template <class E>
const E* in_dtype(const NormRows& x, int64_t row, int64_t cols, Acc<E>* scratch) {
  if (element_size(x.dtype) == sizeof(E)) return row_of<E>(x, row);
  load_row(x.dtype, row_of<uint16_t>(x, row), cols, scratch);
  return reinterpret_cast<const E*>(scratch);
}

// What the first reading of a row sums: x (its mean is next), or x^2 where nothing is centred.
template <bool kCenter, class V>
inline void add_moment(V x, V& sum) {
  if constexpr (kCenter)
    sum = sum + x;
  else
    sum = fma(x, x, sum);
}

template <bool kCenter, class E>
double moment(const E* x, int64_t cols) {
  using V = Vec<Acc<E>>;
  double all = 0;
  for (int64_t b = 0; b < cols; b += kBlock<V>) {
    const int64_t end = least(cols, b + kBlock<V>);
    Sums<V> sums = no_sums<V>();
    int64_t i = b;
    for (; i + kUnroll * V::kLanes <= end; i += kUnroll * V::kLanes)
      for (int u = 0; u < kUnroll; u += 2) {
        V v[2];
        load_pair(x + i + u * V::kLanes, v[0], v[1]);
        for (int k = 0; k < 2; ++k) add_moment<kCenter>(v[k], sums.part[u + k]);
      }
    for (; i < end; i += V::kLanes) add_moment<kCenter>(load_up_to(x + i, end - i), sums.part[0]);
    all += total(sums);
  }
  return all;
}

// The same of s = x + residual, of the values as stored.
template <bool kCenter, class E>
double add_rows(const E* x, const E* residual, int64_t cols, E* s) {
  using V = Vec<Acc<E>>;
  double all = 0;
  for (int64_t b = 0; b < cols; b += kBlock<V>) {
    const int64_t end = least(cols, b + kBlock<V>);
    Sums<V> sums = no_sums<V>();
    int64_t i = b;
    for (; i + kUnroll * V::kLanes <= end; i += kUnroll * V::kLanes)
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = i + u * V::kLanes;
        store_vec(load_vec(x + at) + load_vec(residual + at), s + at);
        add_moment<kCenter>(load_vec(s + at), sums.part[u]);
      }
    for (; i < end; i += V::kLanes) {
      store_up_to(load_up_to(x + i, end - i) + load_up_to(residual + i, end - i), end - i, s + i);
      add_moment<kCenter>(load_up_to(s + i, end - i), sums.part[0]);
    }
    all += total(sums);
  }
  return all;
}

template <class V>
inline void add_deviation(V x, V mean, V& sum, V& squares) {
  const V d = x - mean;
  sum = sum + d;
  squares = fma(d, d, squares);
}

// Sum and sum of squares of x - mean.
template <class E>
void deviations(const E* x, int64_t cols, Acc<E> mean, double& sum, double& squares) {
  using V = Vec<Acc<E>>;
  const V m = V::set1(mean);
  sum = squares = 0;
  for (int64_t b = 0; b < cols; b += kBlock<V>) {
    const int64_t end = least(cols, b + kBlock<V>);
    Sums<V> s1 = no_sums<V>(), s2 = no_sums<V>();
    int64_t i = b;
    for (; i + kUnroll * V::kLanes <= end; i += kUnroll * V::kLanes)
      for (int u = 0; u < kUnroll; u += 2) {
        V v[2];
        load_pair(x + i + u * V::kLanes, v[0], v[1]);
        for (int k = 0; k < 2; ++k) add_deviation(v[k], m, s1.part[u + k], s2.part[u + k]);
      }
    for (; i < end; i += V::kLanes) add_deviation(load_up_to(x + i, end - i, mean), m, s1.part[0], s2.part[0]);
    sum += total(s1);
    squares += total(s2);
  }
}

// y = ((s - mean) rstd + shift) weight + bias; RMS norm is s rstd weight.
template <bool kCenter, class E>
struct Normalize {
  using T = Acc<E>;
  using V = Vec<T>;
  const E* s;
  T mean, rstd, shift;

  V operator()(int64_t i, int64_t n, const T* weight, const T* bias) const {
    const V x = load_up_to(s + i, n), w = load_up_to(weight + i, n);
    if constexpr (kCenter)
      return fma(fma(x - V::set1(mean), V::set1(rstd), V::set1(shift)), w, load_up_to(bias + i, n));
    else
      return x * V::set1(rstd) * w;
  }
};

template <class T>
int64_t scratch(const NormArgs& a) {
  return 4 * a.cols * int64_t(sizeof(T));  // two parameters; x and residual
}

template <bool kCenter, class E>
void fwd(const NormArgs& a, int64_t begin, int64_t end, void* scratch) {
  using T = Acc<E>;
  constexpr int64_t kLanes = Vec<T>::kLanes;
  T* buffer = static_cast<T*>(scratch);
  const int64_t cols = a.cols, group = rows_of_group(a);
  const double per_element = 1.0 / double(cols);
  const T* weight = parameter(a.weight, cols, T(1), buffer);
  const T* bias = kCenter ? parameter(a.bias, cols, T(0), buffer + cols) : nullptr;
  for (int64_t first = begin; first < end; first += group) {
    const int64_t rows = least(group, end - first);
    Normalize<kCenter, E> f[kGroupRows];
    double mean[kGroupRows], variance[kGroupRows];
    for (int64_t r = 0; r < rows; ++r) {
      const E* x = in_dtype<E>(a.x, first + r, cols, buffer + 2 * cols);
      double sum;
      if (a.residual.data) {
        E* s = static_cast<E*>(a.s) + (first + r) * cols;
        sum = add_rows<kCenter>(x, in_dtype<E>(a.residual, first + r, cols, buffer + 3 * cols), cols, s);
        f[r].s = s;
      } else {
        sum = moment<kCenter>(x, cols);
        f[r].s = x;
      }
      (kCenter ? mean : variance)[r] = sum * per_element;
    }
    for (int64_t r = 0; r < rows; ++r) {
      double rest = 0;
      if constexpr (kCenter) {
        // Rounding the mean may lose more than the values differ by; what is left of them has a mean of its own.
        double squares;
        f[r].mean = T(mean[r]);
        deviations(f[r].s, cols, f[r].mean, rest, squares);
        rest *= per_element;
        variance[r] = squares * per_element - rest * rest;
      }
      const double rstd = 1 / std::sqrt((variance[r] > 0 ? variance[r] : variance[r] * 0) + a.eps);
      f[r].rstd = T(rstd);
      f[r].shift = T(-rest * rstd);
      if (kCenter && a.mean) static_cast<T*>(a.mean)[first + r] = T(f[r].mean + rest);
      if (a.rstd) static_cast<T*>(a.rstd)[first + r] = f[r].rstd;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Normalize<kCenter, E> row = f[r];
      E* y = static_cast<E*>(a.y) + (first + r) * cols;
      int64_t i = 0;
      for (; i + kLanes <= cols; i += kLanes) store_vec(row(i, kLanes, weight, bias), y + i);
      if (i < cols) store_up_to(row(i, cols - i, weight, bias), cols - i, y + i);
    }
  }
}

// One row of the backward. g = dy weight is the gradient that arrives at h, the norm before weight and bias.
template <bool kCenter, class E>
struct Gradient {
  using T = Acc<E>;
  using V = Vec<T>;
  const E *dy, *s, *ds;
  T mean, rstd, mean_g, mean_gh;

  V h(int64_t i, int64_t n) const {
    V x = load_up_to(s + i, n, mean);
    if constexpr (kCenter) x = x - V::set1(mean);
    return x * V::set1(rstd);
  }

  // Sums of g and g h; adds dy h to dweight and dy to dbias, sums over the rows of the chunk.
  template <bool kParameters>
  void sum(int64_t i, int64_t n, const T* weight, T* dweight, T* dbias, V& sum_g, V& sum_gh) const {
    const V dout = load_up_to(dy + i, n), norm = h(i, n), g = dout * load_up_to(weight + i, n);
    sum_gh = fma(g, norm, sum_gh);
    if constexpr (kCenter) sum_g = sum_g + g;
    if constexpr (kParameters) {
      store_up_to(fma(dout, norm, load_up_to(dweight + i, n)), n, dweight + i);
      if constexpr (kCenter) store_up_to(dout + load_up_to(dbias + i, n), n, dbias + i);
    }
  }

  V dx(int64_t i, int64_t n, const T* weight) const {
    V d = load_up_to(dy + i, n) * load_up_to(weight + i, n);
    if constexpr (kCenter) d = d - V::set1(mean_g);
    d = fma(h(i, n), V::set1(-mean_gh), d) * V::set1(rstd);
    if (ds) d = d + load_up_to(ds + i, n);
    return d;
  }
};

template <bool kParameters, bool kCenter, class E>
void sum_row(Gradient<kCenter, E>& out, int64_t cols, const Acc<E>* weight, Acc<E>* dweight, Acc<E>* dbias) {
  using T = Acc<E>;
  using V = Vec<T>;
  const Gradient<kCenter, E> f = out;
  double sum_g = 0, sum_gh = 0;
  for (int64_t b = 0; b < cols; b += kBlock<V>) {
    const int64_t end = least(cols, b + kBlock<V>);
    Sums<V> g = no_sums<V>(), gh = no_sums<V>();
    int64_t i = b;
    for (; i + kUnroll * V::kLanes <= end; i += kUnroll * V::kLanes)
      for (int u = 0; u < kUnroll; ++u)
        f.template sum<kParameters>(i + u * V::kLanes, V::kLanes, weight, dweight, dbias, g.part[u], gh.part[u]);
    for (; i < end; i += V::kLanes)
      f.template sum<kParameters>(i, end - i, weight, dweight, dbias, g.part[0], gh.part[0]);
    sum_g += total(g);
    sum_gh += total(gh);
  }
  out.mean_g = T(sum_g / double(cols));
  out.mean_gh = T(sum_gh / double(cols));
}

template <bool kCenter, class E>
void bwd(const NormArgs& a, int64_t chunk, void* scratch) {
  using T = Acc<E>;
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const int64_t cols = a.cols, group = rows_of_group(a);
  const int64_t begin = chunk * a.chunk_rows, end = least(a.rows, begin + a.chunk_rows);
  const T* weight = parameter(a.weight, cols, T(1), static_cast<T*>(scratch));
  T *dweight = nullptr, *dbias = nullptr;
  if (a.partial) {
    dweight = static_cast<T*>(a.partial) + 2 * chunk * cols;
    dbias = dweight + cols;
    for (int64_t i = 0; i < 2 * cols; ++i) dweight[i] = 0;
  }
  for (int64_t first = begin; first < end; first += group) {
    const int64_t rows = least(group, end - first);
    Gradient<kCenter, E> f[kGroupRows];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first + r;
      f[r].dy = row_of<E>(a.dy, row);
      f[r].s = row_of<E>(a.sum, row);
      f[r].ds = a.ds.data ? row_of<E>(a.ds, row) : nullptr;
      f[r].mean = kCenter ? static_cast<const T*>(a.mean)[row] : T(0);
      f[r].rstd = static_cast<const T*>(a.rstd)[row];
      if (a.partial)
        sum_row<true>(f[r], cols, weight, dweight, dbias);
      else
        sum_row<false>(f[r], cols, weight, dweight, dbias);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Gradient<kCenter, E> row = f[r];
      E* dx = static_cast<E*>(a.dx) + (first + r) * cols;
      int64_t i = 0;
      for (; i + kLanes <= cols; i += kLanes) store_vec(row.dx(i, kLanes, weight), dx + i);
      if (i < cols) store_up_to(row.dx(i, cols - i, weight), cols - i, dx + i);
    }
  }
}

// Columns [begin, end) of a parameter's gradient: the chunks' sums, added in their order.
template <class T>
void sum_chunks(const NormArgs& a, const T* partial, DType dtype, void* out, int64_t begin, int64_t end) {
  using V = Vec<T>;
  T total[V::kLanes];
  for (int64_t i = begin; i < end; i += V::kLanes) {
    const int64_t n = least(V::kLanes, end - i);
    V v = V::zero();
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) v = v + load_up_to(partial + 2 * chunk * a.cols + i, n);
    v.store(total);
    store_row(dtype, total, n, static_cast<char*>(out) + i * element_size(dtype));
  }
}

template <class T>
void bwd_finish(const NormArgs& a, int64_t begin, int64_t end) {
  const T* partial = static_cast<const T*>(a.partial);
  if (a.dweight) sum_chunks(a, partial, a.weight.dtype, a.dweight, begin, end);
  if (a.dbias) sum_chunks(a, partial + a.cols, a.bias.dtype, a.dbias, begin, end);
}

template <bool kCenter, class E>
constexpr NormKernels kernels_of() {
  using T = Acc<E>;
  return {scratch<T>, fwd<kCenter, E>, bwd<kCenter, E>, bwd_finish<T>};
}

// One row per DType, in its order.
template <bool kCenter>
constexpr NormKernels kNorm[] = {kernels_of<kCenter, float>(), kernels_of<kCenter, Bf16>(), kernels_of<kCenter, F16>(),
                                 kernels_of<kCenter, double>()};
constexpr const NormKernels* kLayerNorm = kNorm<true>;
constexpr const NormKernels* kRmsNorm = kNorm<false>;

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
