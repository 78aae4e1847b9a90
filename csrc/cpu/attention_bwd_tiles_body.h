// The backward by tiles (AMX), where no feature changes single scores: the steps of attention_bwd_body.h on panels of
// kSide keys by kSide queries. P and dS are rows of keys for dV = P^T dO and dK = dS^T Q, and dS is pairs of keys for
// dQ^T = K^T dS^T. Included by attention_body.h.

#if LMK_TILES

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kBwdGroups = 4;  // groups of queries whose products with a panel of keys are added at once

// Of rounded factors: nothing is gained by the product of their small parts.
template <int kParts>
using BwdWork = TileWork<kParts == 1 ? 1 : 3>;

template <int kParts>
struct BwdTiles {
  int64_t q_depth, v_depth, q_wide, v_wide;  // d and d_v in pairs, to whole tiles, and in elements, to two of them
  int64_t block, groups, panels;             // keys packed at once; groups of a key head; panels of a block
  // in parts, by what a step reads
  uint32_t *k, *v, *kt;            // keys (block, q_depth), values (block, v_depth); keys (panels, q_wide, 16)
  uint32_t *q, *dout;              // (kBwdGroups, q_depth, kSide), of d_v likewise
  uint32_t *q_pairs, *dout_pairs;  // (kBwdGroups, kTileSide, q_wide): query i and i + kTileSide
  uint32_t *p, *ds;                // (kBwdGroups, kSide keys, kTileSide): the same pairs
  uint32_t* ds_pairs;              // (panels, kBwdGroups, kTileSide, kSide): pairs of keys
  uint32_t *buffer, *zeros;        // zeros: a row
  float *s, *dp;                   // (kSide keys, kSide)
  float *dk, *dv, *dq;             // (block, q_wide), (block, v_wide), (groups, q_wide, kSide)
  // (groups, kSide): -lse in powers of 2, by which weights are multiplied with 1 / (1 - dropout_p); delta divided by it
  float *shift, *delta;
  TileGroup* group;
  int64_t bytes;

  BwdTiles(const AttentionArgs& a, int64_t keys_at_once, void* base) : block(keys_at_once) {
    Arena arena(base);
    q_depth = round_up((a.head_dim + 1) / 2, kTileSide), v_depth = round_up((a.head_dim_v + 1) / 2, kTileSide);
    q_wide = round_up(a.head_dim, kSide), v_wide = round_up(a.head_dim_v, kSide);
    groups = (a.most_rows + kSide - 1) / kSide, panels = block / kSide;
    k = arena.take<uint32_t>(kParts * block * q_depth);
    v = arena.take<uint32_t>(kParts * block * v_depth);
    kt = arena.take<uint32_t>(kParts * block / 2 * q_wide);
    q = arena.take<uint32_t>(kParts * kBwdGroups * q_depth * kSide);
    dout = arena.take<uint32_t>(kParts * kBwdGroups * v_depth * kSide);
    q_pairs = arena.take<uint32_t>(kParts * kBwdGroups * kTileSide * q_wide);
    dout_pairs = arena.take<uint32_t>(kParts * kBwdGroups * kTileSide * v_wide);
    p = arena.take<uint32_t>(kParts * kBwdGroups * kPanelPairs);
    ds = arena.take<uint32_t>(kParts * kBwdGroups * kPanelPairs);
    ds_pairs = arena.take<uint32_t>(kParts * panels * kBwdGroups * kPanelPairs);
    const int64_t widest = q_wide > v_wide ? q_wide : v_wide;
    buffer = arena.take<uint32_t>(kParts * kTileSide * widest);
    zeros = arena.take<uint32_t>(widest);
    s = arena.take<float>(kSquare);
    dp = arena.take<float>(kSquare);
    dk = arena.take<float>(block * q_wide);
    dv = arena.take<float>(block * v_wide);
    dq = arena.take<float>(groups * q_wide * kSide);
    shift = arena.take<float>(groups * kSide);
    delta = arena.take<float>(groups * kSide);
    group = arena.take<TileGroup>(groups);
    bytes = arena.used();
  }
};

