// Attention over a cache for one instruction set; included by attention_decode.cpp through foreach_isa.h.
//
// A task is a share of the keys of one key head: it appends the new tokens that fall into its share, reads each key and
// value once for all query heads and positions, and leaves a state (m, l, o) per row, the online softmax's maximum, sum
// and accumulator (Milakov & Gimelshein 2018, arXiv:1805.02867). finish merges the shares of a head in their order.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "passes.h"
#include "rotate.h"
#include "row_products.h"

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kMostHeadDim = 256;

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The part [begin, end) of a sequence's keys, and the rows, that a task works on.
struct DecodeTask {
  int64_t b, hk, chunk, share;
  int64_t first_row, rows;  // of the key head: all positions of its first query head, then of the next one, ...
  int64_t begin, end;
};

inline DecodeTask decode_task(const DecodeArgs& a, int64_t index) {
  DecodeTask t;
  t.hk = index % a.heads_kv, index /= a.heads_kv;
  t.chunk = index % a.row_chunks(), index /= a.row_chunks();
  t.share = index % a.most_shares;
  t.b = index / a.most_shares;
  t.first_row = t.chunk * kDecodeMostRows;
  t.rows = least(kDecodeMostRows, a.rows() - t.first_row);
  const DecodeSequence& s = a.sequences[t.b];
  t.begin = s.first + t.share * s.share;
  t.end = least(t.begin + s.share, s.total);
  return t;
}

struct DecodeRow {
  int64_t h, i;      // query head and number of the query
  int64_t position;  // in the sequence; below 0 it sees nothing
  int64_t lo, hi;    // it sees keys lo <= j < hi
};

inline DecodeRow decode_row(const DecodeArgs& a, const DecodeTask& t, int64_t r) {
  DecodeRow row;
  row.h = t.hk * a.group() + (t.first_row + r) / a.seq_q;
  row.i = (t.first_row + r) % a.seq_q;
  row.position = a.sequences[t.b].total - a.seq_q + row.i;
  row.lo = a.left < 0 ? 0 : most(0, row.position - a.left);
  row.hi = row.position + 1;
  return row;
}

inline char* token_row(const TokenRows& x, int64_t outer, int64_t token, int64_t head) {
  return x.data + outer * x.outer + token * x.token + head * x.head;
}

// Calls f(outer, token, j, count) for every run of positions j0 + j .. + count that lie in one page of the cache, from
// its token on, until all of j0 .. j0 + n have been named.
template <class F>
[[gnu::always_inline]] inline void each_run(const DecodeArgs& a, int64_t b, int64_t j0, int64_t n, F f) {
  if (!a.block_table) return f(b, j0, int64_t(0), n);
  const int32_t* page = a.block_table + b * a.table_stride + j0 / a.block_size;
  int64_t slot = j0 % a.block_size;
  for (int64_t j = 0; j < n; ++page, slot = 0) {
    const int64_t count = least(n - j, a.block_size - slot);
    // a number that is out of range must not be read through
    f(most(0, least(*page, a.num_blocks - 1)), slot, j, count);
    j += count;
  }
}

inline char* cache_row(const DecodeArgs& a, const TokenRows& x, int64_t b, int64_t hk, int64_t j) {
  char* row;
  each_run(a, b, j, 1, [&](int64_t outer, int64_t token, int64_t, int64_t) { row = token_row(x, outer, token, hk); });
  return row;
}

// A row (head_dim,) in `dtype` as T, rotated by the angle of its position where there are tables.
template <class T>
void load_rotated(const DecodeArgs& a, const void* row, int64_t position, T* x) {
  if (!a.cos) return load_row(a.dtype, row, a.head_dim, x);
  T cos[kMostHeadDim], sin[kMostHeadDim], plain[kMostHeadDim];
  const int64_t pairs = a.half_rotary, p = most(0, least(position, a.max_position - 1));
  load_row(a.table_dtype, static_cast<const char*>(a.cos) + p * a.cos_stride, pairs, cos);
  load_row(a.table_dtype, static_cast<const char*>(a.sin) + p * a.sin_stride, pairs, sin);
  load_row(a.dtype, row, a.head_dim, plain);
  if (a.interleaved) {
    repeat_angles(pairs, cos, sin);
    rotate_pairs(plain, cos, sin, 2 * pairs, x);
  } else {
    rotate_halves(plain, cos, sin, pairs, x);
  }
  copy_row(plain + 2 * pairs, a.head_dim - 2 * pairs, x + 2 * pairs);
}

