// The forward: online softmax over blocks of keys (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023,
// arXiv:2307.08691). Included by attention_body.h.

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kFwdKeys = 256;  // keys of a block
constexpr int64_t kRowVecs = 32;   // kFwdRows in whole vectors of any instruction set

// Rows whose scores of a block are held at once.
template <class M>
constexpr int64_t kFwdRows = kByTiles<M> ? 32 : 12;

template <class M>
struct FwdScratch {
  using T = typename M::Acc;
  using E = typename M::Elem;
  int64_t q_ld, o_ld;
  E *q, *k, *v, *p, *buffer;  // packed queries, block of keys by columns, of values; weights, where T is not E
  T *o, *m, *l, *s;           // accumulators, row maxima and sums, scores of a group of rows
  Row* rows;                  // of the task
  int64_t bytes;

  FwdScratch(const AttentionArgs& a, void* base) {
    Arena arena(base);
    q_ld = (a.head_dim + M::kPack - 1) / M::kPack;
    o_ld = round_up(a.head_dim_v, M::V::kLanes);
    q = arena.take<E>(a.most_rows * q_ld);
    k = arena.take<E>(kFwdKeys * q_ld);
    v = arena.take<E>(kFwdKeys / M::kPack * o_ld);
    p = M::kPack == 1 ? nullptr : arena.take<E>(kFwdRows<M> * kFwdKeys / M::kPack);
    buffer = arena.take<E>(M::V::kLanes * round_up(q_ld, 16));
    o = arena.take<T>(a.most_rows * o_ld);
    m = arena.take<T>(a.most_rows);
    l = arena.take<T>(a.most_rows);
    s = arena.take<T>(kFwdRows<M> * kFwdKeys);
    rows = arena.take<Row>(a.most_rows);
    bytes = arena.used();
  }
};

template <class T>
T row_max(const T* s, int64_t n) {
  using V = Vec<T>;
  V high = V::load(s);
  for (int64_t j = V::kLanes; j < n; j += V::kLanes) high = max(high, V::load(s + j));
  return reduce_max(high);
}

#if LMK_BF16_DOT
// weights_row, with the weights as pairs in p (n / 2,) instead.
inline float weight_pairs_row(const float* s, int64_t n, float factor, float shift, uint32_t* p) {
  using V = Vec<float>;
  const V f = V::set1(factor * float(kLog2e)), c = V::set1(shift * float(kLog2e));
  V sum_even = V::zero(), sum_odd = V::zero();
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    const V even = exp2_bf16(fma(V::load(s + j), f, c)), odd = exp2_bf16(fma(V::load(s + j + 16), f, c));
    MathBf16::store_pairs(even, odd, p + j / 2);
    sum_even = sum_even + even;
    sum_odd = sum_odd + odd;
  }
  if (j < n) {
    const V even = exp2_bf16(fma(V::load(s + j), f, c));
    MathBf16::store_pairs(even, p + j / 2);
    sum_even = sum_even + even;
  }
  return reduce_add(sum_even + sum_odd);
}
#endif

// The running maxima m (n,) take in the new ones, top (n,) (times factor); correction is what sums so far are
// multiplied by, shift what goes into the exponent of the new weights. All in whole vectors.
template <class T>
void update_maxima(const T* top, T factor, int64_t n, T* m, T* correction, T* shift) {
  using V = Vec<T>;
  for (int64_t r = 0; r < n; r += V::kLanes) {
    const V before = V::load(m + r), after = max(before, V::load(top + r) * V::set1(factor));
    // a row that has seen nothing yet has -inf, which must not meet -inf
    const V finite = select_less(after, V::set1(std::numeric_limits<T>::lowest()), V::zero(), after);
    after.store(m + r);
    exp(before - finite).store(correction + r);
    (V::zero() - finite).store(shift + r);
  }
}

template <class T>
T exp_one(T x) {
  T lanes[Vec<T>::kLanes];
  exp(Vec<T>::set1(x)).store(lanes);
  return lanes[0];
}

