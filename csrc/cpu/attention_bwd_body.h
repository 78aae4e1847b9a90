// The backward, from the saved log-sum-exp: P is recomputed block by block (Dao 2023, arXiv:2307.08691, algorithm 2).
// Included by attention_body.h.
//
//   S = Q K^T,  P = exp(S - lse),  dP = dO V^T,  dS = P * (dP - delta),  delta = rowsum(dO * O) - dlse
//   dV = P^T dO,  dK = dS^T Q,  dQ = dS K

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kBwdKeys = 192;                  // keys of a block: a multiple of kTileRows and of every panel
constexpr int64_t kBwdRows = LMK_TILES ? 64 : 48;  // rows of a block

// Rows whose scores are made at once.
template <class M>
constexpr int64_t kGradRows = kByTiles<M> ? 32 : kTileRows;

// What one block of rows against one block of keys needs, for the gradient of q, k, v and for the bias'.
template <class M>
struct GradScratch {
  using T = typename M::Acc;
  using E = typename M::Elem;
  int64_t q_ld, v_ld;        // of packed rows: elements along the head
  int64_t q_wide, v_wide;    // of rows padded to whole vectors
  E *q, *dout;               // rows (kBwdRows, ld), the A of the products for S and dP
  E *k_columns, *v_columns;  // blocks of keys and values by columns
  E* buffer;
  T *s, *dp, *capped;  // (kBwdRows, kBwdKeys); become P and dS

  GradScratch(const AttentionArgs& a, Arena& arena) {
    q_wide = round_up(a.head_dim, M::V::kLanes);
    v_wide = round_up(a.head_dim_v, M::V::kLanes);
    q_ld = M::kPack == 1 ? q_wide : (a.head_dim + 1) / 2;
    v_ld = M::kPack == 1 ? v_wide : (a.head_dim_v + 1) / 2;
    q = arena.take<E>(kBwdRows * q_ld);
    dout = arena.take<E>(kBwdRows * v_ld);
    k_columns = arena.take<E>(kBwdKeys * depth(a.head_dim));
    v_columns = arena.take<E>(kBwdKeys * depth(a.head_dim_v));
    const int64_t widest = depth(a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v);
    buffer = arena.take<E>(M::V::kLanes * round_up(widest, 16));
    s = arena.take<T>(kBwdRows * kBwdKeys);
    dp = arena.take<T>(kBwdRows * kBwdKeys);
    capped = arena.take<T>(a.softcap > 0 ? kBwdKeys : 0);
  }
  static int64_t depth(int64_t n) { return (n + M::kPack - 1) / M::kPack; }
};