// x (n,) has room for whole vectors
inline void store_quantised(float* x, int64_t n, char* row, char* scale) {
  constexpr int64_t kLanes = Vec<float>::kLanes;
  for (int64_t i = n; i < round_up(n, kLanes); ++i) x[i] = 0;
  int8_t y[kMostHeadDim];
  const float unit = quantise_row(x, round_up(n, kLanes), 127.f, y);
  memcpy(row, y, size_t(n));
  memcpy(scale, &unit, sizeof(unit));
}

// Writes the new tokens at positions begin <= j < end of one key head.
template <class P>
void append_tokens(const DecodeArgs& a, int64_t b, int64_t hk, int64_t begin, int64_t end) {
  using T = typename P::T;
  const DecodeSequence& s = a.sequences[b];
  for (int64_t j = most(begin, s.before); j < least(end, s.total); ++j) {
    T x[kMostHeadDim];
    char* key = cache_row(a, a.k, b, hk, j);
    char* value = cache_row(a, a.v, b, hk, j);
    const char* new_key = token_row(a.k_new, b, j - s.before, hk);
    const char* new_value = token_row(a.v_new, b, j - s.before, hk);
    if constexpr (P::kElement == 1) {
      load_rotated(a, new_key, j, x);
      store_quantised(x, a.head_dim, key, cache_row(a, a.k_scale, b, hk, j));
      load_row(a.dtype, new_value, a.head_dim_v, x);
      store_quantised(x, a.head_dim_v, value, cache_row(a, a.v_scale, b, hk, j));
    } else {
      if (a.cos) {
        load_rotated(a, new_key, j, x);
        store_row(a.dtype, x, a.head_dim, key);
      } else {
        memcpy(key, new_key, size_t(a.head_dim * P::kElement));
      }
      memcpy(value, new_value, size_t(a.head_dim_v * P::kElement));
    }
  }
}

template <class P>
void decode_append(const DecodeArgs& a, int64_t task, void*) {
  append_tokens<P>(a, task / a.heads_kv, task % a.heads_kv, 0, INT64_MAX);
}

// m, l (rows,) and o (rows, o_ld) of one task.
template <class P>
struct DecodeState {
  using T = typename P::T;
  int64_t o_ld, bytes;
  T *m, *l, *o;
  DecodeState(const DecodeArgs& a, void* base) {
    const int64_t rows = a.chunk_rows();
    o_ld = round_up(a.head_dim_v, P::kColumns);
    o = static_cast<T*>(base);
    m = o + rows * o_ld;
    l = m + rows;
    bytes = round_up(rows * (o_ld + 2) * int64_t(sizeof(T)), 64);
  }
};

template <class P>
struct DecodeScratch {
  using T = typename P::T;
  int64_t q_ld;
  typename P::Query* q;  // (rows, q_ld)
  // scores (rows, kDecodeBlock); and of each row: the unit of q, the largest score so far (0 if it has seen nothing),
  // what o is to be multiplied by, the unit of the weights
  T *s, *unit, *shift, *correction, *sum_unit;
  void* state;
  int64_t bytes;
  DecodeScratch(const DecodeArgs& a, void* base) {
    const int64_t rows = a.chunk_rows();
    q_ld = round_up(a.head_dim, P::kColumns) / P::kColumns * P::kQueries;
    q = static_cast<typename P::Query*>(base);
    s = reinterpret_cast<T*>(q + round_up(rows * q_ld, 16));
    unit = s + rows * kDecodeBlock;
    shift = unit + rows;
    correction = shift + rows;
    sum_unit = correction + rows;
    state = unit + round_up(4 * rows, 16);
    bytes = static_cast<char*>(state) - static_cast<char*>(base) + DecodeState<P>(a, nullptr).bytes;
  }
};

template <class P>
int64_t decode_scratch(const DecodeArgs& a) {
  return DecodeScratch<P>(a, nullptr).bytes;
}

template <class P>
int64_t decode_state(const DecodeArgs& a) {
  return DecodeState<P>(a, nullptr).bytes;
}

template <class T>
T exp_one(T x) {
  T lanes[Vec<T>::kLanes];
  exp(Vec<T>::set1(x)).store(lanes);
  return lanes[0];
}