// Closes the softmax of n rows from their running maxima m and sums l: writes the log-sum-exp with
// the sink in it, and to inverse what the rows' accumulators are multiplied by. A row that saw nothing gets -inf and 0.
template <class T>
void finish_rows(const AttentionArgs& a, const KeyHead& head, const Row* rows, int64_t n, const T* m, const T* l,
                 T* inverse) {
  const T inf = std::numeric_limits<T>::infinity();
  T top[kRowVecs], sum[kRowVecs];
  double log[kRowVecs];
  for (int64_t r = 0; r < n; ++r) {
    const bool seen = m[r] != -inf;
    top[r] = m[r];
    sum[r] = seen ? l[r] : T(1);
    inverse[r] = seen ? T(1) / sum[r] : T(0);
  }
  for (int64_t r = 0; a.sink && r < n; ++r) {
    if (m[r] == -inf) continue;
    const T sink = reinterpret_cast<const T*>(a.sink)[rows[r].h];
    top[r] = sink > m[r] ? sink : m[r];
    const T scale = exp_one(m[r] - top[r]);
    sum[r] = l[r] * scale + exp_one(sink - top[r]);
    inverse[r] = scale / sum[r];
  }
  log_row(sum, n, log);
  for (int64_t r = 0; r < n; ++r) static_cast<T*>(a.lse)[lse_number(a, head, rows[r])] = T(top[r] + log[r]);
}

inline char* out_row(const AttentionArgs& a, const KeyHead& head, const Row& row) {
  return static_cast<char*>(a.out) + query_number(a, head, row) * a.head_dim_v * element_size(a.dtype);
}

template <class T>
void store_out(const AttentionArgs& a, const KeyHead& head, const Row& row, T* o, int64_t ld, T inverse) {
  for (int64_t c = 0; c < ld; ++c) o[c] *= inverse;
  store_row(a.dtype, o, a.head_dim_v, out_row(a, head, row));
}

// The rows of x at positions of one key head: pointers for the pack functions.
inline void key_rows(const AttentionArgs& a, const Heads& x, const KeyHead& head, int64_t j0, int64_t n,
                     const void** rows) {
  for (int64_t j = 0; j < n; ++j) rows[j] = key_row(a, x, head, j0 + j);
}

[[gnu::always_inline]] inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

// What will be stored to soon, for writing.
[[gnu::always_inline]] inline void prefetch_out(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 1);
}
constexpr int64_t kRowsAhead = 16;  // of rows that are gone through one by one

// Brings the first rows of the next task into the L2 cache, a token at a time, while this one computes: tasks of short
// sequences would spend a third of their time waiting for memory.
class Ahead {
 public:
  Ahead(const AttentionArgs& a, const AttentionTask* next) {
    constexpr int64_t kMost = 128;
    if (!next) return;
    head_ = key_head(a, next->sequence, next->head_kv);
    end_ = head_.seq_q > head_.keys ? head_.seq_q : head_.keys;
    if (end_ > kMost || next->part > 0) end_ = 0;
  }
  void step(const AttentionArgs& a) {
    if (at_ >= end_) return;
    const int64_t bytes = a.head_dim * element_size(a.dtype), bytes_v = a.head_dim_v * element_size(a.dtype);
    if (at_ < head_.seq_q) {
      const Row row{head_.hk * head_.group, at_, 0, 0};
      prefetch_row(query_row(a, a.q, head_, row), bytes);
      if (a.dq) {
        prefetch_row(query_row(a, a.dout, head_, row), bytes_v);
        prefetch_row(out_row(a, head_, row), bytes_v);
      }
    }
    if (at_ < head_.keys) {
      prefetch_row(key_row(a, a.k, head_, at_), bytes);
      prefetch_row(key_row(a, a.v, head_, at_), bytes_v);
    }
    ++at_;
  }

 private:
  KeyHead head_;
  int64_t at_ = 0, end_ = 0;
};

template <class M>
int64_t fwd_scratch(const AttentionArgs& a) {
  return FwdScratch<M>(a, nullptr).bytes;
}