template <class T>
double sum_row(const T* x, int64_t n) {
  double sum[8] = {};
  int64_t c = 0;
  for (; c + 8 <= n; c += 8)
    for (int lane = 0; lane < 8; ++lane) sum[lane] += x[c + lane];
  for (; c < n; ++c) sum[0] += x[c];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

template <class T>
T dot_rows(DType dtype, const void* x, const void* y, int64_t n) {
  T a[256], b[256];
  load_row<T>(dtype, x, n, a);
  load_row<T>(dtype, y, n, b);
  T sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int lane = 0; lane < 8; ++lane) sum[lane] += a[i + lane] * b[i + lane];
  for (; i < n; ++i) sum[0] += a[i] * b[i];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// Calls act(r, row) for all rows of a key head in their order, and fetch(row) some rows earlier.
template <class Fetch, class Act>
[[gnu::always_inline]] inline void each_row(const AttentionArgs& a, const KeyHead& head, Fetch fetch, Act act) {
  Row row;
  for (int64_t r = -kRowsAhead; r < head.rows; ++r) {
    if (r + kRowsAhead < head.rows) {
      rows_of(a, head, r + kRowsAhead, 1, &row);
      fetch(row);
    }
    if (r < 0) continue;
    rows_of(a, head, r, 1, &row);
    act(r, row);
  }
}

// rowsum(dout * out) - dlse of one row
template <class T>
T delta_of(const AttentionArgs& a, const KeyHead& head, const Row& row) {
  const T delta = dot_rows<T>(a.dtype, out_row(a, head, row), query_row(a, a.dout, head, row), a.head_dim_v);
  return a.dlse ? delta - static_cast<const T*>(a.dlse)[lse_number(a, head, row)] : delta;
}

// lse of one row; +inf where the row saw nothing, which makes every P 0.
template <class T>
T lse_of(const AttentionArgs& a, const KeyHead& head, const Row& row) {
  const T lse = static_cast<const T*>(a.lse)[lse_number(a, head, row)];
  return lse == -std::numeric_limits<T>::infinity() ? -lse : lse;
}

// Packs a block of rows.
template <class M>
void grad_rows(const AttentionArgs& a, const KeyHead& head, const GradScratch<M>& w, const Row* rows, int64_t n) {
  for (int64_t r = 0; r < n; ++r) {
    const void* q = query_row(a, a.q, head, rows[r]);
    const void* dout = query_row(a, a.dout, head, rows[r]);
    pack_rows<M>(a.dtype, &q, 1, a.head_dim, w.q + r * w.q_ld, w.q_ld);
    pack_rows<M>(a.dtype, &dout, 1, a.head_dim_v, w.dout + r * w.v_ld, w.v_ld);
  }
}

template <class M>
void grad_keys(const AttentionArgs& a, const KeyHead& head, const GradScratch<M>& w, int64_t j0, int64_t n,
               const void** rows) {
  key_rows(a, a.v, head, j0, n, rows);
  pack_columns<M>(a.dtype, rows, n, a.head_dim_v, w.v_columns, w.buffer);
  key_rows(a, a.k, head, j0, n, rows);
  pack_columns<M>(a.dtype, rows, n, a.head_dim, w.k_columns, w.buffer);
}

// Q K^T and dO V^T of rows r0 .. r0 + n in w.s and w.dp, columns of the span.
template <class M>
void score_products(const AttentionArgs& a, const GradScratch<M>& w, int64_t r0, int64_t n, Span span) {
  constexpr int64_t kPanel = panel_of<M>();
  const int64_t vecs = (span.end - span.begin) / M::V::kLanes, first = r0 * kBwdKeys + span.begin;
  const int64_t q_depth = w.depth(a.head_dim), v_depth = w.depth(a.head_dim_v);
  gemm<M, Start::zero>({w.q + r0 * w.q_ld, w.q_ld, 1, w.k_columns + span.begin * q_depth, kPanel, kPanel * q_depth,
                        w.s + first, kBwdKeys, q_depth, nullptr},
                       n, vecs);
  gemm<M, Start::zero>({w.dout + r0 * w.v_ld, w.v_ld, 1, w.v_columns + span.begin * v_depth, kPanel, kPanel * v_depth,
                        w.dp + first, kBwdKeys, v_depth, nullptr},
                       n, vecs);
}

// P (after dropout) and dS of rows r0 .. r0 + n in w.s and w.dp, columns of the span, from their lse and delta. dslopes
// (group,) and ddistance (group, distances) are added to, or null; score_gradient says that dS is wanted with respect
// to the score, after the soft cap.
template <class M>
void grad_scores(const AttentionArgs& a, const KeyHead& head, const GradScratch<M>& w, const Row* rows, int64_t r0,
                 const typename M::Acc* lse, const typename M::Acc* delta, int64_t n, int64_t j0, Span span,
                 double* dslopes, double* ddistance, bool score_gradient) {
  using T = typename M::Acc;
  using V = typename M::V;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t width = span.end - span.begin, first_key = j0 + span.begin;
  T* s_rows = w.s + r0 * kBwdKeys + span.begin;
  T* dp_rows = w.dp + r0 * kBwdKeys + span.begin;
  score_products<M>(a, w, r0, n, span);
  const V factor = V::set1(T(exponent_factor(a)));
  for (int64_t r = 0; r < n; ++r) {
    const Row& row = rows[r0 + r];
    T *s = s_rows + r * kBwdKeys, *dp = dp_rows + r * kBwdKeys;
    finish_scores<T>(a, head, row, first_key, width, s, a.softcap > 0 ? w.capped : nullptr);
    const V shift = V::set1(-lse[r0 + r]), d = V::set1(delta[r0 + r]);
    if (a.dropout_p > 0) {
      // dropout's factor is on P for dV and on dP for dS; P itself multiplies dP - delta
      for (int64_t c = 0; c < width; c += kLanes) M::exp(fma(V::load(s + c), factor, shift)).store(s + c);
      T p[kBwdKeys];
      memcpy(p, s, size_t(width) * sizeof(T));
      apply_dropout<T>(a, head, row, first_key, width, s, dp);
      for (int64_t c = 0; c < width; c += kLanes) (V::load(p + c) * (V::load(dp + c) - d)).store(dp + c);
    } else {
      for (int64_t c = 0; c < width; c += kLanes) {
        const V p = M::exp(fma(V::load(s + c), factor, shift));
        p.store(s + c);
        (p * (V::load(dp + c) - d)).store(dp + c);
      }
    }
    if (dslopes) {
      const T start = T(row.i + head.offset - first_key);
      T weighted[kBwdKeys];
      for (int64_t c = 0; c < width; ++c) weighted[c] = dp[c] * std::fabs(start - T(c));
      dslopes[row.h - head.hk * head.group] -= sum_row(weighted, width);
    }
    if (ddistance) {
      double* sum =
          ddistance + (row.h - head.hk * head.group) * a.distances + a.most_k + first_key - row.i - head.offset;
      const int64_t seen = head.keys - first_key < width ? head.keys - first_key : width;
      for (int64_t c = 0; c < seen; ++c) sum[c] += dp[c];
    }
    if (a.softcap > 0 && !score_gradient)
      for (int64_t c = 0; c < width; ++c) dp[c] *= w.capped[c];
  }
}

template <class M>
struct BwdScratch : GradScratch<M> {
  using T = typename M::Acc;
  using E = typename M::Elem;
  E* k_rows;                   // block of keys, the B of dQ
  E *q_depth, *dout_depth;     // rows as the B of dK and dV; where kPack is 1 they are q and dout
  E *p_depth, *ds_depth, *ds;  // P and dS as pairs of rows, dS as pairs of keys, where kPack is 2
  T *dk, *dv;                  // (kBwdKeys, wide)
  T *lse, *delta;              // (rows of the key head,)
  T* dq;                       // (rows of the key head, q_wide); elsewhere where tasks share a key head
  int64_t bytes;

  static BwdScratch make(const AttentionArgs& a, void* base) {
    Arena arena(base);
    return BwdScratch(a, arena);
  }
  BwdScratch(const AttentionArgs& a, Arena& arena) : GradScratch<M>(a, arena) {
    k_rows = arena.take<E>(kBwdKeys / M::kPack * this->q_wide);
    if constexpr (M::kPack == 1) {
      q_depth = this->q;
      dout_depth = this->dout;
      p_depth = this->s;
      ds_depth = ds = this->dp;
    } else {
      q_depth = arena.take<E>(kBwdRows / 2 * this->q_wide);
      dout_depth = arena.take<E>(kBwdRows / 2 * this->v_wide);
      p_depth = arena.take<E>(kBwdRows / 2 * kBwdKeys);
      ds_depth = arena.take<E>(kBwdRows / 2 * kBwdKeys);
      ds = arena.take<E>(kBwdRows * kBwdKeys / 2);
    }
    dk = arena.take<T>(kBwdKeys * this->q_wide);
    dv = arena.take<T>(kBwdKeys * this->v_wide);
    lse = arena.take<T>(a.most_rows);
    delta = arena.take<T>(a.most_rows);
    dq = arena.take<T>(a.most_rows * this->q_wide);
    bytes = arena.used();
  }
};

template <class M>
int64_t bwd_scratch(const AttentionArgs& a) {
  return BwdScratch<M>::make(a, nullptr).bytes;
}

#if LMK_BF16_DOT
// A row of scores and of dP, of which P and dS are made.
struct GradRow {
  const float *s, *dp;
  float shift;  // -lse log2 e
  float delta;
  uint32_t* ds;       // dS as pairs of keys
  const float* keep;  // what dropout multiplies by
};

inline __m512i narrow(Vec<float> low, Vec<float> high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
}

// P (after dropout) and dS of two rows as pairs of rows, p and ds (width,), and dS of each as pairs of keys. factor has
// log2 e in it.
template <bool kDropout>
void grad_row_pair(const GradRow& even, const GradRow& odd, int64_t width, float factor, uint32_t* p, uint32_t* ds) {
  using V = Vec<float>;
  alignas(64) static constexpr uint16_t kPairs[2][32] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i first = _mm512_load_si512(kPairs[0]), second = _mm512_load_si512(kPairs[1]);
  for (int64_t j = 0; j < width; j += 32) {
    const bool both = j + 16 < width;
    __m512i p_rows[2], ds_rows[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const GradRow& row = r == 0 ? even : odd;
      const V f = V::set1(factor), shift = V::set1(row.shift), delta = V::set1(row.delta);
      const int64_t next = both ? j + 16 : j;
      const V low = exp2_bf16(fma(V::load(row.s + j), f, shift));
      const V high = exp2_bf16(fma(V::load(row.s + next), f, shift));
      V dp_low = V::load(row.dp + j), dp_high = V::load(row.dp + next);
      if constexpr (kDropout) {
        // its factor is on P for dV and on dP for dS; P itself multiplies dP - delta
        const V keep_low = V::load(row.keep + j), keep_high = V::load(row.keep + next);
        p_rows[r] = narrow(low * keep_low, high * keep_high);
        dp_low = dp_low * keep_low, dp_high = dp_high * keep_high;
      } else {
        p_rows[r] = narrow(low, high);
      }
      ds_rows[r] = narrow(low * (dp_low - delta), high * (dp_high - delta));
    }
    _mm512_storeu_si512(p + j, _mm512_permutex2var_epi16(p_rows[0], first, p_rows[1]));
    _mm512_storeu_si512(ds + j, _mm512_permutex2var_epi16(ds_rows[0], first, ds_rows[1]));
    if (both) {
      _mm512_storeu_si512(p + j + 16, _mm512_permutex2var_epi16(p_rows[0], second, p_rows[1]));
      _mm512_storeu_si512(ds + j + 16, _mm512_permutex2var_epi16(ds_rows[0], second, ds_rows[1]));
      _mm512_storeu_si512(even.ds + j / 2, ds_rows[0]);
      _mm512_storeu_si512(odd.ds + j / 2, ds_rows[1]);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(even.ds + j / 2), _mm512_castsi512_si256(ds_rows[0]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd.ds + j / 2), _mm512_castsi512_si256(ds_rows[1]));
    }
  }
}