// Whether more than a multiplication by a positive number stands between q . k and the softmax. Else the scale goes
// into the exponent, where it must be normal in float: 0 times the -inf of a hidden key would be NaN.
inline bool has_features(const DecodeArgs& a) {
  return a.softcap > 0 || a.slopes || a.k_scale.data || !(a.scale > 1e-30);
}

// s (n,), n in whole vectors: q . k of keys j0 .. j0 + n of a row, in units of `unit` times key_scale (or null),
// becomes what the softmax sees, up to the scale where there are no features; returns the largest.
template <class T>
T finish_scores(const DecodeArgs& a, int64_t b, const DecodeRow& row, int64_t j0, int64_t n, T unit, const T* key_scale,
                T* s) {
  using V = Vec<T>;
  const T hidden = -std::numeric_limits<T>::infinity();
  V top = V::set1(hidden);
  if (has_features(a)) {
    const V factor = V::set1(T(a.scale) * unit), cap = V::set1(T(a.softcap)), inverse = V::set1(T(1 / a.softcap));
    for (int64_t j = 0; j < n; j += V::kLanes) {
      V x = V::load(s + j) * factor;
      if (key_scale) x = x * V::load(key_scale + j);
      if (a.softcap > 0) x = cap * tanh(x * inverse);
      x.store(s + j);
      top = max(x, top);
    }
  } else {
    for (int64_t j = 0; j < n; j += V::kLanes) top = max(V::load(s + j), top);
  }
  if (!a.slopes && row.lo <= j0 && row.hi >= j0 + n) return reduce_max(top);
  if (a.slopes) {
    const T slope = reinterpret_cast<const T*>(a.slopes)[b * a.slopes_batch + row.h];
    const T start = T(row.position - j0);
    for (int64_t j = 0; j < n; ++j) s[j] -= slope * (start - T(j));
  }
  for (int64_t j = 0; j < least(row.lo - j0, n); ++j) s[j] = hidden;
  for (int64_t j = most(0, row.hi - j0); j < n; ++j) s[j] = hidden;
  top = V::set1(hidden);
  for (int64_t j = 0; j < n; j += V::kLanes) top = max(V::load(s + j), top);
  return reduce_max(top);
}

// Closes the softmax of a row: writes out and the log-sum-exp. A row that saw nothing gets 0 and -inf.
template <class T>
void finish_row(const DecodeArgs& a, int64_t b, const DecodeRow& row, T m, T l, T* o, int64_t o_ld) {
  const bool seen = m != -std::numeric_limits<T>::infinity();
  T scale = seen ? T(1) : T(0), sum = seen ? l : T(1), top = m;
  if (a.sink && seen) {
    const T sink = reinterpret_cast<const T*>(a.sink)[row.h];
    top = sink > m ? sink : m;
    scale = exp_one(m - top);
    sum = l * scale + exp_one(sink - top);
  }
  double log;
  log_row(&sum, 1, &log);
  static_cast<T*>(a.lse)[(b * a.heads + row.h) * a.seq_q + row.i] = T(top + log);
  const T inverse = scale / sum;
  for (int64_t c = 0; c < o_ld; ++c) o[c] *= inverse;
  const int64_t at = ((b * a.seq_q + row.i) * a.heads + row.h) * a.head_dim_v;
  store_row(a.dtype, o, a.head_dim_v, static_cast<char*>(a.out) + at * element_size(a.dtype));
}

// Keys j0 .. j0 + n of one head and their values: where the rows lie. Behind the last one it is repeated.
struct DecodeKeys {
  int64_t j0, n;
  const char *keys[kDecodeBlock], *values[kDecodeBlock];
};

// In pages, where the CPU does not look ahead by itself, the scales of an int8 cache are fetched.
inline void find_keys(const DecodeArgs& a, const DecodeTask& t, int64_t j0, int64_t n, DecodeKeys& x) {
  x.j0 = j0, x.n = n;
  each_run(a, t.b, j0, n, [&](int64_t outer, int64_t token, int64_t j, int64_t count) __attribute__((always_inline)) {
    const char *key = token_row(a.k, outer, token, t.hk), *value = token_row(a.v, outer, token, t.hk);
    for (int64_t i = 0; i < count; ++i) x.keys[j + i] = key + i * a.k.token, x.values[j + i] = value + i * a.v.token;
    if (!a.block_table || !a.k_scale.data) return;
    for (const TokenRows& scales : {a.k_scale, a.v_scale}) {
      const char* row = token_row(scales, outer, token, t.hk);
      const int64_t step = scales.token < 64 ? 64 : scales.token;
      for (int64_t i = 0; i < count * scales.token; i += step) fetch_to_l2(row + i);
    }
  });
  for (int64_t j = n; j < kDecodeBlock; ++j) x.keys[j] = x.keys[n - 1], x.values[j] = x.values[n - 1];
}

