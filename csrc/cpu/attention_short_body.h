// Short sequences without features: a head's scores fit in the L1 cache, and packing would take longer than the
// products. Scores are made transposed, (keys, queries), so that maxima and sums stay in their lanes: queries by
// columns are all that is packed, every other operand is read where it lies or, where it is not of the accumulator's
// type, converted. Included by attention_body.h.

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kShort = 64;  // most queries or keys

// Products of bfloat16 are so much faster than those of float that packing pays sooner. No more queries than generation
// reads in a step: longer prompts come in parts of more, and their bits must not depend on how they are parted.
template <class M>
bool is_short(const AttentionArgs& a, int64_t sequence) {
  constexpr int64_t kQueries = M::kPack == 2 ? 16 : 32, kKeys = M::kPack == 2 ? 16 : kShort;
  const Sequence& s = a.sequence[sequence];
  return s.seq_q > 0 && s.seq_q <= kQueries && s.seq_k <= kKeys && !has_features(a) && a.dropout_p == 0;
}

// Rows of the accumulator's type T.
template <class T>
struct ShortRows {
  T* data;
  int64_t ld;
};

template <class T>
struct ShortScratch {
  static constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
  static constexpr int64_t kLd = panel_of<MathFma<T>>() > kShort ? panel_of<MathFma<T>>() : kShort;
  int64_t wide;                          // d and d_v in whole vectors
  T *q, *dout, *k, *v, *out, *dk, *dv;   // (kShort, wide)
  T *q_columns, *dout_columns, *buffer;  // packed
  T *s, *dp;                             // (kShort keys, kLd queries)
  int64_t bytes;

  ShortScratch(const AttentionArgs& a, void* base) {
    Arena arena(base);
    const int64_t widest = a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v;
    wide = round_up(widest, Vec<T>::kLanes);
    for (T** x : {&q, &dout, &k, &v, &out, &dk, &dv}) *x = arena.take<T>(kShort * wide);
    for (T** x : {&q_columns, &dout_columns}) *x = arena.take<T>(kLd * widest);
    buffer = arena.take<T>(Vec<T>::kLanes * round_up(widest, 16));
    for (T** x : {&s, &dp}) *x = arena.take<T>(kShort * kLd);
    bytes = arena.used();
  }

  static bool in_place(const AttentionArgs& a, int64_t dim) { return a.dtype == kDType && dim % Vec<T>::kLanes == 0; }

  // n rows, x.seq apart.
  ShortRows<const T> rows(const AttentionArgs& a, const Heads& x, const void* first, int64_t n, int64_t dim,
                          T* copies) const {
    if (in_place(a, dim)) return {static_cast<const T*>(first), x.seq};
    for (int64_t r = 0; r < n; ++r) {
      const void* row = static_cast<const char*>(first) + r * x.seq * element_size(a.dtype);
      pack_rows<MathFma<T>>(a.dtype, &row, 1, dim, copies + r * wide, wide);
    }
    return {copies, wide};
  }
  // Where n rows of a result are made that lie `heads` heads apart; store puts them there.
  ShortRows<T> result(const AttentionArgs& a, void* first, int64_t heads, int64_t dim, T* sums) const {
    if (in_place(a, dim)) return {static_cast<T*>(first), heads * dim};
    return {sums, wide};
  }
  void store(const AttentionArgs& a, const ShortRows<T>& x, int64_t n, void* first, int64_t heads, int64_t dim) const {
    if (x.data == first) return;
    for (int64_t r = 0; r < n; ++r)
      store_row(a.dtype, x.data + r * x.ld, dim, static_cast<char*>(first) + r * heads * dim * element_size(a.dtype));
  }

  // s (keys, kLd) = k (keys, dim) times the queries (n, dim), which are packed as columns.
  void scores(ShortRows<const T> k, int64_t keys, ShortRows<const T> queries, int64_t n, int64_t dim, T* columns,
              T* s) const {
    using M = MathFma<T>;
    const void* lines[kShort];
    for (int64_t r = 0; r < n; ++r) lines[r] = queries.data + r * queries.ld;
    pack_columns<M>(kDType, lines, n, dim, columns, buffer);
    gemm<M, Start::zero>({k.data, k.ld, 1, columns, panel_of<M>(), panel_of<M>() * dim, s, kLd, dim, nullptr}, keys,
                         round_up(n, M::V::kLanes) / M::V::kLanes);
  }
  // c (n, dim) [+]= a (n, depth) b (depth, dim).
  template <Start kStart>
  void sums(const T* a, int64_t a_row, int64_t a_depth, int64_t n, int64_t depth, ShortRows<const T> b, int64_t dim,
            ShortRows<T> c) const {
    using M = MathFma<T>;
    gemm<M, kStart>({a, a_row, a_depth, b.data, b.ld, panel_of<M>(), c.data, c.ld, depth, nullptr}, n,
                    round_up(dim, M::V::kLanes) / M::V::kLanes);
  }
};