// P and dS of rows r0 .. r0 + n in w.p_depth, w.ds_depth and w.ds, columns of the span, and zeros in the rest of all.
inline void grad_pairs(const AttentionArgs& a, const KeyHead& head, const BwdScratch<MathBf16>& w, const Row* rows,
                       int64_t r0, const float* lse, const float* delta, int64_t n, int64_t j0, Span span, Span all) {
  const int64_t width = span.end - span.begin;
  if (width > 0) score_products<MathBf16>(a, w, r0, n, span);
  const float factor = float(exponent_factor(a) * kLog2e);
  const bool dropout = a.dropout_p > 0;
  float keep[2][kBwdKeys];
  const auto row_of = [&](int64_t r) {
    float* s = w.s + r * kBwdKeys + span.begin;
    finish_scores<float>(a, head, rows[r], j0 + span.begin, width, s, nullptr);
    if (dropout) dropout_factors(a, head, rows[r], j0 + span.begin, width, keep[r % 2]);
    return GradRow{s,        w.dp + r * kBwdKeys + span.begin,       -lse[r] * float(kLog2e),
                   delta[r], w.ds + (r * kBwdKeys + span.begin) / 2, keep[r % 2]};
  };
  for (int64_t r = r0; r < r0 + n; r += 2) {
    const int64_t to = r / 2 * kBwdKeys;
    for (uint32_t* x : {w.p_depth + to, w.ds_depth + to}) {
      for (int64_t c = all.begin; c < span.begin; ++c) x[c] = 0;
      for (int64_t c = span.end; c < all.end; ++c) x[c] = 0;
    }
    if (width == 0) continue;
    const GradRow even = row_of(r);
    GradRow odd = even;
    if (r + 1 < r0 + n) {
      odd = row_of(r + 1);
    } else {  // no such row
      odd.shift = -std::numeric_limits<float>::infinity();
      odd.ds += kBwdKeys / 2;
    }
    (dropout ? grad_row_pair<true> : grad_row_pair<false>)(even, odd, width, factor, w.p_depth + to + span.begin,
                                                           w.ds_depth + to + span.begin);
  }
}
#endif