// The decisions of dropout on a panel and group, made beforehand.
struct PanelKept {
  __mmask16 keep[kSide][2];
  __mmask16 keeps(int64_t key, int half) const { return keep[key][half]; }
};

// Makes them while the tiles multiply: steps of `work` in between.
template <int kProducts>
[[gnu::noinline]] PanelKept keep_panel(SomeKept kept, TileWork<kProducts>& work) {
  PanelKept panel;
  const auto four_keys = [&](int64_t first) __attribute__((always_inline)) {
    kept.four_keys(first);
    for (int64_t key = first; key < first + 4; ++key)
      for (int half = 0; half < 2; ++half) panel.keep[key][half] = kept.keeps(key, half);
  };
  constexpr int kQuarters = TileWork<kProducts>::kQuarters;
  for (int64_t key = 0; key < kSide; key += 8) {
    work.template quarters<0, kQuarters / 4>();
    four_keys(key);
    work.template quarters<kQuarters / 4, kQuarters / 4 * 3>();
    four_keys(key + 4);
    work.template quarters<kQuarters / 4 * 3, kQuarters>();
  }
  return panel;
}
template <int kProducts>
AllKept keep_panel(AllKept kept, TileWork<kProducts>&) {
  return kept;
}

// P and dS of a panel of keys, whose first is `first`, and a group of queries, from S and dP.
template <int kParts, bool kMasked, class Kept>
[[gnu::noinline]] void grad_panel(const BwdTiles<kParts>& w, Vec<float> factor, int64_t number, int64_t first,
                                  const Kept& kept, uint32_t* p, uint32_t* ds, uint32_t* ds_pairs) {
  using V = Vec<float>;
  const Lanes shift = Lanes::load(w.shift + number * kSide), delta = Lanes::load(w.delta + number * kSide);
  const __m512i low_half = _mm512_set1_epi32(0xffff);
  constexpr int kAAndCOrB = 0xec;
  for (int64_t key = 0; key < kSide; key += 2) {
    uint32_t* const rows = ds + key * kTileSide;
    for (int64_t i = 0; i < 2; ++i) {
      V weight[2], gradient[2];
      __mmask16 keep[2];
      for (int half = 0; half < 2; ++half) {
        const int64_t at = score_at(key + i, half);
        weight[half] = exp2_weights<kParts>(fma(V::load(w.s + at), factor, shift.v[half]));
        if constexpr (kMasked)
          weight[half].v =
              _mm512_maskz_mov_ps(w.group[number].see(half, _mm512_set1_epi32(int(first + key + i))), weight[half].v);
        keep[half] = kept.keeps(key + i, half);
        const V dp{_mm512_maskz_loadu_ps(keep[half], w.dp + at)};
        gradient[half] = weight[half] * (dp - delta.v[half]);
      }
      store_parts<kParts>(weight[0], weight[1], p + (key + i) * kTileSide, keep[0], keep[1]);
      store_parts<kParts>(gradient[0], gradient[1], rows + i * kTileSide);
    }
    for (int part = 0; part < kParts; ++part) {
      const __m512i a = _mm512_loadu_si512(rows + part * kPanelPairs),
                    b = _mm512_loadu_si512(rows + part * kPanelPairs + kTileSide);
      uint32_t* const pairs = ds_pairs + part * kPanelPairs + key / 2 * kSide;
      _mm512_storeu_si512(pairs, _mm512_ternarylogic_epi32(a, _mm512_slli_epi32(b, 16), low_half, kAAndCOrB));
      _mm512_storeu_si512(pairs + kTileSide, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
    }
  }
}

// Packs keys and values [j0, j0 + n), with zeros up to whole panels.
template <int kParts>
void pack_grad_keys(const AttentionArgs& a, const KeyHead& head, const BwdTiles<kParts>& w, int64_t j0, int64_t n) {
  const void* rows[kSide];
  for (int64_t j = 0; j < n; j += kSide) {
    const int64_t count = n - j < kSide ? n - j : kSide;
    key_rows(a, a.v, head, j0 + j, count, rows);
    for (int64_t r = count; r < kSide; ++r) rows[r] = w.zeros;
    pack_panel<kParts>(a, rows, a.head_dim_v, w.v + kParts * j * w.v_depth);
    key_rows(a, a.k, head, j0 + j, count, rows);
    pack_panel<kParts>(a, rows, a.head_dim, w.k + kParts * j * w.q_depth);
    pack_turned<kParts>(a, rows, a.head_dim, w.q_wide, w.buffer, w.kt + kParts * j / 2 * w.q_wide);
  }
}

// Packs x (q or dout) of a group of n queries as the right factor of the products with keys and of those with P and dS.
template <int kParts>
void pack_grad_rows(const AttentionArgs& a, const KeyHead& head, const BwdTiles<kParts>& w, const Heads& x,
                    const Row* rows, int64_t n, int64_t dim, uint32_t* columns, uint32_t* pairs) {
  const void *lines[kSide], *paired[kSide];
  for (int64_t r = 0; r < kSide; ++r) lines[r] = r < n ? query_row(a, x, head, rows[r]) : w.zeros;
  pack_query_columns<kParts>(a, lines, dim, columns, w.buffer);
  for (int64_t r = 0; r < kSide; ++r) paired[r] = lines[r / 2 + r % 2 * kTileSide];
  pack_pairs<kParts>(a, paired, dim, round_up(dim, kSide), pairs);
}

// The gradients of the groups from `number` on, at most kBwdGroups, against the packed keys [j0, j0 + n): w.dq, w.dk
// and w.dv are added to.
template <int kParts, class Kept>
void bwd_groups(const AttentionArgs& a, const KeyHead& head, const BwdTiles<kParts>& w, int64_t number, int64_t j0,
                int64_t n) {
  constexpr int64_t kPanel = kParts * kPanelPairs;
  const int64_t first_row = number * kSide, rows_left = head.rows - first_row;
  const int64_t groups = rows_left < kBwdGroups * kSide ? (rows_left + kSide - 1) / kSide : kBwdGroups;
  const TileGroup* group = w.group + number;
  const auto sees = [&](int64_t g, int64_t key) {
    return group[g].some_begin < key + kSide && group[g].some_end > key;
  };
  int64_t begin[kBwdGroups], end[kBwdGroups];  // panels that a group sees
  for (int64_t g = 0; g < groups; ++g) begin[g] = end[g] = 0;
  bool any = false;
  for (int64_t panel = 0; panel * kSide < n; ++panel)
    for (int64_t g = 0; g < groups; ++g)
      if (sees(g, j0 + panel * kSide)) {
        if (end[g] == 0) begin[g] = panel;
        end[g] = panel + 1;
        any = true;
      }
  if (!any) return;
  Row rows[kSide];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t count = rows_left - g * kSide < kSide ? rows_left - g * kSide : kSide;
    rows_of(a, head, first_row + g * kSide, count, rows);
    const int64_t at = kParts * g;
    pack_grad_rows(a, head, w, a.q, rows, count, a.head_dim, w.q + at * w.q_depth * kSide,
                   w.q_pairs + at * kTileSide * w.q_wide);
    pack_grad_rows(a, head, w, a.dout, rows, count, a.head_dim_v, w.dout + at * w.v_depth * kSide,
                   w.dout_pairs + at * kTileSide * w.v_wide);
  }
  const Vec<float> factor = Vec<float>::set1(float(a.scale * kLog2e));
  BwdWork<kParts> work;
  for (int64_t panel = 0; panel * kSide < n; ++panel) {
    const int64_t key = j0 + panel * kSide;
    int64_t first = groups, last = 0;
    for (int64_t g = 0; g < groups; ++g)
      if (sees(g, key)) first = g < first ? g : first, last = g + 1;
    for (int64_t g = first; g < last; ++g) {
      uint32_t *p = w.p + g * kPanel, *ds = w.ds + g * kPanel;
      uint32_t* ds_pairs = w.ds_pairs + (panel * kBwdGroups + g) * kPanel;
      if (!sees(g, key)) {
        memset(p, 0, kPanel * sizeof(*p));
        memset(ds, 0, kPanel * sizeof(*ds));
        continue;
      }
      const auto multiply = [&](const uint32_t* keys, const uint32_t* queries, int64_t depth, float* c) {
        work.push({keys + panel * kSide * kParts * depth, kTileSide, kPanelPairs, kPanel,
                   queries + g * kSide * kParts * depth, kSide, kPanelPairs, kPanel, c, kSide, depth / kTileSide,
                   false});
      };
      multiply(w.k, w.q, w.q_depth, w.s);
      multiply(w.v, w.dout, w.v_depth, w.dp);
      const auto kept = keep_panel(Kept(a, head, group[g], key), work);
      work.finish();
      if (group[g].all_see(key, kSide))
        grad_panel<kParts, false>(w, factor, number + g, key, kept, p, ds, ds_pairs);
      else
        grad_panel<kParts, true>(w, factor, number + g, key, kept, p, ds, ds_pairs);
    }
    const auto add = [&](const uint32_t* left, const uint32_t* right, int64_t wide, float* sum) {
      for (int64_t c = 0; c < wide; c += kSide)
        work.push({left + first * kPanel, kTileSide, kPanelPairs, kPanel, right + first * kParts * kTileSide * wide + c,
                   wide, kTileSide * wide, kParts * kTileSide * wide, sum + panel * kSide * wide + c, wide,
                   last - first, true});
    };
    if (first < last) {
      add(w.p, w.dout_pairs, w.v_wide, w.dv);
      add(w.ds, w.q_pairs, w.q_wide, w.dk);
      work.finish();
    }
  }
  for (int64_t g = 0; g < groups; ++g)
    if (begin[g] < end[g]) {
      for (int64_t c = 0; c < w.q_wide; c += kSide)
        work.push({w.kt + (begin[g] * kParts * w.q_wide + c) * kTileSide, kTileSide, w.q_wide * kTileSide,
                   kParts * w.q_wide * kTileSide, w.ds_pairs + (begin[g] * kBwdGroups + g) * kPanel, kSide, kPanelPairs,
                   kBwdGroups * kPanel, w.dq + ((number + g) * w.q_wide + c) * kSide, kSide, end[g] - begin[g], true});
      work.finish();
    }
}

