// Linear cross entropy in float32 by tiles of bfloat16 (matmul_split.h): the products of linear_cross_entropy_body.h,
// which includes this.
//
// A panel is as wide as a block of such a product, 32 tokens, and so a step of the depth of dweight's. Derivatives stay
// floats, which each of the two products packs. Where a pair of blocks does not split, multiply-adds give its product.

#if LMK_TILES

namespace lmk {
namespace LMK_NS {
namespace {

// The hidden states of a panel, (kSplitSide, depth), copied to memory, with zeros beyond the last token.
inline Matrix gather_hidden(const LossArgs& a, int64_t token, int64_t have, void* memory) {
  const int64_t bytes = a.depth * element_size(a.compute);
  char* to = static_cast<char*>(memory);
  for (int64_t i = 0; i < have; ++i) memcpy(to + i * bytes, hidden_row(a, token + i, 0), bytes);
  memset(to + have * bytes, 0, (kSplitSide - have) * bytes);
  return {memory, a.depth, 1, a.compute};
}

inline Matrix transposed(const Matrix& x) { return {x.data, x.depth_stride, x.line_stride, x.dtype}; }

// x without its first lines and the first of its depth
inline Matrix part_of(const Matrix& x, int64_t line, int64_t p) {
  return {at(x, line, p), x.line_stride, x.depth_stride, x.dtype};
}

// Derivatives of rows of the vocabulary (lines) by the tokens of a panel.
template <class M>
Matrix derivatives_of(const LossMemory<M>& m, int64_t row, int64_t token) {
  return {m.logits + token * m.vocab + row * kSplitSide, kSplitSide, 1, DType::f32};
}

// C (rows, cols) = A B, or C += A B, by multiply-adds.
inline void multiply_plain(const Matrix& a, const Matrix& b, int64_t rows, int64_t cols, int64_t depth,
                           const MatmulScratch<MathFma<float>>& w, float* c, int64_t c_ld, bool add) {
  matmul<MathFma<float>>(a, b, {0, rows, 0, cols}, {}, depth, w,
                         [&](int64_t row, int64_t n, const float* sums, int64_t ld) {
                           for (int64_t r = 0; r < n; ++r)
                             for (int64_t i = 0; i < cols; ++i) {
                               float& to = c[(row + r) * c_ld + i];
                               to = add ? to + sums[r * ld + i] : sums[r * ld + i];
                             }
                         });
}

// Of the vocabulary, that dhidden's product takes at once: what is packed of it leaves room in the L2 cache.
template <int kParts>
constexpr int64_t kDhiddenDepth = kSplitDepth / kParts;
constexpr int64_t kDhiddenCols = 768;

// Memory of a task of each kind.
template <int kParts>
struct SplitPackScratch {
  uint32_t* turned;
  void* hidden;
  SplitPackScratch(const LossArgs& a, Arena& arena) {
    turned = arena.take<uint32_t>(kParts * kTileSide * kTileSide);
    hidden = arena.take<float>(kSplitSide * a.depth);
  }
};

template <int kParts>
struct SplitLogitsScratch {
  static constexpr int64_t kRows = kLossRows<MathSplit<kParts>>;
  uint32_t *turned, *packed;
  float *sum, *passing;
  void* hidden;
  MatmulScratch<MathFma<float>> plain;
  SplitLogitsScratch(const LossArgs& a, Arena& arena) {
    const int64_t depth = least(a.depth, kSplitDepth);
    turned = arena.take<uint32_t>(kParts * kTileSide * kRows);
    packed = arena.take<uint32_t>(kRows * packed_elements<MathSplit<kParts>>(depth));
    sum = arena.take<float>(kSplitSide * kSplitSide);
    passing = arena.take<float>(a.keep_logits ? 0 : kRows * round_up(a.capacity, kSplitSide));
    hidden = arena.take<float>(kSplitSide * a.depth);
    plain = MatmulScratch<MathFma<float>>(kRows, kSplitSide, depth, arena);
  }
};

template <int kParts>
struct SplitDweightScratch {
  static constexpr int64_t kRows = kLossRows<MathSplit<kParts>>;
  uint32_t *turned, *packed;
  float *sum, *sums;
  void* hidden;
  MatmulScratch<MathFma<float>> plain;
  SplitDweightScratch(const LossArgs& a, const LossMemory<MathSplit<kParts>>& m, Arena& arena) {
    turned = arena.take<uint32_t>(kParts * kTileSide * kTileSide);
    packed = arena.take<uint32_t>(kRows * m.row_elements);
    sum = arena.take<float>(kSplitSide * kSplitSide);
    sums = arena.take<float>(kRows * m.width);
    hidden = arena.take<float>(kSplitSide * a.depth);
    plain = MatmulScratch<MathFma<float>>(kSplitSide, a.depth, kSplitSide, arena);
  }
};

template <int kParts>
struct SplitDhiddenScratch {
  MatmulScratch<MathSplit<kParts>> w;
  MatmulScratch<MathFma<float>> plain;
  SplitDhiddenScratch(int64_t cols, Arena& arena)
      : w(kSplitSide, cols, kDhiddenDepth<kParts>, arena), plain(kSplitSide, cols, kDhiddenDepth<kParts>, arena) {}
};

template <int kParts>
int64_t split_scratch(const LossArgs& a) {
  Arena shared(nullptr), pack(nullptr), logits(nullptr), dweight(nullptr), dhidden(nullptr);
  const LossMemory<MathSplit<kParts>> m(a, shared);
  SplitPackScratch<kParts>(a, pack);
  SplitLogitsScratch<kParts>(a, logits);
  if (a.keep_logits) SplitDweightScratch<kParts>(a, m, dweight);
  if (a.keep_logits) SplitDhiddenScratch<kParts>(least(a.depth, a.hidden_cols_per_task), dhidden);
  int64_t most = 0;
  for (const int64_t used : {pack.used(), logits.used(), dweight.used(), dhidden.used()})
    most = most < used ? used : most;
  return most;
}

template <int kParts>
void split_pack_task(const LossArgs& a, int64_t task, void* scratch) {
  Arena shared(a.shared), own(scratch);
  const LossMemory<MathSplit<kParts>> m(a, shared);
  const SplitPackScratch<kParts> s(a, own);
  const int64_t token = task * kSplitSide, have = least(kSplitSide, a.count - token);
  const Matrix hidden = gather_hidden(a, token, have, s.hidden), across = transposed(hidden);
  m.bits[task] =
      pack_split<kParts, false>(hidden, 0, have, 0, a.depth, s.turned, m.columns + token * m.column_elements);
  for (int64_t col = 0; a.dweight && col < a.depth; col += kSplitSide) {
    uint32_t* rows = m.rows + col * m.row_elements + task * MathSplit<kParts>::kStep;
    pack_split<kParts, false>(across, col, least(kSplitSide, a.depth - col), 0, have, s.turned, rows);
    // derivatives that are zeros in their stead must not meet an infinity
    if (!splits(m.bits[task], 0)) memset(rows, 0, MathSplit<kParts>::kStep * sizeof(uint32_t));
  }
}

template <int kParts>
void split_logits_task(const LossArgs& a, int64_t task, void* scratch) {
  using M = MathSplit<kParts>;
  Arena shared(a.shared), own(scratch);
  const LossMemory<M> m(a, shared);
  const SplitLogitsScratch<kParts> s(a, own);
  start_block(m, task);
  const int64_t end = least(a.vocab, (task + 1) * a.vocab_block);
  for (int64_t row = task * a.vocab_block; row < end; row += kLossRows<M>) {
    const int64_t n = least(kLossRows<M>, end - row);
    for (int64_t k = 0; k == 0 || k < a.depth; k += kSplitDepth) {
      const int64_t depth = least(kSplitDepth, a.depth - k), steps = split_steps(depth);
      const uint32_t bits = pack_split<kParts, true>(a.weight, row, n, k, depth, s.turned, s.packed);
      configure_tiles(kTileSide, kTileSide);
      for (int64_t token = 0; token < a.count; token += kSplitSide) {
        const int64_t have = least(kSplitSide, a.count - token);
        float* c = a.keep_logits ? m.logits + token * m.vocab + row * kSplitSide : s.passing + token * kLossRows<M>;
        if (splits(bits, m.bits[token / kSplitSide]))
          for (int64_t i = 0; i < n; i += kSplitSide)
            multiply_split<kParts>(s.packed + i / kSplitSide * steps * M::kStep,
                                   m.columns + token * m.column_elements + k / kSplitSide * M::kStep, steps,
                                   c + i * kSplitSide, kSplitSide, k > 0, s.sum, a.compute == DType::f16);
        else
          multiply_plain(part_of(a.weight, row, k), part_of(gather_hidden(a, token, have, s.hidden), 0, k), n,
                         kSplitSide, depth, s.plain, c, kSplitSide, k > 0);
        if (k + kSplitDepth >= a.depth)
          finish_logits<M>(a, m, task, row, n, token, (have + kTileSide - 1) / kTileSide, c);
      }
      _tile_release();
    }
  }
}

template <int kParts>
void split_dweight_task(const LossArgs& a, int64_t task, void* scratch) {
  using M = MathSplit<kParts>;
  Arena shared(a.shared), own(scratch);
  const LossMemory<M> m(a, shared);
  const SplitDweightScratch<kParts> s(a, m, own);
  const int64_t end = least(a.vocab, (task + 1) * a.vocab_block);
  for (int64_t row = task * a.vocab_block; row < end; row += kLossRows<M>) {
    const int64_t n = least(kLossRows<M>, end - row);
    bool begun = false;  // sums by multiply-adds
    for (int64_t token = 0; token < a.count; token += kSplitSide) {
      const int64_t have = least(kSplitSide, a.count - token);
      const Matrix derivatives = derivatives_of(m, row, token);
      differentiate<M>(a, m, row, n, token);
      for (int64_t i = 0; a.dweight && i < n; i += kSplitSide) {
        const int64_t rows = least(kSplitSide, n - i);
        uint32_t* packed = s.packed + i * m.row_elements + token / kSplitSide * M::kStep;
        const uint32_t bits = pack_split<kParts, true>(derivatives, i, rows, 0, have, s.turned, packed);
        if (splits(bits, m.bits[token / kSplitSide])) continue;
        memset(packed, 0, M::kStep * sizeof(uint32_t));
        if (!begun) memset(s.sums, 0, kLossRows<M> * m.width * sizeof(float));
        begun = true;
        multiply_plain(part_of(derivatives, i, 0), transposed(gather_hidden(a, token, have, s.hidden)), rows, a.depth,
                       have, s.plain, s.sums + i * m.width, m.width, true);
      }
    }
    if (!a.dweight) continue;
    configure_tiles(kTileSide, kTileSide);
    for (int64_t col = 0; col < m.width; col += kSplitSide)
      for (int64_t i = 0; i < n; i += kSplitSide)
        multiply_split<kParts>(s.packed + i * m.row_elements, m.rows + col * m.row_elements, split_steps(a.count),
                               s.sums + i * m.width + col, m.width, begun, s.sum);
    _tile_release();
    for (int64_t r = 0; r < n; ++r) add_to_dweight(a, row + r, s.sums + r * m.width);
  }
}

template <int kParts>
void split_dhidden_task(const LossArgs& a, int64_t task, void* scratch) {
  using M = MathSplit<kParts>;
  Arena shared(a.shared), own(scratch);
  const LossMemory<M> m(a, shared);
  const int64_t blocks = (a.depth + a.hidden_cols_per_task - 1) / a.hidden_cols_per_task;
  const int64_t split = task / blocks, col = task % blocks * a.hidden_cols_per_task;
  const int64_t cols = least(a.hidden_cols_per_task, a.depth - col);
  const int64_t begin = split * a.split_rows, end = least(a.vocab, begin + a.split_rows);
  const SplitDhiddenScratch<kParts> s(cols, own);
  const Matrix weight = transposed(a.weight);
  for (int64_t k = begin; k < end; k += kDhiddenDepth<kParts>) {
    const int64_t n = least(kDhiddenDepth<kParts>, end - k), steps = split_steps(n);
    const uint32_t bits = pack_split<kParts, false>(weight, col, cols, k, n, s.w.turned, s.w.b);
    configure_tiles(kTileSide, kTileSide);
    for (int64_t token = 0; token < a.count; token += kSplitSide) {
      const int64_t have = least(kSplitSide, a.count - token);
      const Matrix derivatives = transposed(derivatives_of(m, k, token));
      float* c = m.partial + (split * m.tokens + token) * m.width + col;
      if (splits(bits, pack_split<kParts, true>(derivatives, 0, have, 0, n, s.w.turned, s.w.a)))
        for (int64_t j = 0; j < cols; j += kSplitSide)
          multiply_split<kParts>(s.w.a, s.w.b + j / kSplitSide * steps * M::kStep, steps, c + j, m.width, k > begin,
                                 s.w.sum);
      else
        multiply_plain(derivatives, part_of(weight, col, k), have, cols, n, s.plain, c, m.width, k > begin);
    }
    _tile_release();
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#endif  // LMK_TILES