// The gradients of the block's rows against the block's keys: w.dq, w.dk and w.dv are added to.
template <class M>
void bwd_block(const AttentionArgs& a, const KeyHead& head, const BwdScratch<M>& w, int64_t first_row, int64_t n,
               int64_t j0, int64_t block, double* dslopes, double* ddistance, Ahead& ahead) {
  using T = typename M::Acc;
  constexpr int64_t kLanes = M::V::kLanes, kPanel = panel_of<M>(), kPack = M::kPack;
  Row rows[kBwdRows];
  rows_of(a, head, first_row, n, rows);
  const Span all = visible_span<M>(rows, n, j0, round_up(block, kColumnUnit<M>));
  if (all.empty()) return;
  grad_rows<M>(a, head, w, rows, n);
  T* dq = w.dq + first_row * w.q_wide;
  const auto product_of = [&](Span span, int64_t r0, int64_t count) {  // dS K
    if (span.empty()) return;
    gemm<M, Start::add>(
        {w.ds + (r0 * kBwdKeys + span.begin) / kPack, kBwdKeys / kPack, 1, w.k_rows + span.begin / kPack * w.q_wide,
         w.q_wide, kPanel, dq + r0 * w.q_wide, w.q_wide, (span.end - span.begin) / kPack, nullptr},
        count, w.q_wide / kLanes);
  };
  [[maybe_unused]] const bool in_pairs = a.softcap == 0 && !dslopes && !ddistance;
  for (int64_t r0 = 0; r0 < n; r0 += kGradRows<M>) {
    const int64_t count = n - r0 < kGradRows<M> ? n - r0 : kGradRows<M>;
    for (int64_t r = 0; r < count; ++r) ahead.step(a);
    Span span = visible_span<M>(rows + r0, count, j0, round_up(block, kColumnUnit<M>));
    if (span.empty()) span = {all.begin, all.begin};
    if constexpr (kPack == 2 && !kByTiles<M>) {
      if (in_pairs) {
        grad_pairs(a, head, w, rows, r0, w.lse + first_row, w.delta + first_row, count, j0, span, all);
        product_of(span, r0, count);
        continue;
      }
    }
    if (!span.empty())
      grad_scores<M>(a, head, w, rows, r0, w.lse + first_row, w.delta + first_row, count, j0, span, dslopes, ddistance,
                     false);
    for (int64_t r = r0; r < r0 + count; ++r)
      for (T* x : {w.s + r * kBwdKeys, w.dp + r * kBwdKeys}) {
        for (int64_t c = all.begin; c < span.begin; ++c) x[c] = 0;
        for (int64_t c = span.end; c < all.end; ++c) x[c] = 0;
      }
    if constexpr (kPack == 2) {
      if (count % 2)
        for (T* x : {w.s + (r0 + count) * kBwdKeys, w.dp + (r0 + count) * kBwdKeys})
          for (int64_t c = all.begin; c < all.end; ++c) x[c] = 0;
      const int64_t width = all.end - all.begin;
      for (int64_t r = r0; r < r0 + count; r += 2) {
        const int64_t from = r * kBwdKeys + all.begin, to = r / 2 * kBwdKeys + all.begin;
        M::pack_row_pair(w.s + from, w.s + from + kBwdKeys, width, w.p_depth + to);
        M::pack_row_pair(w.dp + from, w.dp + from + kBwdKeys, width, w.ds_depth + to);
      }
      for (int64_t r = r0; r < r0 + count; ++r)
        M::pack_row(w.dp + r * kBwdKeys + all.begin, width, w.ds + (r * kBwdKeys + all.begin) / 2);
    }
    product_of(span, r0, count);
  }
  if constexpr (kPack == 2) {
    const void* sources[kBwdRows];
    for (int64_t r = 0; r < n; ++r) sources[r] = query_row(a, a.q, head, rows[r]);
    pack_depth<M>(a.dtype, sources, n, a.head_dim, w.q_depth, w.q_wide);
    for (int64_t r = 0; r < n; ++r) sources[r] = query_row(a, a.dout, head, rows[r]);
    pack_depth<M>(a.dtype, sources, n, a.head_dim_v, w.dout_depth, w.v_wide);
  }
  int64_t depth = (n + kPack - 1) / kPack;
  if constexpr (kByTiles<M>)  // whole tiles of the depth
    for (; depth % kTileSide != 0; ++depth) {
      memset(w.p_depth + depth * kBwdKeys, 0, kBwdKeys * sizeof(w.p_depth[0]));
      memset(w.ds_depth + depth * kBwdKeys, 0, kBwdKeys * sizeof(w.ds_depth[0]));
      memset(w.q_depth + depth * w.q_wide, 0, size_t(w.q_wide) * sizeof(w.q_depth[0]));
      memset(w.dout_depth + depth * w.v_wide, 0, size_t(w.v_wide) * sizeof(w.dout_depth[0]));
    }
  for (int64_t key = all.begin; key < all.end;) {
    // the first rows may see nothing of the last keys (of a causal triangle)
    int64_t skip = 0, end = all.end;
    if constexpr (!kByTiles<M>) {
      const auto last_seen = [&](int64_t at) {
        int64_t hi = 0;
        for (int64_t r = at * kPack; r < n && r < (at + 1) * kPack; ++r) hi = rows[r].hi > hi ? rows[r].hi : hi;
        return hi - j0;
      };
      while (skip + 1 < depth && last_seen(skip) <= key) ++skip;
      const int64_t seen = skip == 0 ? round_up(last_seen(0) - key, kTileRows) : 2 * kTileRows;
      if (seen > 0 && key + seen < end) end = key + seen;
    }
    gemm<M, Start::add>({w.p_depth + skip * kBwdKeys + key, 1, kBwdKeys, w.dout_depth + skip * w.v_wide, w.v_wide,
                         kPanel, w.dv + key * w.v_wide, w.v_wide, depth - skip, nullptr},
                        end - key, w.v_wide / kLanes);
    gemm<M, Start::add>({w.ds_depth + skip * kBwdKeys + key, 1, kBwdKeys, w.q_depth + skip * w.q_wide, w.q_wide, kPanel,
                         w.dk + key * w.q_wide, w.q_wide, depth - skip, nullptr},
                        end - key, w.q_wide / kLanes);
    key = end;
  }
}