// Queries in lanes, and the keys that they see.
template <class T>
struct ShortBand {
  using V = Vec<T>;
  T lo[kShort + V::kLanes], hi[kShort + V::kLanes];
  int64_t every_begin = 0, every_end = INT64_MAX;  // what all of them see

  ShortBand(const Row* rows, int64_t n, int64_t keys) {
    for (int64_t r = 0; r < n; ++r) {
      every_begin = rows[r].lo > every_begin ? rows[r].lo : every_begin;
      every_end = rows[r].hi < every_end ? rows[r].hi : every_end;
    }
    if (every_begin == 0 && every_end >= keys) return;  // nothing to hide
    for (int64_t r = 0; r < round_up(n, V::kLanes); ++r) {
      const Row& row = rows[r < n ? r : 0];
      lo[r] = T(row.lo), hi[r] = T(row.hi);
    }
  }
  // s of the queries from r on and key j; -inf where they do not see it
  V hide(V s, int64_t r, int64_t j) const {
    if (j >= every_begin && j < every_end) return s;
    const V key = V::set1(T(j)), hidden = V::set1(-std::numeric_limits<T>::infinity());
    return select_less(key, V::load(lo + r), hidden, select_less(key, V::load(hi + r), s, hidden));
  }
};

template <class T>
void fwd_short(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  using V = Vec<T>;
  constexpr int64_t kLd = ShortScratch<T>::kLd;
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const ShortScratch<T> w(a, scratch);
  Ahead ahead(a, next);
  const ShortRows<const T> k = w.rows(a, a.k, key_row(a, a.k, head, 0), head.keys, a.head_dim, w.k);
  const ShortRows<const T> v = w.rows(a, a.v, key_row(a, a.v, head, 0), head.keys, a.head_dim_v, w.v);
  const V factor = V::set1(T(a.scale)), lowest = V::set1(std::numeric_limits<T>::lowest());
  const int64_t end = (task.part + 1) * head.share < head.rows ? (task.part + 1) * head.share : head.rows;
  for (int64_t first = task.part * head.share, n; first < end; first += n) {
    const int64_t of_head = head.seq_q - first % head.seq_q;
    n = of_head < end - first ? of_head : end - first;
    Row rows[kShort];
    rows_of(a, head, first, n, rows);
    const ShortBand<T> band(rows, n, head.keys);
    const ShortRows<const T> q = w.rows(a, a.q, query_row(a, a.q, head, rows[0]), n, a.head_dim, w.q);
    w.scores(k, head.keys, q, n, a.head_dim, w.q_columns, w.s);
    T m[kShort + V::kLanes], l[kShort + V::kLanes], inverse[kShort + V::kLanes];
    for (int64_t r = 0; r < n; r += V::kLanes) {
      T* const s = w.s + r;
      V top = V::set1(-std::numeric_limits<T>::infinity()), sum = V::zero();
      for (int64_t j = 0; j < head.keys; ++j) {
        const V x = band.hide(V::load(s + j * kLd), r, j);
        x.store(s + j * kLd);
        top = max(x, top);  // passes over NaN
      }
      top = top * factor;
      const V shift = select_less(top, lowest, V::zero(), V::zero() - top);  // -inf must not meet -inf
      for (int64_t j = 0; j < head.keys; ++j) {
        const V p = exp(fma(V::load(s + j * kLd), factor, shift));
        p.store(s + j * kLd);
        sum = sum + p;
        ahead.step(a);
      }
      (top + (sum - sum)).store(m + r);  // NaN where the sum is
      sum.store(l + r);
    }
    for (int64_t r = 0; r < n; r += kRowVecs)
      finish_rows(a, head, rows + r, n - r < kRowVecs ? n - r : kRowVecs, m + r, l + r, inverse + r);
    for (int64_t r = 0; r < n; r += V::kLanes)
      for (int64_t j = 0; j < head.keys; ++j)
        (V::load(w.s + j * kLd + r) * V::load(inverse + r)).store(w.s + j * kLd + r);
    void* to = out_row(a, head, rows[0]);
    const ShortRows<T> out = w.result(a, to, a.heads, a.head_dim_v, w.out);
    w.template sums<Start::zero>(w.s, 1, kLd, n, head.keys, v, a.head_dim_v, out);
    w.store(a, out, n, to, a.heads, a.head_dim_v);
  }
}

