// Few rows, many keys (generation): each task reads its share of keys and values once, straight from the caller's
// tensors, and leaves a state (m, l, o) per row, which split_finish merges. Included by attention_body.h.

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kSplitKeys = 64;  // keys whose scores are held at once

template <class T>
struct SplitState {
  int64_t o_ld;
  T *m, *l, *o;
  SplitState(const AttentionArgs& a, const KeyHead& head, int64_t part) {
    o_ld = round_up(a.head_dim_v, Vec<T>::kLanes);
    m = static_cast<T*>(a.partial) + (head.rows_before + (head.hk * head.parts + part) * head.rows) * (o_ld + 2);
    l = m + head.rows;
    o = l + head.rows;
  }
};

template <class T>
struct SplitScratch {
  int64_t q_ld, ld;
  T *q, *s, *block;  // packed queries, scores, a block of keys or values where they cannot be read in place
  int64_t bytes;
  SplitScratch(const AttentionArgs& a, void* base) {
    Arena arena(base);
    q_ld = round_up(a.head_dim, Vec<T>::kLanes);
    ld = round_up(a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v, Vec<T>::kLanes);
    q = arena.take<T>(a.most_rows * q_ld);
    s = arena.take<T>(a.most_rows * kSplitKeys);
    block = arena.take<T>(kSplitKeys * ld);
    bytes = arena.used();
  }
};

// The rows of a block in accumulator precision and whole vectors: where they are, or copied.
template <class T>
void readable_rows(const AttentionArgs& a, const void* const* sources, int64_t n, int64_t n_cols,
                   const SplitScratch<T>& w, const T** rows) {
  const bool in_place = element_size(a.dtype) == sizeof(T) && n_cols % Vec<T>::kLanes == 0;
  if (!in_place) pack_rows<MathFma<T>>(a.dtype, sources, n, n_cols, w.block, w.ld);
  for (int64_t j = 0; j < n; ++j) rows[j] = in_place ? static_cast<const T*>(sources[j]) : w.block + j * w.ld;
}