// dk and dv of a block, scaled and rounded.
template <class T>
void store_keys(const AttentionArgs& a, const KeyHead& head, int64_t j0, int64_t n, const T* dk, int64_t dk_ld,
                const T* dv, int64_t dv_ld) {
  const int64_t bytes = element_size(a.dtype);
  T scaled[256];
  const auto row = [&](void* x, int64_t j, int64_t dim) {
    return static_cast<char*>(x) + key_number(a, head, j0 + j) * dim * bytes;
  };
  for (int64_t j = -kRowsAhead; j < n; ++j) {
    if (j + kRowsAhead < n) {
      prefetch_out(row(a.dk, j + kRowsAhead, a.head_dim), a.head_dim * bytes);
      prefetch_out(row(a.dv, j + kRowsAhead, a.head_dim_v), a.head_dim_v * bytes);
    }
    if (j < 0) continue;
    for (int64_t c = 0; c < a.head_dim; ++c) scaled[c] = dk[j * dk_ld + c] * T(a.scale);
    store_row(a.dtype, scaled, a.head_dim, row(a.dk, j, a.head_dim));
    store_row(a.dtype, dv + j * dv_ld, a.head_dim_v, row(a.dv, j, a.head_dim_v));
  }
}

// The part of dq_partial that a task of the key head owns.
template <class T>
T* dq_part(const AttentionArgs& a, const KeyHead& head, int64_t part, int64_t wide) {
  return static_cast<T*>(a.dq_partial) + (head.rows_before + (head.hk * head.parts + part) * head.rows) * wide;
}

