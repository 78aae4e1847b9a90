// Embedding for one instruction set; included by embed.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"

namespace lmk {
namespace LMK_NS {
namespace {

// out (n,) = scale * x[0] + x[1] + ... + x[count - 1] over kCount rows, in the order of the terms.
template <int kCount, class E>
inline void sum_terms(const E* const* x, Acc<E> scale, int64_t n, E* out) {
  using V = Vec<Acc<E>>;
  const V factor = V::set1(scale);
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) {
    V sum = load_vec(x[0] + i) * factor;
    for (int k = 1; k < kCount; ++k) sum = sum + load_vec(x[k] + i);
    store_vec(sum, out + i);
  }
  for (; i < n; ++i) {
    Acc<E> sum = widen(x[0][i]) * scale;
    for (int k = 1; k < kCount; ++k) sum += widen(x[k][i]);
    narrow(sum, out + i);
  }
}

template <class E>
inline const E* table_row(const EmbedTable& t, int64_t b, int64_t s) {
  return static_cast<const E*>(t.data) + t.indices.at(b, s) * t.row;
}

[[gnu::always_inline]] inline void prefetch_row(const void* x, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(x) + i);
}

// All of x and the tables in one dtype.
template <class E>
void embed_same(const EmbedArgs& a, int64_t first, int64_t n) {
  E* out = static_cast<E*>(a.out) + first * a.dim;
  for (int64_t token = first; token < first + n; ++token, out += a.dim) {
    const int64_t b = token / a.seq, s = token % a.seq;
    const E* terms[1 + kMostTables];
    int count = 0;
    if (a.x) terms[count++] = static_cast<const E*>(a.x) + b * a.x_batch + s * a.x_seq;
    for (int k = 0; k < a.n_tables; ++k) terms[count++] = table_row<E>(a.tables[k], b, s);
    // rows of a large table lie anywhere: the next token's is on its way while this one is added up
    if (token + 1 < first + n)
      prefetch_row(table_row<E>(a.tables[0], (token + 1) / a.seq, (token + 1) % a.seq), a.dim * int64_t(sizeof(E)));
    const Acc<E> scale = a.x ? Acc<E>(a.scale) : Acc<E>(1);
    if (count == 1) sum_terms<1>(terms, scale, a.dim, out);
    if (count == 2) sum_terms<2>(terms, scale, a.dim, out);
    if (count == 3) sum_terms<3>(terms, scale, a.dim, out);
  }
}

// Each term is widened to the type of the sum first.
template <class E>
void embed_mixed(const EmbedArgs& a, int64_t first, int64_t n, Acc<E>* sum) {
  using T = Acc<E>;
  T* term = sum + a.dim;
  char* out = static_cast<char*>(a.out) + first * a.dim * int64_t(sizeof(E));
  for (int64_t token = first; token < first + n; ++token, out += a.dim * int64_t(sizeof(E))) {
    const int64_t b = token / a.seq, s = token % a.seq;
    for (int64_t c = 0; c < a.dim; ++c) sum[c] = 0;
    if (a.x) {
      load_row(a.dtype, static_cast<const E*>(a.x) + b * a.x_batch + s * a.x_seq, a.dim, sum);
      for (int64_t c = 0; c < a.dim; ++c) sum[c] *= T(a.scale);
    }
    for (int k = 0; k < a.n_tables; ++k) {
      const EmbedTable& t = a.tables[k];
      const int64_t at = t.indices.at(b, s) * t.row * element_size(t.dtype);
      load_row(t.dtype, static_cast<const char*>(t.data) + at, a.dim, term);
      for (int64_t c = 0; c < a.dim; ++c) sum[c] += term[c];
    }
    store_row(a.dtype, sum, a.dim, out);
  }
}

template <class E>
void embed(const EmbedArgs& a, int64_t first, int64_t n, void* scratch) {
  bool same = true;
  for (int k = 0; k < a.n_tables; ++k) same &= a.tables[k].dtype == a.dtype;
  if (same)
    embed_same<E>(a, first, n);
  else
    embed_mixed<E>(a, first, n, static_cast<Acc<E>*>(scratch));
}

// A group's rows, columns [0, kVecs vectors), summed in registers in their order.
template <int kVecs, class E, class D>
inline void sum_group(const E* dout, int64_t ld, const int64_t* rows, int64_t count, D* dst) {
  using V = Vec<Acc<E>>;
  V sum[kVecs];
  for (int k = 0; k < kVecs; ++k) sum[k] = V::zero();
  for (int64_t i = 0; i < count; ++i) {
    const E* x = dout + rows[i] * ld;
    if (i + 4 < count) {
      const char* ahead = reinterpret_cast<const char*>(dout + rows[i + 4] * ld);
      for (int64_t at = 0; at < kVecs * V::kLanes * int64_t(sizeof(E)); at += 64) __builtin_prefetch(ahead + at);
    }
    for (int k = 0; k < kVecs; ++k) sum[k] = sum[k] + load_vec(x + k * V::kLanes);
  }
  for (int k = 0; k < kVecs; ++k) store_vec(sum[k], dst + k * V::kLanes);
}

template <class E, class D>
void embed_grad_to(const EmbedGradArgs& a, int64_t first, int64_t last, int64_t column, int64_t n) {
  using V = Vec<Acc<E>>;
  constexpr int kVecs = 8;
  for (int64_t g = first; g < last; ++g) {
    const EmbedGroup& group = a.groups[g];
    const E* dout = static_cast<const E*>(a.dout) + column;
    D* dst = static_cast<D*>(a.dtable) + group.target * a.dim + column;
    const int64_t* rows = a.rows + group.begin;
    const int64_t count = group.end - group.begin;
    int64_t c = 0;
    for (; c + kVecs * V::kLanes <= n; c += kVecs * V::kLanes) sum_group<kVecs>(dout + c, a.dim, rows, count, dst + c);
    for (; c + V::kLanes <= n; c += V::kLanes) sum_group<1>(dout + c, a.dim, rows, count, dst + c);
    for (; c < n; ++c) {
      Acc<E> sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += widen(dout[rows[i] * a.dim + c]);
      narrow(sum, dst + c);
    }
  }
}

template <class E>
void embed_grad(const EmbedGradArgs& a, int64_t first, int64_t last, int64_t column, int64_t n) {
  if (a.table_dtype == a.dtype)
    embed_grad_to<E, E>(a, first, last, column, n);
  else
    embed_grad_to<E, Acc<E>>(a, first, last, column, n);
}

// One per DType, in its order.
constexpr EmbedFn kEmbed[] = {embed<float>, embed<Bf16>, embed<F16>, embed<double>};
constexpr EmbedGradFn kEmbedGrad[] = {embed_grad<float>, embed_grad<Bf16>, embed_grad<F16>, embed_grad<double>};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
