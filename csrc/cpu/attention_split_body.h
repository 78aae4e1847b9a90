// Few rows and many keys (generation): each task reads its share of keys and values once, straight from the caller's
// tensors, and finishes its rows or, where the key head has several tasks, leaves a state (m, l, o) per row, which
// split_finish merges. Included by attention_body.h.

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kSplitKeys = 64;  // keys whose scores are held at once

// m, l (rows,) and o (rows, o_ld): the online softmax of a task's rows.
template <class P>
struct SplitState {
  using T = typename P::T;
  int64_t o_ld;
  T *m, *l, *o;
  SplitState(const AttentionArgs& a, int64_t rows, T* base) {
    o_ld = round_up(a.head_dim_v, P::kColumns);
    m = base;
    l = m + rows;
    o = l + rows;
  }
};

// Elements of a row's state.
template <class P>
int64_t split_state(const AttentionArgs& a) {
  return round_up(a.head_dim_v, P::kColumns) + 2;
}

template <class P>
SplitState<P> state_of_part(const AttentionArgs& a, const KeyHead& head, int64_t part) {
  using T = typename P::T;
  const int64_t row = head.rows_before + (head.hk * head.parts + part) * head.rows;
  return {a, head.rows, static_cast<T*>(a.partial) + row * split_state<P>(a)};
}

template <class P>
struct SplitScratch {
  using T = typename P::T;
  int64_t q_ld;
  typename P::Query* q;       // (rows, q_ld)
  T *s, *correction, *units;  // scores or weights (rows, kSplitKeys); per row, of o and of the weights
  T* state;
  int64_t bytes;
  SplitScratch(const AttentionArgs& a, void* base) {
    Arena arena(base);
    q_ld = round_up(a.head_dim, P::kColumns) / P::kColumns * P::kQueries;
    q = arena.take<typename P::Query>(kFewRows * q_ld);
    s = arena.take<T>(kFewRows * kSplitKeys);
    correction = arena.take<T>(kRowVecs);
    units = arena.take<T>(kFewRows);
    state = arena.take<T>(kFewRows * split_state<P>(a));
    bytes = arena.used();
  }
};

template <class P>
int64_t split_scratch(const AttentionArgs& a) {
  return SplitScratch<P>(a, nullptr).bytes;
}

// The rows of keys [j0, j0 + n); the last one again up to `padded`.
inline void padded_rows(const AttentionArgs& a, const Heads& x, const KeyHead& head, int64_t j0, int64_t n,
                        int64_t padded, const char** rows) {
  const char* row = static_cast<const char*>(key_row(a, x, head, j0));
  const int64_t step = x.seq * element_size(a.dtype);
  for (int64_t j = 0; j < n; ++j) rows[j] = row + j * step;
  for (int64_t j = n; j < padded; ++j) rows[j] = rows[n - 1];
}

// Closes the softmax of all rows of a key head.
template <class P>
void finish_split(const AttentionArgs& a, const KeyHead& head, const Row* rows, const SplitState<P>& state) {
  typename P::T inverse[kFewRows];
  finish_rows(a, head, rows, head.rows, state.m, state.l, inverse);
  for (int64_t r = 0; r < head.rows; ++r) store_out(a, head, rows[r], state.o + r * state.o_ld, state.o_ld, inverse[r]);
}