inline char* dq_row(const AttentionArgs& a, const KeyHead& head, const Row& row) {
  return static_cast<char*>(a.dq) + query_number(a, head, row) * a.head_dim * element_size(a.dtype);
}

// dq of all rows of a key head: sum_of(r) is the sum of row r, which is scaled.
template <class SumOf>
void store_queries(const AttentionArgs& a, const KeyHead& head, SumOf sum_of) {
  each_row(
      a, head, [&](const Row& row) { prefetch_out(dq_row(a, head, row), a.head_dim * element_size(a.dtype)); },
      [&](int64_t r, const Row& row) {
        auto* sum = sum_of(r);
        using T = std::remove_reference_t<decltype(*sum)>;
        for (int64_t c = 0; c < a.head_dim; ++c) sum[c] *= T(a.scale);
        store_row(a.dtype, sum, a.head_dim, dq_row(a, head, row));
      });
}

template <class M>
void bwd(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  using T = typename M::Acc;
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  BwdScratch<M> w = BwdScratch<M>::make(a, scratch);
  Ahead ahead(a, next);

  if (head.parts > 1) w.dq = dq_part<T>(a, head, task.part, w.q_wide);
  memset(w.dq, 0, size_t(head.rows * w.q_wide) * sizeof(T));
  const int64_t number = head.parts_before + head.hk * head.parts + task.part;
  double* dslopes = a.dslopes_partial ? a.dslopes_partial + number * head.group : nullptr;
  for (int64_t g = 0; dslopes && g < head.group; ++g) dslopes[g] = 0;
  const int64_t distances = head.group * a.distances;
  double* ddistance = a.ddistance_partial ? a.ddistance_partial + number * distances : nullptr;
  for (int64_t i = 0; ddistance && i < distances; ++i) ddistance[i] = 0;
  double* dsink =
      a.dsink_partial && task.part == 0 ? a.dsink_partial + head.b * a.heads + head.hk * head.group : nullptr;
  for (int64_t g = 0; dsink && g < head.group; ++g) dsink[g] = 0;
  const int64_t bytes = a.head_dim * element_size(a.dtype), bytes_v = a.head_dim_v * element_size(a.dtype);
  // the keys of the next block, or the first one, come into the L2 cache a few at a time
  int64_t fetched = task.part * kBwdKeys;
  const auto fetch_key = [&](int64_t end) {
    if (fetched >= end || fetched >= head.keys) return;
    prefetch_row(key_row(a, a.k, head, fetched), bytes);
    prefetch_row(key_row(a, a.v, head, fetched++), bytes_v);
  };
  each_row(
      a, head,
      [&](const Row& row) {
        prefetch_row(query_row(a, a.q, head, row), bytes);
        prefetch_row(query_row(a, a.dout, head, row), bytes_v);
        prefetch_row(out_row(a, head, row), bytes_v);
        fetch_key((task.part + 1) * kBwdKeys);
      },
      [&](int64_t r, const Row& row) {
        w.lse[r] = lse_of<T>(a, head, row);
        w.delta[r] = delta_of<T>(a, head, row);
        if (!dsink) return;
        const T sink = reinterpret_cast<const T*>(a.sink)[row.h];
        dsink[r / head.seq_q] -= exp_one(sink - w.lse[r]) * w.delta[r];
      });

  const void* sources[kBwdKeys];
  for (int64_t j0 = task.part * kBwdKeys; j0 < head.seq_k; j0 += head.parts * kBwdKeys) {
    const int64_t stored = head.seq_k - j0 < kBwdKeys ? head.seq_k - j0 : kBwdKeys;
    const int64_t block = head.keys - j0 < stored ? head.keys - j0 : stored;
    memset(w.dk, 0, size_t(round_up(stored, M::V::kLanes) * w.q_wide) * sizeof(T));
    memset(w.dv, 0, size_t(round_up(stored, M::V::kLanes) * w.v_wide) * sizeof(T));
    if (block > 0 && head.rows > 0) {
      grad_keys<M>(a, head, w, j0, block, sources);
      pack_depth<M>(a.dtype, sources, block, a.head_dim, w.k_rows, w.q_wide);
      const int64_t packed = (block + M::kPack - 1) / M::kPack * w.q_wide;
      for (int64_t i = packed; i < round_up(block, kColumnUnit<M>) / M::kPack * w.q_wide; ++i) w.k_rows[i] = 0;
      const int64_t following = j0 + head.parts * kBwdKeys;
      const int64_t per_block = (kBwdKeys * kBwdRows + head.rows - 1) / head.rows;
      fetched = following;
      for (int64_t r0 = 0; r0 < head.rows; r0 += kBwdRows) {
        for (int64_t j = 0; j < per_block; ++j) fetch_key(following + kBwdKeys);
        bwd_block<M>(a, head, w, r0, head.rows - r0 < kBwdRows ? head.rows - r0 : kBwdRows, j0, block, dslopes,
                     ddistance, ahead);
      }
    }
    store_keys<T>(a, head, j0, stored, w.dk, w.q_wide, w.dv, w.v_wide);
  }
  if (head.parts == 1) store_queries(a, head, [&](int64_t r) { return w.dq + r * w.q_wide; });
}