// One group of rows against one block of keys, which starts at key j0.
template <class M>
void fwd_group(const AttentionArgs& a, const KeyHead& head, const FwdScratch<M>& w, int64_t r0, int64_t n, int64_t j0,
               int64_t block, Ahead& ahead) {
  using T = typename M::Acc;
  constexpr int64_t kPanel = panel_of<M>();
  const Row* rows = w.rows + r0;
  const Span span = visible_span<M>(rows, n, j0, round_up(block, kColumnUnit<M>));
  if (span.empty()) return;
  const int64_t width = span.end - span.begin;
  const typename M::Elem* keys = w.k + span.begin * w.q_ld;
  gemm<M, Start::zero>({w.q + r0 * w.q_ld, w.q_ld, 1, keys, kPanel, kPanel * w.q_ld, w.s, kFwdKeys, w.q_ld, nullptr}, n,
                       width / M::V::kLanes);
  const T factor = T(exponent_factor(a));
  const int64_t first_key = j0 + span.begin;
  T top[kRowVecs] = {}, m[kRowVecs] = {}, correction[kRowVecs], shift[kRowVecs];
  bool first = true;  // block that any of the rows sees something of
  for (int64_t r = 0; r < n; ++r) {
    finish_scores<T>(a, head, rows[r], first_key, width, w.s + r * kFwdKeys, nullptr);
    top[r] = row_max(w.s + r * kFwdKeys, width);
    m[r] = w.m[r0 + r];
    first &= m[r] == -std::numeric_limits<T>::infinity();
  }
  if (first) {
    for (int64_t r = 0; r < n; ++r) {
      m[r] = top[r] * factor, correction[r] = 0;
      shift[r] = m[r] < std::numeric_limits<T>::lowest() ? T(0) : -m[r];
    }
  } else {
    update_maxima(top, factor, n, m, correction, shift);
  }
  for (int64_t r = 0; r < n; ++r) {
    ahead.step(a);
    T* s = w.s + r * kFwdKeys;
    w.m[r0 + r] = m[r];
    T sum;
    if constexpr (M::kPack == 2) {
      typename M::Elem* p = w.p + r * kFwdKeys / 2;
      if (a.dropout_p > 0) {
        sum = weights_row<M>(s, width, factor, shift[r]);
        apply_dropout<T>(a, head, rows[r], first_key, width, s, nullptr);
        M::pack_row(s, width, p);
      } else {
        sum = weight_pairs_row(s, width, factor, shift[r], p);
      }
    } else {
      sum = weights_row<M>(s, width, factor, shift[r]);
      if (a.dropout_p > 0) apply_dropout<T>(a, head, rows[r], first_key, width, s, nullptr);
    }
    w.l[r0 + r] = w.l[r0 + r] * correction[r] + sum;
  }
  const typename M::Elem* p;
  if constexpr (M::kPack == 2)
    p = w.p;
  else
    p = w.s;
  const GemmArgs<M> sum = {
      p,      kFwdKeys / M::kPack, 1,         w.v + span.begin / M::kPack * w.o_ld, w.o_ld, kPanel, w.o + r0 * w.o_ld,
      w.o_ld, width / M::kPack,    correction};
  if (first)
    gemm<M, Start::zero>(sum, n, w.o_ld / M::V::kLanes);
  else
    gemm<M, Start::scale_and_add>(sum, n, w.o_ld / M::V::kLanes);
}