// o (kVecs vectors) += sum of p[j] * rows[j], the sums in registers
template <class T, int kVecs>
void add_weighted(const T* p, const T* const* rows, int64_t n, int64_t col, T* o) {
  using V = Vec<T>;
  V acc[kVecs];
#pragma GCC unroll 8
  for (int c = 0; c < kVecs; ++c) acc[c] = V::load(o + col + c * V::kLanes);
  for (int64_t j = 0; j < n; ++j) {
    const V weight = V::set1(p[j]);
#pragma GCC unroll 8
    for (int c = 0; c < kVecs; ++c) acc[c] = fma(weight, V::load(rows[j] + col + c * V::kLanes), acc[c]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kVecs; ++c) acc[c].store(o + col + c * V::kLanes);
}

template <class T>
int64_t split_scratch(const AttentionArgs& a) {
  return SplitScratch<T>(a, nullptr).bytes;
}

template <class T>
void split(const AttentionArgs& a, const AttentionTask& task, void* scratch) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const SplitState<T> state(a, head, task.part);
  const SplitScratch<T> w(a, scratch);
  Row rows[kFewRows];
  rows_of(a, head, 0, head.rows, rows);
  for (int64_t r = 0; r < head.rows; ++r) {
    const void* q = query_row(a, a.q, head, rows[r]);
    pack_rows<MathFma<T>>(a.dtype, &q, 1, a.head_dim, w.q + r * w.q_ld, w.q_ld);
    state.m[r] = -std::numeric_limits<T>::infinity();
    state.l[r] = 0;
  }
  for (int64_t i = 0; i < head.rows * state.o_ld; ++i) state.o[i] = 0;

  const T factor = T(exponent_factor(a));
  const int64_t begin = task.part * head.share;
  const int64_t end = begin + head.share < head.keys ? begin + head.share : head.keys;
  for (int64_t j0 = begin; j0 < end; j0 += kSplitKeys) {
    const int64_t n = end - j0 < kSplitKeys ? end - j0 : kSplitKeys, padded = round_up(n, kLanes);
    if (visible_span<MathFma<T>>(rows, head.rows, j0, padded).empty()) continue;
    // the rows of one head may lie pages apart, where the CPU does not look ahead by itself: values come while keys are
    // worked on, the next keys while values are
    const int64_t k_bytes = a.head_dim * element_size(a.dtype), v_bytes = a.head_dim_v * element_size(a.dtype);
    const int64_t next = end - j0 - n < kSplitKeys ? end - j0 - n : kSplitKeys;
    const void *keys[kSplitKeys], *values[kSplitKeys], *next_keys[kSplitKeys];
    const T* block[kSplitKeys];
    key_rows(a, a.k, head, j0, n, keys);
    key_rows(a, a.v, head, j0, n, values);
    key_rows(a, a.k, head, j0 + n, next, next_keys);
    readable_rows(a, keys, n, a.head_dim, w, block);
    for (int64_t r = 0; r < head.rows; ++r) {
      const T* q = w.q + r * w.q_ld;
      T* s = w.s + r * kSplitKeys;
      for (int64_t j = 0; j < n; ++j) {
        if (r == 0) prefetch_row(values[j], v_bytes);
        V sum = V::zero();
        for (int64_t c = 0; c < w.q_ld; c += kLanes) sum = fma(V::load(q + c), V::load(block[j] + c), sum);
        s[j] = reduce_add(sum);
      }
      for (int64_t j = n; j < padded; ++j) s[j] = 0;
      finish_scores<T>(a, head, rows[r], j0, padded, s, nullptr);
      T top[kRowVecs] = {row_max(s, padded)}, m[kRowVecs] = {state.m[r]}, correction[kRowVecs], shift[kRowVecs];
      update_maxima(top, factor, 1, m, correction, shift);
      state.m[r] = m[0];
      state.l[r] = state.l[r] * correction[0] + weights_row<MathFma<T>>(s, padded, factor, shift[0]);
      for (int64_t c = 0; c < state.o_ld; ++c) state.o[r * state.o_ld + c] *= correction[0];
      if (a.dropout_p > 0) apply_dropout<T>(a, head, rows[r], j0, padded, s, nullptr);
    }
    readable_rows(a, values, n, a.head_dim_v, w, block);
    for (int64_t j = 0; j < next; ++j) prefetch_row(next_keys[j], k_bytes);
    for (int64_t r = 0; r < head.rows; ++r) {
      const T* p = w.s + r * kSplitKeys;
      T* o = state.o + r * state.o_ld;
      int64_t c = 0;
      for (; c + 4 * kLanes <= state.o_ld; c += 4 * kLanes) add_weighted<T, 4>(p, block, n, c, o);
      for (; c < state.o_ld; c += kLanes) add_weighted<T, 1>(p, block, n, c, o);
    }
  }
}

template <class T>
void split_finish(const AttentionArgs& a, const AttentionTask& task) {
  const T inf = std::numeric_limits<T>::infinity();
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const SplitState<T> first(a, head, 0);
  Row rows[kFewRows];
  rows_of(a, head, 0, head.rows, rows);
  for (int64_t r = 0; r < head.rows; ++r) {
    T m = first.m[r], l = first.l[r];
    T* o = first.o + r * first.o_ld;
    for (int64_t part = 1; part < head.parts; ++part) {
      const SplitState<T> next(a, head, part);
      if (next.m[r] == -inf) continue;
      const T top = m > next.m[r] ? m : next.m[r];
      const T old_scale = exp_one(m - top), new_scale = exp_one(next.m[r] - top);
      l = l * old_scale + next.l[r] * new_scale;
      for (int64_t c = 0; c < first.o_ld; ++c) o[c] = o[c] * old_scale + next.o[r * first.o_ld + c] * new_scale;
      m = top;
    }
    T inverse;
    finish_rows(a, head, rows + r, 1, &m, &l, &inverse);
    store_out(a, head, rows[r], o, first.o_ld, inverse);
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