// dq of one key head, the sum over the parts in their order.
template <class M>
void bwd_finish(const AttentionArgs& a, const AttentionTask& task) {
  using T = typename M::Acc;
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const int64_t wide = round_up(a.head_dim, M::V::kLanes), step = head.rows * wide;
  T* partial = dq_part<T>(a, head, 0, wide);
  store_queries(a, head, [&](int64_t r) {
    T* sum = partial + r * wide;
    for (int64_t part = 1; part < head.parts; ++part)
      for (int64_t c = 0; c < a.head_dim; ++c) sum[c] += sum[part * step + c];
    return sum;
  });
}

// Gradient of the bias: a task owns a block of the bias and recomputes dS for every head, row and key that reads it, so
// no tensor of the scores' size appears and the order of the sum is fixed.
template <class M>
struct DbiasScratch : GradScratch<M> {
  double* sum;  // (kBwdRows, kBwdKeys); double: one element may collect the whole map
  int64_t bytes;
  static DbiasScratch make(const AttentionArgs& a, void* base) {
    Arena arena(base);
    return DbiasScratch(a, arena);
  }
  DbiasScratch(const AttentionArgs& a, Arena& arena) : GradScratch<M>(a, arena) {
    sum = arena.take<double>(kBwdRows * kBwdKeys);
    bytes = arena.used();
  }
};