template <class M>
void fwd(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  using T = typename M::Acc;
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const int64_t first_row = task.part * head.share;
  const int64_t n = head.rows - first_row < head.share ? head.rows - first_row : head.share;
  if (n == 0) return;
  const FwdScratch<M> w(a, scratch);
  Ahead ahead(a, next);

  rows_of(a, head, first_row, n, w.rows);
  const int64_t bytes = a.head_dim * element_size(a.dtype), bytes_v = a.head_dim_v * element_size(a.dtype);
  int64_t fetched = w.rows[0].lo / kFwdKeys * kFwdKeys;  // keys before it have been
  const auto fetch_keys = [&](int64_t count, int64_t end) {
    for (; count > 0 && fetched < end; --count, ++fetched) {
      prefetch_row(key_row(a, a.k, head, fetched), bytes);
      prefetch_row(key_row(a, a.v, head, fetched), bytes_v);
    }
  };
  // of a block, for each group of rows: all of them together fetch a whole block
  const int64_t per_group = (kFwdKeys * kFwdRows<M> + n - 1) / n;
  const auto end_of = [&](int64_t j0, int64_t hi) { return j0 + kFwdKeys < hi ? j0 + kFwdKeys : hi; };
  const int64_t end_of_first = end_of(fetched, w.rows[n - 1].hi);

  int64_t lo = INT64_MAX, hi = 0;  // keys that any of the rows sees
  for (int64_t r0 = 0; r0 < n; r0 += kFwdRows<M>) {
    const int64_t count = n - r0 < kFwdRows<M> ? n - r0 : kFwdRows<M>;
    const Row* group = w.rows + r0;
    const void* queries[kFwdRows<M>];
    for (int64_t r = r0 + kRowsAhead; r < r0 + kRowsAhead + kFwdRows<M> && r < n; ++r)
      prefetch_row(query_row(a, a.q, head, w.rows[r]), bytes);
    fetch_keys(per_group, end_of_first);
    for (int64_t r = 0; r < count; ++r) {
      queries[r] = query_row(a, a.q, head, group[r]);
      w.m[r0 + r] = -std::numeric_limits<T>::infinity();
      w.l[r0 + r] = 0;
      if (group[r].lo >= group[r].hi) continue;
      lo = group[r].lo < lo ? group[r].lo : lo;
      hi = group[r].hi > hi ? group[r].hi : hi;
    }
    pack_rows<M>(a.dtype, queries, count, a.head_dim, w.q + r0 * w.q_ld, w.q_ld);
  }
  for (int64_t i = 0; i < n * w.o_ld; ++i) w.o[i] = 0;

  const void* rows[kFwdKeys];
  for (int64_t j0 = lo / kFwdKeys * kFwdKeys; j0 < hi; j0 += kFwdKeys) {
    const int64_t block = hi - j0 < kFwdKeys ? hi - j0 : kFwdKeys;
    key_rows(a, a.k, head, j0, block, rows);
    pack_columns<M>(a.dtype, rows, block, a.head_dim, w.k, w.buffer);
    key_rows(a, a.v, head, j0, block, rows);
    pack_depth<M>(a.dtype, rows, block, a.head_dim_v, w.v, w.o_ld);
    const int64_t packed = (block + M::kPack - 1) / M::kPack * w.o_ld;
    const int64_t padded = round_up(block, kColumnUnit<M>) / M::kPack * w.o_ld;
    for (int64_t i = packed; i < padded; ++i) w.v[i] = 0;
    // the next block comes into the L2 cache while this one is worked on, a few rows per group
    const int64_t following = j0 + kFwdKeys, end = end_of(following, hi);
    fetched = following;
    for (int64_t r0 = 0; r0 < n; r0 += kFwdRows<M>) {
      fetch_keys(per_group, end);
      // where the rows of this group will be written
      for (int64_t r = r0; following >= hi && r < r0 + kFwdRows<M> && r < n; ++r)
        prefetch_row(out_row(a, head, w.rows[r]), bytes_v);
      fwd_group<M>(a, head, w, r0, n - r0 < kFwdRows<M> ? n - r0 : kFwdRows<M>, j0, block, ahead);
    }
  }

  for (int64_t r0 = 0; r0 < n; r0 += kFwdRows<M>) {
    const int64_t count = n - r0 < kFwdRows<M> ? n - r0 : kFwdRows<M>;
    const Row* group = w.rows + r0;
    T inverse[kFwdRows<M>];
    finish_rows(a, head, group, count, w.m + r0, w.l + r0, inverse);
    for (int64_t r = 0; r < count; ++r) store_out(a, head, group[r], w.o + (r0 + r) * w.o_ld, w.o_ld, inverse[r]);
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