// Keys of a block: more share the cost of packing queries where no other task waits for some.
inline int64_t bwd_tiles_block(const KeyHead& head) {
  const int64_t most = head.parts == 1 ? 2 * kBwdKeys : kBwdKeys, all = round_up(head.seq_k, kSide);
  return most < all ? most : all;
}

template <int kParts>
int64_t bwd_tiles_scratch(const AttentionArgs& a) {
  return BwdTiles<kParts>(a, 2 * kBwdKeys, nullptr).bytes;
}

// Whether a key head's gradients are made in parts: all that they are made of splits.
inline bool grads_in_parts(const AttentionArgs& a, const AttentionTask& task) {
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const auto keys_fit = [&](const Heads& x, int64_t dim) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t j = 0; j < head.keys; ++j) join_bits(a.dtype, key_row(a, x, head, j), dim, largest);
    return splits(largest);
  };
  const auto queries_fit = [&](const Heads& x, int64_t dim) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t r = 0; r < head.rows; ++r) {
      const Row row{head.hk * head.group + r / head.seq_q, r % head.seq_q, 0, 0};
      join_bits(a.dtype, query_row(a, x, head, row), dim, largest);
    }
    return splits(largest);
  };
  return queries_fit(a.q, a.head_dim) && queries_fit(a.dout, a.head_dim_v) && keys_fit(a.k, a.head_dim) &&
         keys_fit(a.v, a.head_dim_v);
}