// n scales, `step` bytes apart, to y.
template <class T>
[[gnu::always_inline]] inline void copy_scales(const char* x, int64_t step, int64_t n, T* y) {
  int64_t i = 0;
  if (step == sizeof(T))
    for (; i + Vec<T>::kLanes <= n; i += Vec<T>::kLanes)
      Vec<T>::load(reinterpret_cast<const T*>(x + i * step)).store(y + i);
  for (; i < n; ++i) memcpy(y + i, x + i * step, sizeof(T));
}

// The scales of an int8 cache, and zeros up to `padded`.
template <class T>
void gather_scales(const DecodeArgs& a, const DecodeTask& t, const DecodeKeys& x, int64_t padded, T* of_keys,
                   T* of_values) {
  each_run(a, t.b, x.j0, x.n,
           [&](int64_t outer, int64_t token, int64_t j, int64_t count) __attribute__((always_inline)) {
             copy_scales(token_row(a.k_scale, outer, token, t.hk), a.k_scale.token, count, of_keys + j);
             copy_scales(token_row(a.v_scale, outer, token, t.hk), a.v_scale.token, count, of_values + j);
           });
  for (int64_t j = x.n; j < padded; ++j) of_keys[j] = of_values[j] = 0;
}

template <class P>
void decode_attend(const DecodeArgs& a, int64_t index, void* scratch) {
  using T = typename P::T;
  constexpr int64_t kLanes = P::V::kLanes;
  constexpr bool kScaled = P::kElement == 1;
  const DecodeTask t = decode_task(a, index);
  const DecodeSequence& sequence = a.sequences[t.b];
  if (t.share >= sequence.shares) return;
  if (a.row_chunks() == 1)  // the first share also takes what no query sees
    append_tokens<P>(a, t.b, t.hk, t.share == 0 ? 0 : t.begin, t.end);

  const DecodeScratch<P> w(a, scratch);
  const bool alone = sequence.shares == 1;
  const DecodeState<P> state(a, alone ? w.state : static_cast<char*>(a.partial) + index * decode_state<P>(a));
  DecodeRow rows[kDecodeMostRows];
  for (int64_t r = 0; r < t.rows; ++r) {
    rows[r] = decode_row(a, t, r);
    T x[kMostHeadDim];
    for (int64_t c = a.head_dim; c < round_up(a.head_dim, P::kColumns); ++c) x[c] = 0;
    load_rotated(a, token_row(a.q, t.b, rows[r].i, rows[r].h), rows[r].position, x);
    w.unit[r] = P::pack_query(x, round_up(a.head_dim, P::kColumns), w.q + r * w.q_ld);
    state.m[r] = -std::numeric_limits<T>::infinity();
    state.l[r] = 0;
    for (int64_t c = 0; c < state.o_ld; ++c) state.o[r * state.o_ld + c] = 0;
  }

  int64_t lo = t.end, end = t.begin;  // of what some row sees
  for (int64_t r = 0; r < t.rows; ++r) {
    lo = least(lo, rows[r].lo);
    end = most(end, least(t.end, rows[r].hi));
  }
  const T factor = has_features(a) ? T(1) : T(a.scale);
  // Values are fetched while keys are worked on, the next keys while values are: the rows of a head may lie pages
  // apart, where the CPU does not look ahead by itself.
  DecodeKeys blocks[2];
  DecodeKeys *now = blocks, *next = blocks + 1;
  const int64_t first = most(t.begin, lo / kDecodeBlock * kDecodeBlock);
  if (first < end) find_keys(a, t, first, least(end - first, kDecodeBlock), *now);
  for (int64_t j0 = first; j0 < end; j0 += kDecodeBlock, std::swap(now, next)) {
    const int64_t n = now->n, padded = round_up(n, kLanes), left = end - j0 - n;
    if (left > 0) find_keys(a, t, j0 + n, least(left, kDecodeBlock), *next);
    // what no row sees may never have been written, and 0 * NaN is NaN
    const int64_t unseen = most(0, lo - j0);
    for (int64_t j = 0; j < unseen; ++j) now->values[j] = now->values[unseen];
    T key_scale[kDecodeBlock], value_scale[kDecodeBlock];
    if (kScaled) {
      gather_scales(a, t, *now, padded, key_scale, value_scale);
      for (int64_t j = 0; j < unseen; ++j) value_scale[j] = 0;
    }

    dots<P>(w.q, w.q_ld, t.rows, now->keys, n, a.head_dim, w.s, kDecodeBlock, now->values, a.head_dim_v * P::kElement);
    // loops over the rows, each of short chains, that one row need not wait for another
    for (int64_t r = 0; r < t.rows; ++r) {
      const T* scales = kScaled ? key_scale : nullptr;
      const T top = factor * finish_scores<T>(a, t.b, rows[r], j0, padded, w.unit[r], scales, w.s + r * kDecodeBlock);
      const T m = top > state.m[r] ? top : state.m[r];
      // a row that has seen nothing yet has -inf, which must not meet -inf
      w.shift[r] = m == -std::numeric_limits<T>::infinity() ? T(0) : m;
      w.correction[r] = exp_one(state.m[r] - w.shift[r]);
      state.m[r] = m;
    }
    for (int64_t r = 0; r < t.rows; ++r)
      state.l[r] = state.l[r] * w.correction[r] + weights_row<P>(w.s + r * kDecodeBlock, padded, factor, -w.shift[r]);
    for (int64_t r = 0; r < t.rows; ++r)
      w.sum_unit[r] = P::pack_weights(w.s + r * kDecodeBlock, kScaled ? value_scale : nullptr, padded);
    const WeightedSum<P> sum{reinterpret_cast<const typename P::Weight*>(w.s),
                             kDecodeBlock,
                             now->values,
                             round_up(n, P::kKeys),
                             a.head_dim_v,
                             state.o,
                             state.o_ld,
                             w.correction,
                             w.sum_unit,
                             left > 0 ? next->keys : nullptr,
                             a.head_dim * P::kElement};
    weighted_sums(sum, t.rows);
  }
  if (alone)
    for (int64_t r = 0; r < t.rows; ++r)
      finish_row(a, t.b, rows[r], state.m[r], state.l[r], state.o + r * state.o_ld, state.o_ld);
}