template <class M>
int64_t dbias_scratch(const AttentionArgs& a) {
  return DbiasScratch<M>::make(a, nullptr).bytes;
}

template <class M>
void dbias(const AttentionArgs& a, int64_t task, void* scratch) {
  using T = typename M::Acc;
  const DbiasScratch<M> w = DbiasScratch<M>::make(a, scratch);
  const int64_t row_tasks = (a.dbias_q + kBwdRows - 1) / kBwdRows, key_tasks = (a.dbias_k + kBwdKeys - 1) / kBwdKeys;
  const int64_t key_task = task % key_tasks, row_task = task / key_tasks % row_tasks;
  const int64_t bias_head = task / (key_tasks * row_tasks) % a.dbias_heads;
  const int64_t bias_batch = task / (key_tasks * row_tasks * a.dbias_heads);
  const bool all_rows = a.dbias_q == 1, all_keys = a.dbias_k == 1;
  const int64_t i_begin = all_rows ? 0 : row_task * kBwdRows, j_begin = all_keys ? 0 : key_task * kBwdKeys;
  memset(w.sum, 0, size_t(kBwdRows * kBwdKeys) * sizeof(double));

  const void* sources[kBwdKeys];
  Row rows[kBwdRows];
  for (int64_t b = 0; b < a.sequences; ++b) {
    if (a.dbias_batch > 1 && b != bias_batch) continue;
    const Sequence& sequence = a.sequence[b];
    const int64_t i_end = all_rows || i_begin + kBwdRows > sequence.seq_q ? sequence.seq_q : i_begin + kBwdRows;
    const int64_t j_end = all_keys || j_begin + kBwdKeys > sequence.keys ? sequence.keys : j_begin + kBwdKeys;
    if (i_begin >= i_end) continue;
    for (int64_t h = 0; h < a.heads; ++h) {
      if (a.dbias_heads > 1 && h != bias_head) continue;
      const KeyHead head = key_head(a, b, h / (a.heads / a.heads_kv));
      const int64_t head_row = (h - head.hk * head.group) * head.seq_q;
      for (int64_t j0 = j_begin; j0 < j_end; j0 += kBwdKeys) {
        const int64_t block = j_end - j0 < kBwdKeys ? j_end - j0 : kBwdKeys;
        grad_keys<M>(a, head, w, j0, block, sources);
        for (int64_t i0 = i_begin; i0 < i_end; i0 += kBwdRows) {
          const int64_t n = i_end - i0 < kBwdRows ? i_end - i0 : kBwdRows;
          T lse[kBwdRows], delta[kBwdRows];
          rows_of(a, head, head_row + i0, n, rows);
          for (int64_t r = 0; r < n; ++r) {
            lse[r] = lse_of<T>(a, head, rows[r]);
            delta[r] = delta_of<T>(a, head, rows[r]);
          }
          const Span span = visible_span<M>(rows, n, j0, round_up(block, kColumnUnit<M>));
          if (span.empty()) continue;
          grad_rows<M>(a, head, w, rows, n);
          grad_scores<M>(a, head, w, rows, 0, lse, delta, n, j0, span, nullptr, nullptr, true);
          const int64_t end = span.end < block ? span.end : block;
          for (int64_t r = 0; r < n; ++r) {
            const T* ds = w.dp + r * kBwdKeys;
            double* sum = w.sum + (all_rows ? 0 : r * kBwdKeys);
            if (all_keys)
              sum[0] += sum_row(ds + span.begin, end - span.begin);
            else
              for (int64_t c = span.begin; c < end; ++c) sum[c] += ds[c];
          }
        }
      }
    }
  }

  const int64_t rows_left = a.dbias_q - row_task * kBwdRows, keys_left = a.dbias_k - key_task * kBwdKeys;
  const int64_t n_rows = rows_left < kBwdRows ? rows_left : kBwdRows;
  const int64_t n_keys = keys_left < kBwdKeys ? keys_left : kBwdKeys;
  for (int64_t r = 0; r < n_rows; ++r) {
    const int64_t at_bias =
        ((bias_batch * a.dbias_heads + bias_head) * a.dbias_q + row_task * kBwdRows + r) * a.dbias_k +
        key_task * kBwdKeys;
    T row[kBwdKeys];
    for (int64_t c = 0; c < n_keys; ++c) row[c] = T(w.sum[r * kBwdKeys + c]);
    store_row(a.bias.dtype, row, n_keys, static_cast<char*>(a.dbias) + at_bias * element_size(a.bias.dtype));
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