template <class P>
void split(const AttentionArgs& a, const AttentionTask& task, void* scratch) {
  using T = typename P::T;
  constexpr int64_t kLanes = P::V::kLanes;
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const SplitScratch<P> w(a, scratch);
  const SplitState<P> state =
      head.parts == 1 ? SplitState<P>(a, head.rows, w.state) : state_of_part<P>(a, head, task.part);
  Row rows[kFewRows];
  rows_of(a, head, 0, head.rows, rows);
  for (int64_t r = 0; r < head.rows; ++r) {
    T x[256];
    load_row(a.dtype, query_row(a, a.q, head, rows[r]), a.head_dim, x);
    for (int64_t c = a.head_dim; c < round_up(a.head_dim, P::kColumns); ++c) x[c] = 0;
    P::pack_query(x, round_up(a.head_dim, P::kColumns), w.q + r * w.q_ld);
    state.m[r] = -std::numeric_limits<T>::infinity();
    state.l[r] = 0;
  }
  for (int64_t i = 0; i < head.rows * state.o_ld; ++i) state.o[i] = 0;

  const T factor = T(exponent_factor(a));
  const int64_t k_bytes = a.head_dim * element_size(a.dtype), v_bytes = a.head_dim_v * element_size(a.dtype);
  const int64_t begin = task.part * head.share;
  const int64_t end = begin + head.share < head.keys ? begin + head.share : head.keys;
  for (int64_t j0 = begin; j0 < end; j0 += kSplitKeys) {
    const int64_t n = end - j0 < kSplitKeys ? end - j0 : kSplitKeys, padded = round_up(n, kLanes);
    if (visible_span<MathFma<T>>(rows, head.rows, j0, padded).empty()) continue;
    // the rows of one head may lie pages apart, where the CPU does not look ahead by itself: values come while keys are
    // worked on, the next keys while values are
    const int64_t next = end - j0 - n < kSplitKeys ? end - j0 - n : kSplitKeys;
    const char *keys[kSplitKeys], *values[kSplitKeys], *next_keys[kSplitKeys];
    padded_rows(a, a.k, head, j0, n, padded, keys);
    padded_rows(a, a.v, head, j0, n, padded, values);
    if (next > 0) padded_rows(a, a.k, head, j0 + n, next, padded, next_keys);
    dots<P>(w.q, w.q_ld, head.rows, keys, n, a.head_dim, w.s, kSplitKeys, values, v_bytes);
    T top[kRowVecs] = {}, m[kRowVecs] = {}, shift[kRowVecs];
    for (int64_t r = 0; r < head.rows; ++r) {
      finish_scores<T>(a, head, rows[r], j0, padded, w.s + r * kSplitKeys, nullptr);
      top[r] = row_max(w.s + r * kSplitKeys, padded);
      m[r] = state.m[r];
    }
    update_maxima(top, factor, head.rows, m, w.correction, shift);
    for (int64_t r = 0; r < head.rows; ++r) {
      T* s = w.s + r * kSplitKeys;
      state.m[r] = m[r];
      state.l[r] = state.l[r] * w.correction[r] + weights_row<P>(s, padded, factor, shift[r]);
      if (a.dropout_p > 0) apply_dropout<T>(a, head, rows[r], j0, padded, s, nullptr);
      w.units[r] = P::pack_weights(s, nullptr, padded);
    }
    const WeightedSum<P> sum{reinterpret_cast<const typename P::Weight*>(w.s),
                             kSplitKeys,
                             values,
                             round_up(n, P::kKeys),
                             a.head_dim_v,
                             state.o,
                             state.o_ld,
                             w.correction,
                             w.units,
                             next > 0 ? next_keys : nullptr,
                             k_bytes};
    weighted_sums(sum, head.rows);
  }
  if (head.parts == 1) finish_split(a, head, rows, state);
}

template <class P>
void split_finish(const AttentionArgs& a, const AttentionTask& task) {
  using T = typename P::T;
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const SplitState<P> all = state_of_part<P>(a, head, 0);
  Row rows[kFewRows];
  rows_of(a, head, 0, head.rows, rows);
  for (int64_t r = 0; r < head.rows; ++r) {
    T &m = all.m[r], &l = all.l[r], *o = all.o + r * all.o_ld;
    for (int64_t part = 1; part < head.parts; ++part) {
      const SplitState<P> next = state_of_part<P>(a, head, part);
      if (next.m[r] == -std::numeric_limits<T>::infinity()) continue;
      const T top = m > next.m[r] ? m : next.m[r];
      const T old_scale = exp_one(m - top), new_scale = exp_one(next.m[r] - top);
      l = l * old_scale + next.l[r] * new_scale;
      for (int64_t c = 0; c < all.o_ld; ++c) o[c] = o[c] * old_scale + next.o[r * all.o_ld + c] * new_scale;
      m = top;
    }
  }
  finish_split(a, head, rows, all);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
