// Layer norm and RMS norm for one instruction set; included by norms.cpp through foreach_isa.h.
//
// Rows go through the passes in groups that stay in the L1 cache: a row comes from memory once, and what one waits for
// at the end of its pass (the sum across a register, a square root) overlaps with the same pass of the next row.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "passes.h"

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kGroupRows = 8, kGroupBytes = 4 * 1024;

// row_bytes: of all that the passes read of one row
inline int64_t rows_of_group(int64_t row_bytes) {
  const int64_t fit = kGroupBytes / row_bytes;
  return fit < 1 ? 1 : least(fit, kGroupRows);
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

// Sum and sum of squares of x - mean; next: the row to fetch
template <class E>
void deviations(const E* x, int64_t cols, Acc<E> mean, const E* next, double& sum, double& squares) {
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
        for (int k = 0; k < 2; ++k) fetch_vec(next + i + (u + k) * V::kLanes, u + k);
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
  const int64_t cols = a.cols, group = rows_of_group(cols * int64_t(sizeof(E)));
  const double per_element = 1.0 / double(cols);
  const T* weight = parameter(a.weight, cols, T(1), buffer);
  const T* bias = kCenter ? parameter(a.bias, cols, T(0), buffer + cols) : nullptr;
  for (int64_t first = begin; first < end; first += group) {
    const int64_t rows = least(group, end - first);
    Normalize<kCenter, E> f[kGroupRows];
    double mean[kGroupRows], variance[kGroupRows];
    for (int64_t r = 0; r < rows; ++r) {
      const E* x = row_in_dtype<E>(a.x, first + r, cols, buffer + 2 * cols);
      double sum;
      if (a.residual.data) {
        E* s = static_cast<E*>(a.s) + (first + r) * cols;
        sum = add_rows<kCenter>(x, row_in_dtype<E>(a.residual, first + r, cols, buffer + 3 * cols), cols, s);
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
        deviations(f[r].s, cols, f[r].mean, row_of<E>(a.x, first + r + group), rest, squares);
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
      const E* next = row_of<E>(a.x, first + r + group);
      E* y = static_cast<E*>(a.y) + (first + r) * cols;
      int64_t i = 0;
      for (; i + 2 * kLanes <= cols; i += 2 * kLanes) {
        for (int k = 0; !kCenter && k < 2; ++k) fetch_vec(next + i + k * kLanes, k);
        store_pair(row(i, kLanes, weight, bias), row(i + kLanes, kLanes, weight, bias), y + i);
      }
      for (; i + kLanes <= cols; i += kLanes) store_vec(row(i, kLanes, weight, bias), y + i);
      if (i < cols) store_up_to(row(i, cols - i, weight, bias), cols - i, y + i);
    }
  }
}

// The backward. g = dy weight is the gradient that arrives at h, the norm before weight and bias.

// What is known of a row.
template <class E>
struct GradientRow {
  using T = Acc<E>;
  const E *dy, *s, *ds;
  T mean, rstd, mean_g, mean_gh;
};

template <bool kCenter, class E, class V>
inline V normalized(const E* s, int64_t n, V mean, V rstd) {
  V x = load_up_to(s, n);
  if constexpr (kCenter) x = x - mean;
  return x * rstd;
}

// A vector of columns of kRows rows: adds g and g h to sums of each row, dy h and dy to those of the columns.
template <bool kCenter, bool kParameters, int kRows, class E, class V>
inline void add_columns(const GradientRow<E>* f, int64_t i, int64_t n, const Acc<E>* weight, Acc<E>* dweight,
                        Acc<E>* dbias, const V (&mean)[kRows], const V (&rstd)[kRows], V (&g)[kRows], V (&gh)[kRows]) {
  const V w = load_up_to(weight + i, n);
  V dw = V::zero(), db = V::zero();
  if constexpr (kParameters) dw = load_up_to(dweight + i, n);
  if constexpr (kParameters && kCenter) db = load_up_to(dbias + i, n);
  for (int r = 0; r < kRows; ++r) {
    const V dy = load_up_to(f[r].dy + i, n), h = normalized<kCenter>(f[r].s + i, n, mean[r], rstd[r]), dh = dy * w;
    gh[r] = fma(dh, h, gh[r]);
    if constexpr (kCenter) g[r] = g[r] + dh;
    dw = fma(dy, h, dw);
    if constexpr (kCenter) db = db + dy;
  }
  if constexpr (kParameters) store_up_to(dw, n, dweight + i);
  if constexpr (kParameters && kCenter) store_up_to(db, n, dbias + i);
}

// First pass over kRows rows at once, so that the sums of columns are read and written once for all of them.
template <bool kCenter, bool kParameters, int kRows, class E>
void sum_rows(GradientRow<E>* f, int64_t cols, const Acc<E>* weight, Acc<E>* dweight, Acc<E>* dbias) {
  using T = Acc<E>;
  using V = Vec<T>;
  V mean[kRows], rstd[kRows];
  double sum_g[kRows], sum_gh[kRows];
  for (int r = 0; r < kRows; ++r) {
    mean[r] = V::set1(f[r].mean), rstd[r] = V::set1(f[r].rstd);
    sum_g[r] = sum_gh[r] = 0;
  }
  constexpr int64_t kColumns = 2 * kAdditions * V::kLanes;
  for (int64_t b = 0; b < cols; b += kColumns) {
    const int64_t end = least(cols, b + kColumns);
    V g[kRows], gh[kRows];
    for (int r = 0; r < kRows; ++r) g[r] = gh[r] = V::zero();
    int64_t i = b;
    for (; i + V::kLanes <= end; i += V::kLanes)
      add_columns<kCenter, kParameters>(f, i, V::kLanes, weight, dweight, dbias, mean, rstd, g, gh);
    if (i < end) add_columns<kCenter, kParameters>(f, i, end - i, weight, dweight, dbias, mean, rstd, g, gh);
    for (int r = 0; r < kRows; ++r) sum_g[r] += double(reduce_add(g[r])), sum_gh[r] += double(reduce_add(gh[r]));
  }
  for (int r = 0; r < kRows; ++r) {
    f[r].mean_g = T(sum_g[r] / double(cols));
    f[r].mean_gh = T(sum_gh[r] / double(cols));
  }
}

// Second pass, over n columns of a row: dx = rstd (g - mean(g) - h mean(g h)) + ds.
template <bool kCenter, class E>
inline Vec<Acc<E>> gradient(const GradientRow<E>& f, int64_t i, int64_t n, const Acc<E>* weight) {
  using V = Vec<Acc<E>>;
  const V mean = V::set1(f.mean), rstd = V::set1(f.rstd), h = normalized<kCenter>(f.s + i, n, mean, rstd);
  V g = load_up_to(f.dy + i, n) * load_up_to(weight + i, n);
  if constexpr (kCenter) g = g - V::set1(f.mean_g);
  V dx = fma(h, V::set1(-f.mean_gh), g) * rstd;
  if (f.ds) dx = dx + load_up_to(f.ds + i, n);
  return dx;
}

template <bool kCenter, int kRows, class E>
void bwd_rows(const NormArgs& a, int64_t first, const Acc<E>* weight, Acc<E>* dweight, Acc<E>* dbias) {
  using T = Acc<E>;
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const int64_t cols = a.cols;
  GradientRow<E> f[kRows];
  for (int r = 0; r < kRows; ++r) {
    f[r].dy = row_of<E>(a.dy, first + r);
    f[r].s = row_of<E>(a.sum, first + r);
    f[r].ds = a.ds.data ? row_of<E>(a.ds, first + r) : nullptr;
    f[r].mean = kCenter ? static_cast<const T*>(a.mean)[first + r] : T(0);
    f[r].rstd = static_cast<const T*>(a.rstd)[first + r];
  }
  if (dweight)
    sum_rows<kCenter, true, kRows>(f, cols, weight, dweight, dbias);
  else
    sum_rows<kCenter, false, kRows>(f, cols, weight, dweight, dbias);
  for (int r = 0; r < kRows; ++r) {
    const GradientRow<E> row = f[r];
    const E *next_dy = row_of<E>(a.dy, first + r + kRows), *next_s = row_of<E>(a.sum, first + r + kRows);
    E* dx = static_cast<E*>(a.dx) + (first + r) * cols;
    int64_t i = 0;
    for (; i + kLanes <= cols; i += kLanes) {
      __builtin_prefetch(next_dy + i);
      __builtin_prefetch(next_s + i);
      store_vec(gradient<kCenter>(row, i, kLanes, weight), dx + i);
    }
    if (i < cols) store_up_to(gradient<kCenter>(row, i, cols - i, weight), cols - i, dx + i);
  }
}

template <bool kCenter, class E>
void bwd(const NormArgs& a, int64_t chunk, void* scratch) {
  using T = Acc<E>;
  constexpr int kRows = 4;
  constexpr int64_t kCacheBytes = 512 * 1024;  // of the L2 cache, for what the second pass reads again
  const int64_t begin = chunk * a.chunk_rows, end = least(a.rows, begin + a.chunk_rows);
  const T* weight = parameter(a.weight, a.cols, T(1), static_cast<T*>(scratch));
  T *dweight = nullptr, *dbias = nullptr;
  if (a.partial) {
    dweight = static_cast<T*>(a.partial) + 2 * chunk * a.cols;
    dbias = dweight + a.cols;
    for (int64_t i = 0; i < 2 * a.cols; ++i) dweight[i] = 0;
  }
  int64_t row = begin;
  if (2 * kRows * a.cols * int64_t(sizeof(E)) <= kCacheBytes)
    for (; row + kRows <= end; row += kRows) bwd_rows<kCenter, kRows, E>(a, row, weight, dweight, dbias);
  for (; row < end; ++row) bwd_rows<kCenter, 1, E>(a, row, weight, dweight, dbias);
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