template <class P>
DecodeState<P> state_of(const DecodeArgs& a, int64_t index) {
  return {a, static_cast<char*>(a.partial) + index * decode_state<P>(a)};
}

template <class P>
void decode_finish(const DecodeArgs& a, int64_t index) {
  using T = typename P::T;
  const int64_t tasks_per_share = a.row_chunks() * a.heads_kv;
  const int64_t b = index / tasks_per_share, first = b * a.most_shares * tasks_per_share + index % tasks_per_share;
  const int64_t shares = a.sequences[b].shares;
  if (shares == 1) return;
  const DecodeTask t = decode_task(a, first);
  const DecodeState<P> all = state_of<P>(a, first);
  for (int64_t r = 0; r < t.rows; ++r) {
    T m = all.m[r], l = all.l[r];
    T* o = all.o + r * all.o_ld;
    for (int64_t share = 1; share < shares; ++share) {
      const DecodeState<P> next = state_of<P>(a, first + share * tasks_per_share);
      if (next.m[r] == -std::numeric_limits<T>::infinity()) continue;
      const T top = m > next.m[r] ? m : next.m[r];
      const T old_scale = exp_one(m - top), new_scale = exp_one(next.m[r] - top);
      l = l * old_scale + next.l[r] * new_scale;
      for (int64_t c = 0; c < all.o_ld; ++c) o[c] = o[c] * old_scale + next.o[r * all.o_ld + c] * new_scale;
      m = top;
    }
    finish_row(a, b, decode_row(a, t, r), m, l, o, all.o_ld);
  }
}

template <class P>
constexpr DecodeKernels decode_kernels_of() {
  return {decode_scratch<P>, decode_state<P>, decode_append<P>, decode_attend<P>, decode_finish<P>};
}

// One per CacheType, in its order.
constexpr DecodeKernels kDecode[] = {decode_kernels_of<FmaProducts<float>>(), decode_kernels_of<ProductsForBf16>(),
                                     decode_kernels_of<FmaProducts<F16>>(), decode_kernels_of<FmaProducts<double>>(),
                                     decode_kernels_of<ProductsForInt8>()};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