template <int kParts>
void bwd_by_tiles(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const int64_t step = bwd_tiles_block(head);
  const BwdTiles<kParts> w(a, 2 * kBwdKeys, scratch);
  Ahead ahead(a, next);
  memset(w.zeros, 0, size_t(w.q_wide > w.v_wide ? w.q_wide : w.v_wide) * 4);
  const int64_t groups = (head.rows + kSide - 1) / kSide;
  memset(w.dq, 0, size_t(groups * w.q_wide * kSide) * sizeof(float));
  double* dsink =
      a.dsink_partial && task.part == 0 ? a.dsink_partial + head.b * a.heads + head.hk * head.group : nullptr;
  for (int64_t g = 0; dsink && g < head.group; ++g) dsink[g] = 0;
  for (int64_t g = 0; g < groups; ++g) {
    Row rows[kSide];
    const int64_t count = head.rows - g * kSide < kSide ? head.rows - g * kSide : kSide;
    rows_of(a, head, g * kSide, count, rows);
    w.group[g] = TileGroup(rows, count);
    for (int64_t r = 0; r < kSide; ++r) {
      float lse = std::numeric_limits<float>::infinity(), delta = 0;
      if (r < count) lse = lse_of<float>(a, head, rows[r]), delta = delta_of<float>(a, head, rows[r]);
      w.shift[g * kSide + r] = -lse * float(kLog2e) - float(std::log2(1 - a.dropout_p));
      w.delta[g * kSide + r] = delta * float(1 - a.dropout_p);
      if (dsink && r < count) {
        const float sink = reinterpret_cast<const float*>(a.sink)[rows[r].h];
        dsink[(g * kSide + r) / head.seq_q] -= exp_one(sink - lse) * delta;
      }
    }
  }

  const auto run = a.dropout_p > 0 ? bwd_groups<kParts, SomeKept> : bwd_groups<kParts, AllKept>;
  configure_tiles(kTileSide, kTileSide);
  for (int64_t j0 = task.part * step; j0 < head.seq_k; j0 += head.parts * step) {
    const int64_t stored = head.seq_k - j0 < step ? head.seq_k - j0 : step;
    const int64_t block = head.keys - j0 < stored ? head.keys - j0 : stored;
    memset(w.dk, 0, size_t(round_up(stored, kSide) * w.q_wide) * sizeof(float));
    memset(w.dv, 0, size_t(round_up(stored, kSide) * w.v_wide) * sizeof(float));
    if (block > 0) {
      pack_grad_keys(a, head, w, j0, block);
      for (int64_t g = 0; g < groups; g += kBwdGroups) {
        for (int64_t r = 0; r < kBwdGroups * kSide; ++r) ahead.step(a);
        run(a, head, w, g, j0, block);
      }
    }
    store_keys(a, head, j0, stored, w.dk, w.q_wide, w.dv, w.v_wide);
  }
  _tile_release();

  const int64_t wide = round_up(a.head_dim, Vec<float>::kLanes);
  float turned[kTileSide * 256];
  const auto sum_of = [&](int64_t r) {
    const int64_t in_tile = r % kTileSide, r0 = r - in_tile;
    if (in_tile == 0) turn_out(w.dq + r0 / kSide * w.q_wide * kSide, r0 % kSide / kTileSide, w.q_wide, turned);
    return turned + in_tile * w.q_wide;
  };
  if (head.parts == 1)
    store_queries(a, head, sum_of);
  else
    for (int64_t r = 0; r < head.rows; ++r)
      memcpy(dq_part<float>(a, head, task.part, wide) + r * wide, sum_of(r), size_t(wide) * sizeof(float));
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#endif  // LMK_TILES
