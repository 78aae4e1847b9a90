// Linear cross entropy for one instruction set; included by linear_cross_entropy.cpp through foreach_isa.h.
//
// The logits of a chunk of tokens are computed transposed: rows of the weight are read where they lie, and a panel of
// tokens fills the vectors, so that maxima and sums over the vocabulary run along memory, without reductions inside a
// vector. They are kept for a gradient only. Then the derivatives take their place, in the form in which dhidden's
// product reads them: panels (panel, vocab, kPanel) or, for pairs of bfloat16, rows of kPanel pairs at every second
// row.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "matmul.h"

namespace lmk {
namespace LMK_NS {
namespace {

// C = A B, or C += A B where add is set, in parts of the depth that join C one by one. The sums over tokens and over
// the vocabulary hold a few large terms, the labels', among many small ones: each of these, added to one running sum,
// would be rounded at the size of the large ones. (Tiles go on from C all the same.)
template <class M>
void gemm_in_parts(GemmArgs<M> g, int64_t rows, int64_t vecs, bool add) {
  constexpr int64_t kPart = 256;
  const int64_t depth = g.depth;
  for (int64_t k = 0; k < depth; k += kPart) {
    g.depth = depth - k < kPart ? depth - k : kPart;
    if (add || k > 0)
      gemm<M, Start::add>(g, rows, vecs);
    else
      gemm<M, Start::zero>(g, rows, vecs);
    g.a += g.depth * g.a_depth;
    g.b += g.depth * g.b_depth;
  }
}

// Elements of the depth, hidden or vocabulary, that are taken at once.
template <class M>
constexpr int64_t kLossDepth = kByTiles<M> ? 192 : kMatmulDepth<M>;

// Rows of the weight that are taken at once.
template <class M>
constexpr int64_t kLossRows = kBySplit<M> ? 2 * kMatmulRows : kMatmulRows;

// Elements that one of a panel's lines takes, packed over n of the depth.
template <class M>
int64_t packed_elements(int64_t n) {
#if LMK_TILES
  if constexpr (kBySplit<M>) return split_steps(n) * M::kStep / kSplitSide;
#endif
  return (n + M::kPack - 1) / M::kPack;
}

// The memory that the tasks of a call share.
template <class M>
struct LossMemory {
  using E = typename M::Elem;
  using T = typename M::Acc;
  static constexpr int64_t kPanel = panel_of<M>();
  int64_t tokens, vocab, blocks, width;   // rounded up: capacity, vocabulary, depth
  int64_t column_elements, row_elements;  // packed depth of the two forms of hidden
  E* columns;                             // (panels of tokens, column_elements, kPanel), for the logits
  E* rows;                                // (panels of depth, row_elements, kPanel), for dweight
  T* logits;                              // (panels of tokens, vocab, kPanel)
  T *largest, *sum, *total;               // (blocks, tokens): maximum, sum of e^(logit - maximum), sum of logits
  T* label_logit;                         // (tokens,)
  T *shift, *factor, *constant,
      *on_label;   // (tokens,): dlogit = e^(logit - shift) factor - constant - on_label [label]
  T* partial;      // (splits, tokens, width)
  uint32_t* bits;  // (panels of tokens,): by split products, of the largest element of hidden

