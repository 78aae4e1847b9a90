// What turns q . k into the score of the softmax: soft cap, ALiBi, bias, mask and the band of visible keys.
// Included by attention_body.h.

namespace lmk {
namespace LMK_NS {
namespace {

// Rows of one key head: all queries of the first head that reads it, then of the second, ...
struct Row {
  int64_t h, i;    // query head and position
  int64_t lo, hi;  // it sees keys lo <= j < hi, where mask and bias let it
};

struct KeyHead : Sequence {
  int64_t b, hk, group, rows;  // sequence; key head; query heads that read it; group * seq_q
};

inline KeyHead key_head(const AttentionArgs& a, int64_t b, int64_t hk) {
  const int64_t group = a.heads / a.heads_kv;
  return {a.sequence[b], b, hk, group, group * a.sequence[b].seq_q};
}

// Rows first .. first + n of a key head.
inline void rows_of(const AttentionArgs& a, const KeyHead& head, int64_t first, int64_t n, Row* rows) {
  int64_t h = head.hk * head.group + first / head.seq_q, i = first % head.seq_q;
  for (int64_t r = 0; r < n; ++r, ++i) {
    if (i == head.seq_q) i = 0, ++h;
    Row& row = rows[r];
    row.h = h;
    row.i = i;
    row.lo = 0;
    row.hi = head.keys;
    const int64_t diagonal = i + head.offset;
    if (a.left >= 0 && diagonal - a.left > 0) row.lo = diagonal - a.left;
    if (a.right >= 0 && diagonal + a.right + 1 < row.hi) row.hi = diagonal + a.right + 1;
  }
}

inline const void* at(const AttentionArgs& a, const Heads& x, int64_t entry, int64_t s, int64_t h) {
  return static_cast<const char*>(x.data) + (entry * x.batch + s * x.seq + h * x.head) * element_size(a.dtype);
}

// The row of a query, in q or dout, and of a key, in k or v.
inline const void* query_row(const AttentionArgs& a, const Heads& x, const KeyHead& head, const Row& row) {
  return at(a, x, head.entry, head.first_q + row.i, row.h);
}
inline const void* key_row(const AttentionArgs& a, const Heads& x, const KeyHead& head, int64_t j) {
  return at(a, x, head.entry, head.first_k + j, head.hk);
}

// The same as row numbers of contiguous tensors (batch, seq, heads, :); and the element of lse (batch, heads, seq_q).
inline int64_t query_number(const AttentionArgs& a, const KeyHead& head, const Row& row) {
  return (head.entry * a.seq_q + head.first_q + row.i) * a.heads + row.h;
}
inline int64_t key_number(const AttentionArgs& a, const KeyHead& head, int64_t j) {
  return (head.entry * a.seq_k + head.first_k + j) * a.heads_kv + head.hk;
}
inline int64_t lse_number(const AttentionArgs& a, const KeyHead& head, const Row& row) {
  return (head.entry * a.heads + row.h) * a.seq_q + head.first_q + row.i;
}

// Features that change a score beyond scaling by a positive number; without them the scale goes into the exponent,
// where it must be normal in float: 0 times the -inf of a hidden key would be NaN.
inline bool has_features(const AttentionArgs& a) {
  return a.softcap > 0 || a.slopes || a.bias.data || a.mask.data || !(a.scale > 1e-30);
}

// What a stored score is multiplied by in the exponent.
inline double exponent_factor(const AttentionArgs& a) { return has_features(a) ? 1.0 : a.scale; }

template <class T>
T slope_of(const AttentionArgs& a, const KeyHead& head, int64_t h) {
  return reinterpret_cast<const T*>(a.slopes)[head.b * a.slopes_batch + h];
}

template <class T>
void add_bias(const AttentionArgs& a, const KeyHead& head, const Row& row, int64_t j0, int64_t n, T* s) {
  const ScoreMap& m = a.bias;
  const int64_t first = head.b * m.batch + row.h * m.head + row.i * m.q + j0 * m.k + head.offset * m.offset;
  if (m.k == 0) {
    const T x = load_one<T>(m.dtype, m.data, first);
    for (int64_t j = 0; j < n; ++j) s[j] += x;
  } else if (m.k == 1) {
    constexpr int64_t kStep = 64;
    T buffer[kStep];
    for (int64_t j = 0; j < n; j += kStep) {
      const int64_t count = n - j < kStep ? n - j : kStep;
      load_row<T>(m.dtype, static_cast<const char*>(m.data) + (first + j) * element_size(m.dtype), count, buffer);
      for (int64_t i = 0; i < count; ++i) s[j + i] += buffer[i];
    }
  } else {
    for (int64_t j = 0; j < n; ++j) s[j] += load_one<T>(m.dtype, m.data, first + j * m.k);
  }
}

template <class T>
void apply_mask(const AttentionArgs& a, const KeyHead& head, const Row& row, int64_t j0, int64_t n, T* s) {
  const ScoreMap& m = a.mask;
  const uint8_t* see = static_cast<const uint8_t*>(m.data) + head.b * m.batch + row.h * m.head + row.i * m.q + j0 * m.k;
  const T hidden = -std::numeric_limits<T>::infinity();
  if (m.k == 1) {
    for (int64_t j = 0; j < n; ++j) s[j] = see[j] ? s[j] : hidden;
  } else {
    for (int64_t j = 0; j < n; ++j) s[j] = see[j * m.k] ? s[j] : hidden;
  }
}

// s (n,), in whole vectors: -inf outside [lo, hi).
template <class T>
void hide_outside(int64_t lo, int64_t hi, int64_t n, T* s) {
  using V = Vec<T>;
  static constexpr T kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const V lane = V::load(kNumbers), hidden = V::set1(-std::numeric_limits<T>::infinity());
  for (int64_t j = 0; j < lo; j += V::kLanes)
    select_less(lane, V::set1(T(lo - j)), hidden, V::load(s + j)).store(s + j);
  for (int64_t j = hi / V::kLanes * V::kLanes; j < n; j += V::kLanes)
    select_less(lane, V::set1(T(hi - j)), V::load(s + j), hidden).store(s + j);
}

// s (n,): q . k of keys j0 .. j0 + n of one row, replaced by what the softmax sees, up to exponent_factor.
// capped (n,) or null: receives the derivative of the soft cap.
template <class T>
void finish_scores(const AttentionArgs& a, const KeyHead& head, const Row& row, int64_t j0, int64_t n, T* s,
                   T* capped) {
  using V = Vec<T>;
  if (has_features(a)) {
    const int64_t valid = head.seq_k - j0 < n ? head.seq_k - j0 : n;
    if (a.softcap > 0) {
      const V factor = V::set1(T(a.scale / a.softcap)), cap = V::set1(T(a.softcap));
      for (int64_t j = 0; j < n; j += V::kLanes) {
        const V t = tanh(V::load(s + j) * factor);
        (t * cap).store(s + j);
        if (capped) (V::set1(1) - t * t).store(capped + j);
      }
    } else {
      const T scale = T(a.scale);
      for (int64_t j = 0; j < n; ++j) s[j] *= scale;
    }
    if (a.slopes) {
      const T slope = slope_of<T>(a, head, row.h);
      const T start = T(row.i + head.offset - j0);
      for (int64_t j = 0; j < n; ++j) s[j] -= slope * std::fabs(start - T(j));
    }
    if (a.bias.data) add_bias(a, head, row, j0, valid, s);
    if (a.mask.data) apply_mask(a, head, row, j0, valid, s);
  }
  hide_outside(row.lo - j0 < n ? row.lo - j0 : n, row.hi - j0 > 0 ? row.hi - j0 : 0, n, s);
}

// Dropout keeps the weights whose word is not below this.
inline uint32_t dropout_threshold(const AttentionArgs& a) {
  const uint64_t dropped = uint64_t(a.dropout_p * 4294967296.0);
  return dropped > 0xffffffffu ? 0xffffffffu : uint32_t(dropped);
}

// Multiplies x (n,) by 1 / (1 - dropout_p) where dropout keeps the weight of key j0 + c, and by 0 elsewhere; and so y
// (n,) or null. j0 is a multiple of 4: a counter is four keys of a query.
template <class T>
void apply_dropout(const AttentionArgs& a, const KeyHead& head, const Row& row, int64_t j0, int64_t n, T* x, T* y) {
  constexpr int64_t kKeys = 4 * LMK_LANES;
  const uint32_t threshold = dropout_threshold(a);
  const T factor = a.dropout_p < 1 ? T(1 / (1 - a.dropout_p)) : T(0);
  uint32_t words[kKeys];
  for (int64_t j = 0; j < n; j += kKeys) {
    philox(a.seed, uint32_t((j0 + j) / 4), uint32_t(row.i), uint32_t(row.h), uint32_t(head.b), words);
    const int64_t count = n - j < kKeys ? n - j : kKeys;
    for (int64_t c = 0; c < count; ++c) x[j + c] = words[c] >= threshold ? x[j + c] * factor : T(0);
    if (y)
      for (int64_t c = 0; c < count; ++c) y[j + c] = words[c] >= threshold ? y[j + c] * factor : T(0);
  }
}

// What apply_dropout multiplies by.
template <class T>
void dropout_factors(const AttentionArgs& a, const KeyHead& head, const Row& row, int64_t j0, int64_t n, T* x) {
  for (int64_t c = 0; c < n; ++c) x[c] = 1;
  apply_dropout<T>(a, head, row, j0, n, x, nullptr);
}

// The part [begin, end) of a block of keys that some of the rows see, in whole panels and kColumnUnit; empty if none.
struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

template <class M>
Span visible_span(const Row* rows, int64_t n, int64_t j0, int64_t block) {
  int64_t lo = INT64_MAX, hi = 0;
  for (int64_t r = 0; r < n; ++r) {
    if (rows[r].lo >= rows[r].hi) continue;
    lo = rows[r].lo < lo ? rows[r].lo : lo;
    hi = rows[r].hi > hi ? rows[r].hi : hi;
  }
  Span s;
  s.begin = lo <= j0 ? 0 : lo >= j0 + block ? block : (lo - j0) / panel_of<M>() * panel_of<M>();
  s.end = hi <= j0 ? 0 : hi >= j0 + block ? block : round_up(hi - j0, kColumnUnit<M>);
  return s;
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