// The gradients of attention_bwd_body.h. delta, the sum of dout * out, is that of P * dP over the keys, divided by the
// sum of all weights, which is 1 but for the rounding of lse.
template <class T>
void bwd_short(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  using V = Vec<T>;
  constexpr int64_t kLd = ShortScratch<T>::kLd;
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const ShortScratch<T> w(a, scratch);
  Ahead ahead(a, next);
  const auto row_at = [&](void* x, int64_t row, int64_t dim) {
    return static_cast<char*>(x) + row * dim * element_size(a.dtype);
  };
  const int64_t n = head.seq_q, first_key = key_number(a, head, 0);
  void *const to_dk = row_at(a.dk, first_key, a.head_dim), *const to_dv = row_at(a.dv, first_key, a.head_dim_v);
  const ShortRows<T> dk = w.result(a, to_dk, a.heads_kv, a.head_dim, w.dk);
  const ShortRows<T> dv = w.result(a, to_dv, a.heads_kv, a.head_dim_v, w.dv);
  const ShortRows<const T> k = w.rows(a, a.k, key_row(a, a.k, head, 0), head.keys, a.head_dim, w.k);
  const ShortRows<const T> v = w.rows(a, a.v, key_row(a, a.v, head, 0), head.keys, a.head_dim_v, w.v);
  const V factor = V::set1(T(a.scale));
  for (int64_t g = 0; g < head.group; ++g) {
    Row rows[kShort];
    rows_of(a, head, g * n, n, rows);
    const ShortBand<T> band(rows, n, head.keys);
    const ShortRows<const T> q = w.rows(a, a.q, query_row(a, a.q, head, rows[0]), n, a.head_dim, w.q);
    const ShortRows<const T> dout = w.rows(a, a.dout, query_row(a, a.dout, head, rows[0]), n, a.head_dim_v, w.dout);
    w.scores(k, head.keys, q, n, a.head_dim, w.q_columns, w.s);
    w.scores(v, head.keys, dout, n, a.head_dim_v, w.dout_columns, w.dp);
    const T sink = a.sink ? reinterpret_cast<const T*>(a.sink)[rows[0].h] : T(0);
    T lse[kShort + V::kLanes] = {}, dlse[kShort + V::kLanes] = {}, delta[kShort + V::kLanes];
    for (int64_t r = 0; r < n; ++r) {
      lse[r] = lse_of<T>(a, head, rows[r]);
      if (a.dlse) dlse[r] = static_cast<const T*>(a.dlse)[lse_number(a, head, rows[r])];
    }
    for (int64_t r = 0; r < n; r += V::kLanes) {
      T *const s = w.s + r, *const dp = w.dp + r;
      const V shift = V::zero() - V::load(lse + r);
      V sum = V::zero(), all = a.sink ? exp(V::set1(sink) + shift) : V::zero();
      for (int64_t j = 0; j < head.keys; ++j) {
        const V p = exp(fma(band.hide(V::load(s + j * kLd), r, j), factor, shift));
        p.store(s + j * kLd);
        all = all + p;
        sum = fma(p, V::load(dp + j * kLd), sum);
        ahead.step(a);
      }
      sum = sum / max(V::set1(T(1e-30)), all) - V::load(dlse + r);
      sum.store(delta + r);
      for (int64_t j = 0; j < head.keys; ++j)
        (V::load(s + j * kLd) * (V::load(dp + j * kLd) - sum) * factor).store(dp + j * kLd);
    }
    if (a.dsink_partial) {
      double& dsink = a.dsink_partial[head.b * a.heads + rows[0].h];
      dsink = 0;
      for (int64_t r = 0; r < n; ++r) dsink -= exp_one(sink - lse[r]) * delta[r];
    }
    const auto add =
        g == 0 ? &ShortScratch<T>::template sums<Start::zero> : &ShortScratch<T>::template sums<Start::add>;
    (w.*add)(w.s, kLd, 1, head.keys, n, dout, a.head_dim_v, dv);
    (w.*add)(w.dp, kLd, 1, head.keys, n, q, a.head_dim, dk);
    void* const to_dq = row_at(a.dq, query_number(a, head, rows[0]), a.head_dim);
    const ShortRows<T> dq = w.result(a, to_dq, a.heads, a.head_dim, w.out);
    w.template sums<Start::zero>(w.dp, 1, kLd, n, head.keys, k, a.head_dim, dq);
    w.store(a, dq, n, to_dq, a.heads, a.head_dim);
  }
  for (int64_t j = head.keys; j < head.seq_k; ++j) {
    memset(dk.data + j * dk.ld, 0, size_t(a.head_dim) * sizeof(T));
    memset(dv.data + j * dv.ld, 0, size_t(a.head_dim_v) * sizeof(T));
  }
  w.store(a, dk, head.seq_k, to_dk, a.heads_kv, a.head_dim);
  w.store(a, dv, head.seq_k, to_dv, a.heads_kv, a.head_dim_v);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