  LossMemory(const LossArgs& a, Arena& arena) {
    constexpr bool kSplit = kBySplit<M>;
    tokens = round_up(a.capacity, kPanel);
    vocab = round_up(a.vocab, kSplit ? kPanel : M::kPack);
    blocks = (a.vocab + a.vocab_block - 1) / a.vocab_block;
    width = round_up(a.depth, kSplit ? kPanel : M::V::kLanes);
    column_elements = packed_elements<M>(a.depth);
    row_elements = packed_elements<M>(tokens);
    bits = arena.take<uint32_t>(kSplit ? tokens / kPanel : 0);
    columns = arena.take<E>(tokens * column_elements);
    largest = arena.take<T>(blocks * tokens);
    sum = arena.take<T>(blocks * tokens);
    total = arena.take<T>(blocks * tokens);
    label_logit = arena.take<T>(tokens);
    if (!a.keep_logits) return;
    rows = arena.take<E>(round_up(a.depth, kPanel) * row_elements);
    logits = arena.take<T>(tokens * vocab);
    shift = arena.take<T>(tokens);
    factor = arena.take<T>(tokens);
    constant = arena.take<T>(tokens);
    on_label = arena.take<T>(tokens);
    partial = arena.take<T>(a.splits * tokens * width);
  }
};

template <class M>
int64_t loss_shared(const LossArgs& a) {
  Arena arena(nullptr);
  LossMemory<M>(a, arena);
  return arena.used();
}

inline const void* hidden_row(const LossArgs& a, int64_t i, int64_t col) {
  return static_cast<const char*>(a.hidden) + (a.tokens[i] * a.hidden_row + col) * element_size(a.compute);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Both packed forms of a panel of hidden.
template <class M>
void pack_task(const LossArgs& a, int64_t task, void* scratch) {
  constexpr int64_t kPanel = panel_of<M>();
  Arena shared(a.shared);
  const LossMemory<M> m(a, shared);
  const int64_t token = task * kPanel, have = least(kPanel, a.count - token);
  const void* lines[kPanel];
  for (int64_t i = 0; i < have; ++i) lines[i] = hidden_row(a, token + i, 0);
  pack_columns<M>(a.compute, lines, have, a.depth, m.columns + token * m.column_elements,
                  static_cast<typename M::Elem*>(scratch));
  if (!a.dweight) return;
  for (int64_t i = 0; i < have; i += M::kPack)
    for (int64_t col = 0; col < a.depth; col += kPanel) {
      const int64_t n = least(M::kPack, have - i);
      const void* pair[2] = {hidden_row(a, token + i, col), n > 1 ? hidden_row(a, token + i + 1, col) : nullptr};
      pack_depth<M>(a.compute, pair, n, least(kPanel, a.depth - col),
                    m.rows + col * m.row_elements + (token + i) / M::kPack * kPanel, kPanel);
    }
}

// What the products alone leave of logits (n rows of the vocabulary, vecs vectors of tokens): adds the bias, caps,
// enters maximum and sums in those of the block, and takes note of the logits of labels.
template <class M>
void finish_logits(const LossArgs& a, const LossMemory<M>& m, int64_t block, int64_t row, int64_t n, int64_t token,
                   int64_t vecs, typename M::Acc* logits) {
  using T = typename M::Acc;
  using V = typename M::V;
  constexpr int64_t kPanel = panel_of<M>(), kLanes = V::kLanes;
  T bias[kLossRows<M>];
  if (a.bias) load_row(a.bias_dtype, static_cast<const char*>(a.bias) + row * element_size(a.bias_dtype), n, bias);
  const bool capped = a.softcap > 0;
  const V cap = V::set1(T(a.softcap)), inverse = V::set1(capped ? T(1) / T(a.softcap) : T(0));
  const int64_t stats = block * m.tokens + token;
  for (int64_t i = 0; i < vecs * kLanes; i += kLanes) {
    V largest = V::set1(std::numeric_limits<T>::lowest()), sum = V::zero(), total = V::zero();
    for (int64_t r = 0; r < n; ++r) {
      T* p = logits + r * kPanel + i;
      V x = V::load(p);
      if (a.bias) x = x + V::set1(bias[r]);
      if (capped) x = cap * tanh(x * inverse);
      if (a.bias || capped) x.store(p);
      if (a.label_smoothing > 0) total = total + x;
      largest = max(largest, x);
    }
    for (int64_t r = 0; r < n; ++r) sum = sum + exp(V::load(logits + r * kPanel + i) - largest);
    const V before = V::load(m.largest + stats + i), after = max(before, largest);
    fma(V::load(m.sum + stats + i), exp(before - after), sum * exp(largest - after)).store(m.sum + stats + i);
    after.store(m.largest + stats + i);
    (V::load(m.total + stats + i) + total).store(m.total + stats + i);
  }
  for (int64_t i = 0; i < least(kPanel, a.count - token); ++i) {
    const int64_t r = a.labels[a.tokens[token + i]] - row;
    if (r >= 0 && r < n) m.label_logit[token + i] = logits[r * kPanel + i];
  }
}

// Maximum and sums of a block before its first logit.
template <class M>
void start_block(const LossMemory<M>& m, int64_t block) {
  using T = typename M::Acc;
  for (int64_t i = block * m.tokens; i < (block + 1) * m.tokens; ++i) {
    m.largest[i] = std::numeric_limits<T>::lowest();
    m.sum[i] = m.total[i] = 0;
  }
}

template <class M>
void logits_task(const LossArgs& a, int64_t task, void* scratch) {
  using T = typename M::Acc;
  constexpr int64_t kPanel = panel_of<M>(), kLanes = M::V::kLanes, kStep = kLossDepth<M> * M::kPack;
  Arena shared(a.shared), own(scratch);
  const LossMemory<M> m(a, shared);
  const MatmulScratch<M> w(kMatmulRows, kLanes, least(a.depth, kStep), own);
  T* passing = a.keep_logits ? nullptr : own.take<T>(m.tokens * kMatmulRows);
  start_block(m, task);
  GemmArgs<M> g{};
  g.b_depth = g.b_panel = g.c_row = kPanel;
  const int64_t end = least(a.vocab, (task + 1) * a.vocab_block);
  for (int64_t row = task * a.vocab_block; row < end; row += kMatmulRows) {
    const int64_t n = least(kMatmulRows, end - row);
    for (int64_t k = 0; k == 0 || k < a.depth; k += kStep) {
      const int64_t depth = least(kStep, a.depth - k);
      take_a<M>(a.weight, row, n, k, depth, w, g);
      g.depth = (depth + M::kPack - 1) / M::kPack;
      for (int64_t token = 0; token < a.count; token += kPanel) {
        const int64_t vecs = (least(kPanel, a.count - token) + kLanes - 1) / kLanes;
        g.b = m.columns + token * m.column_elements + k / M::kPack * kPanel;
        g.c = a.keep_logits ? m.logits + token * m.vocab + row * kPanel : passing + token * kMatmulRows;
        if (k == 0)
          gemm<M, Start::zero>(g, n, vecs);
        else
          gemm<M, Start::add>(g, n, vecs);
        if (k + kStep >= a.depth) finish_logits<M>(a, m, task, row, n, token, vecs, g.c);
      }
    }
  }
}

// The losses of a panel, and what turns its logits into derivatives. lse = shift + log(sum).
template <class M>
void loss_task(const LossArgs& a, int64_t task, void*) {
  using T = typename M::Acc;
  using V = typename M::V;
  constexpr int64_t kPanel = panel_of<M>();
  Arena shared(a.shared);
  const LossMemory<M> m(a, shared);
  const int64_t token = task * kPanel, have = least(kPanel, a.count - token);
  T shift[kPanel], sum[kPanel], total[kPanel];
  for (int64_t i = 0; i < kPanel; i += V::kLanes) {
    V largest = V::set1(std::numeric_limits<T>::lowest()), s = V::zero(), all = V::zero();
    for (int64_t b = 0; b < m.blocks; ++b) largest = max(largest, V::load(m.largest + b * m.tokens + token + i));
    for (int64_t b = 0; b < m.blocks; ++b) {
      const int64_t at = b * m.tokens + token + i;
      s = fma(V::load(m.sum + at), exp(V::load(m.largest + at) - largest), s);
      all = all + V::load(m.total + at);
    }
    largest.store(shift + i);
    s.store(sum + i);
    all.store(total + i);
  }
  double log_sum[kPanel];
  log_row(sum, have, log_sum);
  const double smoothing = a.label_smoothing, each = smoothing / double(a.vocab);
  for (int64_t i = 0; i < have; ++i) {
    const double lse = double(shift[i]) + log_sum[i];
    double loss = lse - (1 - smoothing) * double(m.label_logit[token + i]) + a.z_loss * lse * lse;
    if (smoothing > 0) loss -= each * double(total[i]);
    static_cast<T*>(a.loss)[a.tokens[token + i]] = T(loss);
    if (!a.keep_logits) continue;
    const double scale = double(static_cast<const T*>(a.scale)[a.tokens[token + i] * a.scale_stride]);
    m.shift[token + i] = shift[i];
    m.factor[token + i] = T(scale * (1 + 2 * a.z_loss * lse) / double(sum[i]));
    m.constant[token + i] = T(scale * each);
    m.on_label[token + i] = T(scale * (1 - smoothing));
  }
  if (!a.keep_logits) return;
  for (int64_t i = token + have; i < token + kPanel; ++i) m.shift[i] = m.factor[i] = m.constant[i] = 0;
}

// The logits of n rows of the vocabulary for a panel of tokens become their derivatives, whose sums join dbias.
template <class M>
void differentiate(const LossArgs& a, const LossMemory<M>& m, int64_t row, int64_t n, int64_t token) {
  using T = typename M::Acc;
  using V = typename M::V;
  constexpr int64_t kPanel = panel_of<M>(), kLanes = V::kLanes;
  const int64_t vecs = (least(kPanel, a.count - token) + kLanes - 1) / kLanes;
  T* logits = m.logits + token * m.vocab + row * kPanel;
  const bool capped = a.softcap > 0;
  const T inverse = capped ? T(1) / T(a.softcap) : T(0);
  for (int64_t i = 0; i < vecs * kLanes; i += kLanes) {
    const V shift = V::load(m.shift + token + i), factor = V::load(m.factor + token + i);
    const V constant = V::load(m.constant + token + i), one = V::set1(T(1)), scaled = V::set1(inverse);
    for (int64_t r = 0; r < n; ++r) {
      T* p = logits + r * kPanel + i;
      const V x = V::load(p);
      V d = M::exp(x - shift) * factor - constant;
      if (capped) d = d * (one - x * scaled * (x * scaled));
      d.store(p);
    }
  }
  for (int64_t i = 0; i < least(kPanel, a.count - token); ++i) {
    const int64_t r = a.labels[a.tokens[token + i]] - row;
    if (r < 0 || r >= n) continue;
    const T ratio = capped ? m.label_logit[token + i] * inverse : T(0);
    logits[r * kPanel + i] -= m.on_label[token + i] * (T(1) - ratio * ratio);
  }
  for (int64_t r = 0; a.dbias && r < n; ++r) {
    V sum = V::zero();
    for (int64_t i = 0; i < vecs * kLanes; i += kLanes) sum = sum + V::load(logits + r * kPanel + i);
    a.dbias[row + r] += double(reduce_add(sum));
  }
}

// The derivatives (n, vecs vectors) as rows of dweight's A at packed (n, ld) and, in place, in the form for dhidden.
template <class M>
void pack_derivatives(int64_t n, int64_t vecs, typename M::Acc* derivatives, typename M::Elem* packed, int64_t ld) {
  constexpr int64_t kPanel = panel_of<M>();
  const int64_t cols = vecs * M::V::kLanes;
  if constexpr (M::kPack == 1) {
    for (int64_t r = 0; r < n; ++r) copy_row(derivatives + r * kPanel, cols, packed + r * ld);
  } else {
    static constexpr float kZeros[kPanel] = {};
    for (int64_t r = 0; r < n; ++r) M::pack_row(derivatives + r * kPanel, cols, packed + r * ld);
    for (int64_t r = 0; r < n; r += 2) {
      float* even = derivatives + r * kPanel;
      M::pack_row_pair(even, r + 1 < n ? even + kPanel : kZeros, cols, reinterpret_cast<typename M::Elem*>(even));
    }
  }
}

// sums (depth,) join row `row` of dweight.
template <class T>
void add_to_dweight(const LossArgs& a, int64_t row, T* sums) {
  const int64_t n = a.depth, at = row * n;
  char* dweight = static_cast<char*>(a.dweight) + at * element_size(a.dweight_dtype);
  if (element_size(a.dweight_dtype) == sizeof(T)) {
    T* out = reinterpret_cast<T*>(dweight);
    if (a.first)
      copy_row(sums, n, out);
    else
      for (int64_t i = 0; i < n; ++i) out[i] += sums[i];
    return;
  }
  uint16_t* high = reinterpret_cast<uint16_t*>(dweight);
  uint8_t* low = a.dweight_low + at;
  if constexpr (sizeof(T) == 4) {
    if (!a.first)
      for (int64_t i = 0; i < n; ++i) sums[i] += from_bits(uint32_t(high[i]) << 16 | uint32_t(low[i]) << 8);
    if (a.last) return store_row(a.dweight_dtype, sums, n, high);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = to_bits(sums[i]) + 0x80u;
      high[i] = uint16_t(bits >> 16);
      low[i] = uint8_t(bits >> 8);
    }
  }
}

template <class M>
void dweight_task(const LossArgs& a, int64_t task, void* scratch) {
  using T = typename M::Acc;
  constexpr int64_t kPanel = panel_of<M>(), kLanes = M::V::kLanes;
  Arena shared(a.shared), own(scratch);
  const LossMemory<M> m(a, shared);
  const int64_t ld = round_up(m.row_elements, 16);
  auto* packed = own.take<typename M::Elem>(kMatmulRows * ld);
  T* sums = own.take<T>(kMatmulRows * m.width);
  GemmArgs<M> g{};
  g.a = packed, g.a_row = ld, g.a_depth = 1;
  g.b = m.rows, g.b_depth = kPanel, g.b_panel = kPanel * m.row_elements;
  g.c = sums, g.c_row = m.width;
  g.depth = (a.count + M::kPack - 1) / M::kPack;
  const int64_t end = least(a.vocab, (task + 1) * a.vocab_block);
  for (int64_t row = task * a.vocab_block; row < end; row += kMatmulRows) {
    const int64_t n = least(kMatmulRows, end - row);
    for (int64_t token = 0; token < a.count; token += kPanel) {
      const int64_t vecs = (least(kPanel, a.count - token) + kLanes - 1) / kLanes;
      differentiate<M>(a, m, row, n, token);
      pack_derivatives<M>(n, vecs, m.logits + token * m.vocab + row * kPanel, packed + token / M::kPack, ld);
    }
    if (!a.dweight) continue;
    gemm_in_parts<M>(g, n, m.width / kLanes, false);
    for (int64_t r = 0; r < n; ++r) add_to_dweight(a, row + r, sums + r * m.width);
  }
}

// The part of dhidden that the rows of one split of the vocabulary give, in some of its columns.
template <class M>
void dhidden_task(const LossArgs& a, int64_t task, void* scratch) {
  constexpr int64_t kPanel = panel_of<M>(), kStep = kLossDepth<M> * M::kPack;
  Arena shared(a.shared), own(scratch);
  const LossMemory<M> m(a, shared);
  const int64_t blocks = (a.depth + a.hidden_cols_per_task - 1) / a.hidden_cols_per_task;
  const int64_t split = task / blocks, col = task % blocks * a.hidden_cols_per_task;
  const int64_t cols = least(a.hidden_cols_per_task, a.depth - col);
  const int64_t begin = split * a.split_rows, end = least(a.vocab, begin + a.split_rows);
  const MatmulScratch<M> w(1, cols, least(end - begin, kStep), own);
  const Matrix weight{a.weight.data, a.weight.depth_stride, a.weight.line_stride, a.weight.dtype};
  const auto* derivatives = reinterpret_cast<const typename M::Elem*>(m.logits);
  GemmArgs<M> g{};
  g.a_row = 1, g.a_depth = kPanel * M::kPack;
  g.c_row = m.width;
  for (int64_t k = begin; k < end; k += kStep) {
    const int64_t n = least(kStep, end - k);
    pack_b<M>(weight, col, cols, k, n, w, g);
    g.depth = (n + M::kPack - 1) / M::kPack;
    for (int64_t token = 0; token < a.count; token += kPanel) {
      g.a = derivatives + token * m.vocab + k * kPanel;
      g.c = m.partial + (split * m.tokens + token) * m.width + col;
      gemm_in_parts<M>(g, least(kPanel, a.count - token), w.vecs, k > begin);
    }
  }
}

template <class M>
void dhidden_sum_task(const LossArgs& a, int64_t task, void*) {
  using T = typename M::Acc;
  constexpr int64_t kPanel = panel_of<M>();
  Arena shared(a.shared);
  const LossMemory<M> m(a, shared);
  for (int64_t token = task * kPanel; token < least(a.count, (task + 1) * kPanel); ++token) {
    T* out = static_cast<T*>(a.dhidden) + a.tokens[token] * a.depth;
    copy_row(m.partial + token * m.width, a.depth, out);
    for (int64_t split = 1; split < a.splits; ++split) {
      const T* part = m.partial + (split * m.tokens + token) * m.width;
      for (int64_t i = 0; i < a.depth; ++i) out[i] += part[i];
    }
  }
}

template <class M>
int64_t loss_scratch(const LossArgs& a) {
  using E = typename M::Elem;
  using T = typename M::Acc;
  constexpr int64_t kLanes = M::V::kLanes, kStep = kLossDepth<M> * M::kPack;
  const int64_t tokens = round_up(a.capacity, panel_of<M>());
  Arena pack(nullptr), logits(nullptr), dweight(nullptr), dhidden(nullptr);
  pack.take<E>(kLanes * round_up((a.depth + M::kPack - 1) / M::kPack, 16));
  MatmulScratch<M>(kMatmulRows, kLanes, least(a.depth, kStep), logits);
  logits.take<T>(a.keep_logits ? 0 : kMatmulRows * tokens);
  dweight.take<E>(kMatmulRows * round_up(tokens / M::kPack, 16));
  dweight.take<T>(kMatmulRows * round_up(a.depth, kLanes));
  MatmulScratch<M>(1, least(a.depth, a.hidden_cols_per_task), least(a.split_rows, kStep), dhidden);
  int64_t most = 0;
  for (const int64_t used : {pack.used(), logits.used(), dweight.used(), dhidden.used()})
    most = most < used ? used : most;
  return most;
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#include "linear_cross_entropy_split_body.h"

namespace lmk {
namespace LMK_NS {
namespace {

template <class M>
constexpr LossKernels loss_of() {
  return {sizeof(typename M::Acc), panel_of<M>(),   kMatmulRows,        kLossDepth<M> * M::kPack, 384,
          loss_shared<M>,          loss_scratch<M>, pack_task<M>,       logits_task<M>,           loss_task<M>,
          dweight_task<M>,         dhidden_task<M>, dhidden_sum_task<M>};
}

// Where there are tiles, of so many parts to an element.
template <int kParts>
constexpr LossKernels loss_of_float() {
#if LMK_TILES
  using M = MathSplit<kParts>;
  return {sizeof(float),
          kSplitSide,
          kMatmulRows,
          kDhiddenDepth<kParts>,
          kDhiddenCols,
          loss_shared<M>,
          split_scratch<kParts>,
          split_pack_task<kParts>,
          split_logits_task<kParts>,
          loss_task<M>,
          split_dweight_task<kParts>,
          split_dhidden_task<kParts>,
          dhidden_sum_task<M>};
#else
  return loss_of<MathFma<float>>();
#endif
}

// One row per DType, in its order, and kLossOfFew.
constexpr LossKernels kLoss[] = {loss_of_float<3>(), loss_of<MathForBf16>(), loss_of_float<2>(),
                                 loss_of<MathFma<double>>(), loss_of<MathFma<float>>()};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
