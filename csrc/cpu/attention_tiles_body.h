// Attention by tiles (AMX), where no feature changes single scores; dropout may drop weights. Scores are made
// transposed, (keys, queries): the lanes of a vector are queries, so that maxima and sums stay in their lanes, and
// weights are the right factor of the product with the values as soon as two keys of a query are one element.
//
// A factor is one bfloat16, or float32 and float16 as the sum of kParts of them (split.h). The parts of what is packed
// lie one behind the other, the largest first. Included by attention_body.h.

#if LMK_TILES

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kSide = 2 * kTileSide;  // queries of a group, keys of a panel, and columns of a product
constexpr int64_t kSquare = kSide * kSide;
constexpr int64_t kPanelPairs = kSide / 2 * kSide;  // elements of a part of a panel of weights
constexpr int64_t kBlockPanels = 4;                 // whose weights are multiplied with the values at once

// C (kSide, kSide) = A B or C += A B. A step is kTileSide elements of the depth; strides are in elements.
struct TileProduct {
  const uint32_t* a;
  int64_t a_row, a_part, a_step;
  const uint32_t* b;
  int64_t b_row, b_part, b_step;
  float* c;
  int64_t c_row;
  int64_t steps;
  bool add;
};

// The products of parts that a step adds up, each of which shares a factor with the one before: three of two parts
// leave out less than 2^-16 of a product, four nothing.
struct PartPair {
  int a, b;
};
template <int kProducts>
constexpr PartPair kPartPairs[] = {{0, 0}};
template <>
constexpr PartPair kPartPairs<3>[] = {{1, 0}, {0, 0}, {0, 1}};
template <>
constexpr PartPair kPartPairs<4>[] = {{1, 1}, {1, 0}, {0, 0}, {0, 1}};

template <int kProducts>
constexpr int kPartsOf = kProducts == 1 ? 1 : 2;

// Products that are computed a quarter of a step and of two parts at a time between other work: tiles wait for memory
// and for each other, and so do vectors.
template <int kProducts>
class TileWork {
 public:
  static constexpr int kQuarters = 4 * kProducts;  // of a step

  // One that goes before all that wait; the one before it must be finished.
  void put_first(const TileProduct& p) { first_ = p, first_waits_ = true, first_done_ = false; }
  void push(const TileProduct& p) {
    while (end_ - begin_ + (busy_ && !is_first_) >= kMost) step();
    waiting_[end_++ % kMost] = p;
  }
  void finish_first() {
    while (!first_done_) step();
  }
  void finish_waiting() {
    while (begin_ < end_ || (busy_ && !is_first_)) step();
  }
  void finish() {
    while (busy_ || first_waits_ || begin_ < end_) step();
  }

  template <int kNumber>
  [[gnu::always_inline]] void quarter() {
    constexpr int kPair = kNumber / 4, kQuarter = kNumber % 4, kBefore = kPair > 0 ? kPair - 1 : 0;
    constexpr PartPair kPart = kPartPairs<kProducts>[kPair], kLast = kPartPairs<kProducts>[kBefore];
    constexpr bool kLoadA = kPair == 0 || kPart.a != kLast.a, kLoadB = kPair == 0 || kPart.b != kLast.b;
    if (kNumber == 0 && !busy_) start();
    if (!busy_) return;
    const int64_t a_bytes = p_->a_row * 4, b_bytes = p_->b_row * 4;
    const uint32_t *a = p_->a, *b = p_->b;
    if constexpr (kPart.a > 0) a += kPart.a * p_->a_part;
    if constexpr (kPart.b > 0) b += kPart.b * p_->b_part;
    if constexpr (kQuarter == 0) {
      if constexpr (kLoadA) _tile_loadd(4, a, a_bytes);
      if constexpr (kLoadB) _tile_loadd(6, b, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
    } else if constexpr (kQuarter == 1) {
      if constexpr (kLoadB) _tile_loadd(7, b + kTileSide, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    } else if constexpr (kQuarter == 2) {
      if constexpr (kLoadA) _tile_loadd(5, a + kTileSide * p_->a_row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    } else {
      _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (kNumber == kQuarters - 1) {
      p_->a += p_->a_step, p_->b += p_->b_step;
      if (--p_->steps == 0) end();
    }
  }

  // Quarters kBegin .. kEnd, counted on from step to step.
  template <int kBegin, int kEnd>
  [[gnu::always_inline]] void quarters() {
    if constexpr (kBegin < kEnd) {
      quarter<kBegin % kQuarters>();
      quarters<kBegin + 1, kEnd>();
    }
  }

 private:
  static constexpr unsigned kMost = 2 * 256 / kSide;

  void step() { quarters<0, kQuarters>(); }
  void start() {
    if (first_waits_)
      p_ = &first_, first_waits_ = false, is_first_ = true;
    else if (begin_ < end_)
      p_ = &waiting_[begin_++ % kMost], is_first_ = false;
    else
      return;
    busy_ = true;
    if (p_->add) {
      const int64_t c_bytes = p_->c_row * 4;
      float* const lower = p_->c + kTileSide * p_->c_row;
      _tile_loadd(0, p_->c, c_bytes);
      _tile_loadd(1, p_->c + kTileSide, c_bytes);
      _tile_loadd(2, lower, c_bytes);
      _tile_loadd(3, lower + kTileSide, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  void end() {
    const int64_t c_bytes = p_->c_row * 4;
    float* const lower = p_->c + kTileSide * p_->c_row;
    _tile_stored(0, p_->c, c_bytes);
    _tile_stored(1, p_->c + kTileSide, c_bytes);
    _tile_stored(2, lower, c_bytes);
    _tile_stored(3, lower + kTileSide, c_bytes);
    busy_ = false;
    first_done_ |= is_first_;
  }

  TileProduct first_, waiting_[kMost];
  TileProduct* p_ = nullptr;  // the one that is computed, used up on the way
  unsigned begin_ = 0, end_ = 0;
  bool busy_ = false, is_first_ = false, first_waits_ = false, first_done_ = true;
};

// A number per query of a group.
struct Lanes {
  Vec<float> v[2];
  static Lanes load(const float* p) { return {Vec<float>::load(p), Vec<float>::load(p + kTileSide)}; }
  void store(float* p) const { v[0].store(p), v[1].store(p + kTileSide); }
};

// Queries of a group and the keys that they see.
struct TileGroup {
  int32_t lo[kSide], hi[kSide];    // of each query; where the group has fewer, those of its first one again
  uint32_t i[kSide], h[kSide];     // its position and head, likewise
  int64_t some_begin, some_end;    // what any of them sees
  int64_t every_begin, every_end;  // what all of them see
  __mmask16 sees[2];               // those that see anything

  TileGroup() = default;
  TileGroup(const Row* rows, int64_t n) : some_begin(INT64_MAX), some_end(0), every_begin(0), every_end(INT64_MAX) {
    sees[0] = sees[1] = 0;
    for (int64_t r = 0; r < kSide; ++r) {
      const Row& row = rows[r < n ? r : 0];
      lo[r] = int32_t(row.lo), hi[r] = int32_t(row.hi);
      i[r] = uint32_t(row.i), h[r] = uint32_t(row.h);
      every_begin = row.lo > every_begin ? row.lo : every_begin;
      every_end = row.hi < every_end ? row.hi : every_end;
      if (row.lo >= row.hi) continue;
      some_begin = row.lo < some_begin ? row.lo : some_begin;
      some_end = row.hi > some_end ? row.hi : some_end;
      sees[r / kTileSide] |= __mmask16(1 << r % kTileSide);
    }
  }
  bool all_see(int64_t key, int64_t n) const { return key >= every_begin && key + n <= every_end; }
  __mmask16 see(int half, __m512i key) const {
    const __mmask16 begun = _mm512_cmple_epi32_mask(_mm512_loadu_si512(lo + half * kTileSide), key);
    return _mm512_mask_cmpgt_epi32_mask(begun, _mm512_loadu_si512(hi + half * kTileSide), key);
  }
};

// The scores of a key and half of the queries in a panel.
inline int64_t score_at(int64_t key, int half) { return key * kSide + half * kTileSide; }

// Which weights of a panel and group dropout keeps, four keys at a time.
struct AllKept {
  AllKept(const AttentionArgs&, const KeyHead&, const TileGroup&, int64_t) {}
  void four_keys(int64_t) {}
  __mmask16 keeps(int64_t, int) const { return 0xffff; }
};

// A lane is the counter of its query and the four keys, whose words are then four vectors. Of the ten rounds of Philox
// the first multiplies what is the same for all queries or for all keys, and so does the second, of what the first made
// of one; both are done for a panel at once.
class SomeKept {
 public:
  SomeKept(const AttentionArgs& a, const KeyHead& head, const TileGroup& group, int64_t first)
      : seed_(a.seed), b_(uint32_t(head.b)), first_(first), threshold_(words1(dropout_threshold(a))) {
    const PhiloxKey key(seed_, 0);
    for (int half = 0; half < 2; ++half) {
      Words high;
      multiply(Words::load(group.h + half * kTileSide), kPhiloxFactor[1], high, query_[half][0]);
      const Words x = high ^ Words::load(group.i + half * kTileSide) ^ words1(key.k[0]);
      multiply(x, kPhiloxFactor[0], query_[half][1], query_[half][2]);
    }
  }
  void four_keys(int64_t key) {
    const PhiloxKey start(seed_, 0), next(seed_, 1);
    const uint64_t product = uint64_t((first_ + key) / 4) * kPhiloxFactor[0];
    const uint64_t again = uint64_t(uint32_t(product >> 32) ^ b_ ^ start.k[1]) * kPhiloxFactor[1];
    const Words x0 = words1(uint32_t(again >> 32) ^ next.k[0]), x2 = words1(uint32_t(product) ^ next.k[1]);
    for (int half = 0; half < 2; ++half) {
      words_[half][0] = query_[half][0] ^ x0;
      words_[half][1] = words1(uint32_t(again));
      words_[half][2] = query_[half][1] ^ x2;
      words_[half][3] = query_[half][2];
    }
    philox_rounds<2, 2>(seed_, words_);
  }
  // Of one of the four keys.
  __mmask16 keeps(int64_t key, int half) const {
    return _mm512_cmpge_epu32_mask(words_[half][key % 4].v, threshold_.v);
  }

 private:
  uint64_t seed_;
  uint32_t b_;
  int64_t first_;
  Words threshold_, query_[2][3], words_[2][4];
};

// Two floats as a pair of bfloat16, rounded to nearest, a tie away from zero: vcvtne2ps2bf16 takes four times as long.
// Those that are not kept become 0.
inline __m512i round_to_pairs(Vec<float> low, Vec<float> high, __mmask16 keep_low = 0xffff,
                              __mmask16 keep_high = 0xffff) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
  const __m512i a = _mm512_srli_epi32(_mm512_maskz_add_epi32(keep_low, _mm512_castps_si512(low.v), half), 16);
  const __m512i b = _mm512_maskz_add_epi32(keep_high, _mm512_castps_si512(high.v), half);
  constexpr int kAOrBAndC = 0xf8;
  return _mm512_ternarylogic_epi32(a, b, upper, kAOrBAndC);
}

// The parts of round_to_pairs, kPanelPairs apart.
template <int kParts>
void store_parts(Vec<float> low, Vec<float> high, uint32_t* p, __mmask16 keep_low = 0xffff,
                 __mmask16 keep_high = 0xffff) {
  if constexpr (kParts == 1) {
    _mm512_storeu_si512(p, round_to_pairs(low, high, keep_low, keep_high));
  } else {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
    const auto first = [&](Vec<float> x, __mmask16 keep) {
      return _mm512_and_si512(_mm512_maskz_add_epi32(keep, _mm512_castps_si512(x.v), half), upper);
    };
    const auto rest = [](Vec<float> x, __m512i first, __mmask16 keep) {
      return Vec<float>{_mm512_maskz_sub_ps(keep, x.v, _mm512_castsi512_ps(first))};
    };
    const __m512i a = first(low, keep_low), b = first(high, keep_high);
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(a, 16), b));
    store_parts<kParts - 1>(rest(low, a, keep_low), rest(high, b, keep_high), p + kPanelPairs);
  }
}

// 2^x for weights of so many parts.
template <int kParts>
Vec<float> exp2_weights(Vec<float> x) {
  if constexpr (kParts == 1)
    return exp2_bf16(x);
  else
    return exp2(x);
}

// The weights of the keys first .. first + kSide from their scores s, as pairs of keys in p: parts (kSide / 2, kSide).
// Returns their sums over the keys, to which those count too that are not kept. kRate steps of the products in `work`
// for four pairs of keys.
template <int kProducts, int kRate, bool kMasked, class Kept>
[[gnu::noinline]] Lanes weight_panel(const float* s, Vec<float> factor, const Lanes& shift, const TileGroup& group,
                                     int64_t first, uint32_t* p, Kept kept, TileWork<kProducts>& work) {
  using V = Vec<float>;
  constexpr int kParts = kPartsOf<kProducts>;
  V even[2] = {V::zero(), V::zero()}, odd[2] = {V::zero(), V::zero()};
  const auto pair = [&]<int kHalf>(int64_t key) __attribute__((always_inline)) {
    const float* x = s + score_at(key, kHalf);
    V a = exp2_weights<kParts>(fma(V::load(x), factor, shift.v[kHalf]));
    V b = exp2_weights<kParts>(fma(V::load(x + kSide), factor, shift.v[kHalf]));
    if constexpr (kMasked) {
      const __m512i j = _mm512_set1_epi32(int(first + key));
      a.v = _mm512_maskz_mov_ps(group.see(kHalf, j), a.v);
      b.v = _mm512_maskz_mov_ps(group.see(kHalf, _mm512_add_epi32(j, _mm512_set1_epi32(1))), b.v);
    }
    even[kHalf] = even[kHalf] + a;
    odd[kHalf] = odd[kHalf] + b;
    store_parts<kParts>(a, b, p + key / 2 * kSide + kHalf * kTileSide, kept.keeps(key, kHalf),
                        kept.keeps(key + 1, kHalf));
  };
  const auto two_keys = [&]<int kNumber>(int64_t key) __attribute__((always_inline)) {
    constexpr int kCount = kRate * kProducts, kFrom = kNumber * kCount;
    work.template quarters<kFrom, kFrom + (kCount + 1) / 2>();
    pair.template operator()<0>(key);
    work.template quarters<kFrom + (kCount + 1) / 2, kFrom + kCount>();
    pair.template operator()<1>(key);
  };
  for (int64_t key = 0; key < kSide; key += 8) {
    kept.four_keys(key);
    two_keys.template operator()<0>(key);
    two_keys.template operator()<1>(key + 2);
    kept.four_keys(key + 4);
    two_keys.template operator()<2>(key + 4);
    two_keys.template operator()<3>(key + 6);
  }
  return {even[0] + odd[0], even[1] + odd[1]};
}

// The largest score of each query among the keys that it sees; -inf where it sees none.
inline Lanes panel_maxima(const float* s, const TileGroup& group, int64_t first) {
  const Vec<float> least = Vec<float>::set1(-std::numeric_limits<float>::infinity());
  Lanes top{least, least};
  for (int64_t key = 0; key < kSide; ++key)
    for (int half = 0; half < 2; ++half) {
      const __mmask16 see = group.see(half, _mm512_set1_epi32(int(first + key)));
      top.v[half].v = _mm512_mask_max_ps(top.v[half].v, see, top.v[half].v, _mm512_loadu_ps(s + score_at(key, half)));
    }
  return top;
}

template <int kParts>
struct FwdTiles {
  int64_t q_depth, v_wide;         // d in pairs and d_v, in whole tiles and two of them
  int64_t widest;                  // of d and d_v, in two tiles
  int64_t keys, groups;            // keys packed at once; groups of a task
  int64_t q_group, k_row, v_pair;  // elements of a packed group of queries, a key and two values
  // queries (groups, steps, parts, kTileSide, kSide); keys (panels, steps, parts, kSide, kTileSide); values (panels,
  // parts, v_wide, kTileSide); weights
  uint32_t *q, *k, *v, *p;
  uint32_t *odd_keys, *odd_values;  // a bit for each of a panel that odd_row says is one
  uint32_t *buffer, *zeros;         // zeros: a row
  float *s, *o, *m, *l;             // two panels of scores; of each group: sums (v_wide, kSide), maxima, sums
  Row* rows;
  TileGroup* group;
  int64_t bytes;

  FwdTiles(const AttentionArgs& a, void* base) {
    constexpr int64_t kCacheBytes = 256 * 1024;  // pages of more would not all be found in the first-level TLB
    Arena arena(base);
    q_depth = round_up((a.head_dim + 1) / 2, kTileSide);
    v_wide = round_up(a.head_dim_v, kSide);
    widest = 2 * q_depth > v_wide ? 2 * q_depth : v_wide;
    q_group = kParts * q_depth * kSide, k_row = kParts * q_depth, v_pair = kParts * v_wide;
    keys = kCacheBytes / (k_row * 4 + v_pair * 2) / (kBlockPanels * kSide) * (kBlockPanels * kSide);
    const int64_t most = round_up(a.seq_k > 0 ? a.seq_k : 1, kSide);
    keys = keys < most ? keys : most;
    groups = (a.most_rows + kSide - 1) / kSide;
    q = arena.take<uint32_t>(groups * q_group);
    k = arena.take<uint32_t>(keys * k_row);
    v = arena.take<uint32_t>(keys / 2 * v_pair);
    p = arena.take<uint32_t>(2 * kBlockPanels * kParts * kPanelPairs);
    odd_keys = arena.take<uint32_t>(keys / kSide);
    odd_values = arena.take<uint32_t>(keys / kSide);
    buffer = arena.take<uint32_t>(kParts * kTileSide * widest);
    zeros = arena.take<uint32_t>(widest);
    s = arena.take<float>(2 * kSquare);
    o = arena.take<float>(groups * v_wide * kSide);
    m = arena.take<float>(groups * kSide);
    l = arena.take<float>(groups * kSide);
    rows = arena.take<Row>(a.most_rows);
    group = arena.take<TileGroup>(groups);
    bytes = arena.used();
  }
};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#include "attention_tiles_pack_body.h"

namespace lmk {
namespace LMK_NS {
namespace {

// The sum of the parts of one of two elements, which are kPanelPairs apart.
template <int kParts>
Vec<float> joined(const uint32_t* pairs, bool second) {
  Vec<float> sum = Vec<float>::zero();
  for (int p = kParts; p-- > 0;) {
    const __m512i x = _mm512_loadu_si512(pairs + p * kPanelPairs);
    sum = sum + Vec<float>{_mm512_castsi512_ps(second ? _mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000)))
                                                      : _mm512_slli_epi32(x, 16))};
  }
  return sum;
}

// The scores s (kSide,) of an odd key and a group of packed queries.
template <int kParts>
void odd_scores(const AttentionArgs& a, const void* key, const uint32_t* q, float* s) {
  for (int half = 0; half < 2; ++half) {
    Vec<float> sum = Vec<float>::zero();
    for (int64_t c = 0; c < a.head_dim; ++c) {
      const uint32_t* pairs = q + c / kSide * kParts * kPanelPairs + c % kSide / 2 * kSide + half * kTileSide;
      sum = fma(joined<kParts>(pairs, c % 2), Vec<float>::set1(load_one<float>(a.dtype, key, c)), sum);
    }
    sum.store(s + half * kTileSide);
  }
}

// Adds an odd value (head_dim_v,) times its weights, in pairs of keys, to the sums o of the queries that see it.
template <int kParts>
void add_odd_value(const AttentionArgs& a, const void* value, const TileGroup& group, int64_t key, const uint32_t* p,
                   float* o) {
  for (int half = 0; half < 2; ++half) {
    const __mmask16 see = group.see(half, _mm512_set1_epi32(int(key)));
    const Vec<float> weights = joined<kParts>(p + key % kSide / 2 * kSide + half * kTileSide, key % 2);
    for (int64_t c = 0; c < a.head_dim_v; ++c) {
      float* const to = o + c * kSide + half * kTileSide;
      const Vec<float> sum = fma(weights, Vec<float>::set1(load_one<float>(a.dtype, value, c)), Vec<float>::load(to));
      _mm512_mask_storeu_ps(to, see, sum.v);
    }
  }
}

// Half of the queries of x (wide, kSide) as rows: out (kTileSide, wide).
inline void turn_out(const float* x, int64_t half, int64_t wide, float* out) {
  const void* lines[kTileSide];
  for (int64_t c = 0; c < wide; c += kTileSide) {
    for (int64_t i = 0; i < kTileSide; ++i) lines[i] = x + (c + i) * kSide + half * kTileSide;
    transpose_tile(lines, 0, out + c, wide);
  }
}

// Packs keys and values [j0, j0 + n), with zeros up to whole panels.
template <int kParts>
void pack_panels(const AttentionArgs& a, const KeyHead& head, const FwdTiles<kParts>& w, int64_t j0, int64_t n) {
  const void* rows[kSide];
  for (int64_t j = 0; j < n; j += kSide) {
    const int64_t count = n - j < kSide ? n - j : kSide;
    key_rows(a, a.k, head, j0 + j, count, rows);
    for (int64_t r = count; r < kSide; ++r) rows[r] = w.zeros;
    uint32_t &odd_keys = w.odd_keys[j / kSide], &odd_values = w.odd_values[j / kSide];
    odd_keys = odd_values = 0;
    if (!pack_panel<kParts>(a, rows, a.head_dim, w.k + j * w.k_row)) odd_keys = odd_rows(a.dtype, rows, a.head_dim);
    key_rows(a, a.v, head, j0 + j, count, rows);
    uint32_t* const values = w.v + j / 2 * w.v_pair;
    if (!pack_turned<kParts>(a, rows, a.head_dim_v, w.v_wide, w.buffer, values)) {
      odd_values = odd_rows(a.dtype, rows, a.head_dim_v);
      for (int r = 0; r < kSide; ++r)
        if (odd_values >> r & 1) rows[r] = w.zeros;
      pack_turned<kParts>(a, rows, a.head_dim_v, w.v_wide, w.buffer, values);
    }
  }
}

// A group of queries against the packed keys [j0, j0 + n).
template <int kProducts, int kRate, class Kept>
void fwd_panels(const AttentionArgs& a, const KeyHead& head, const FwdTiles<kPartsOf<kProducts>>& w, int64_t number,
                int64_t j0, int64_t n) {
  constexpr int kParts = kPartsOf<kProducts>;
  using V = Vec<float>;
  const TileGroup& group = w.group[number];
  const int64_t begin = (group.some_begin > j0 ? group.some_begin : j0) / kSide * kSide;
  const int64_t end = group.some_end < j0 + n ? group.some_end : j0 + n;
  if (begin >= end) return;
  const V factor = V::set1(float(a.scale * kLog2e));
  const V lowest = V::set1(std::numeric_limits<float>::lowest());
  // weights may exceed 1, and are made anew from a higher maximum only where their sum is beyond this
  const V most = V::set1(256);
  float *o = w.o + number * w.v_wide * kSide, *m = w.m + number * kSide, *l = w.l + number * kSide;
  Lanes top = Lanes::load(m), sum = Lanes::load(l), shift;
  const auto set_shift = [&] {
    for (int half = 0; half < 2; ++half)  // -inf of a query that has seen nothing must not meet -inf
      shift.v[half] = select_less(top.v[half], lowest, V::zero(), V::zero() - top.v[half] * factor);
  };
  set_shift();

  constexpr int64_t kPanel = kParts * kPanelPairs;
  TileWork<kProducts> work;
  const uint32_t* const q = w.q + number * w.q_group;
  const auto scores = [&](int64_t j) { return w.s + j / kSide % 2 * kSquare; };
  const auto weights = [&](int64_t j) { return w.p + j / kSide % (2 * kBlockPanels) * kPanel; };
  const auto make_scores = [&](int64_t j) {
    work.put_first({w.k + (j - j0) * w.k_row, kTileSide, kPanelPairs, kPanel, q, kSide, kPanelPairs, kPanel, scores(j),
                    kSide, w.q_depth / kTileSide, false});
  };
  int64_t multiplied = begin;  // the weights of the keys before have been pushed
  const auto multiply = [&](int64_t j) {
    if (j == multiplied) return;
    work.finish_waiting();  // the weights before these
    for (int64_t c = 0; c < w.v_wide; c += kSide)
      work.push({w.v + (multiplied - j0) / 2 * w.v_pair + c * kTileSide, kTileSide, w.v_wide * kTileSide,
                 w.v_pair * kTileSide, weights(multiplied), kSide, kPanelPairs, kPanel, o + c * kSide, kSide,
                 (j - multiplied) / kSide, true});
    multiplied = j;
  };

  make_scores(begin);
  for (int64_t j = begin; j < end; j += kSide) {
    work.finish_first();
    float* const s = scores(j);
    for (uint32_t odd = kParts > 1 ? w.odd_keys[(j - j0) / kSide] : 0; odd; odd &= odd - 1) {
      const int64_t key = __builtin_ctz(odd);
      odd_scores<kParts>(a, key_row(a, a.k, head, j + key), q, s + score_at(key, 0));
    }
    if (j + kSide < end) make_scores(j + kSide);
    __mmask16 fresh[2];
    for (int half = 0; half < 2; ++half)
      fresh[half] = _mm512_mask_cmp_ps_mask(group.sees[half], top.v[half].v, lowest.v, _CMP_LT_OQ);
    if (fresh[0] | fresh[1]) {
      const Lanes here = panel_maxima(s, group, j);
      for (int half = 0; half < 2; ++half)
        top.v[half].v = _mm512_mask_mov_ps(top.v[half].v, fresh[half], here.v[half].v);
      set_shift();
    }
    const auto make_weights = [&] {
      const Kept kept(a, head, group, j);
      return group.all_see(j, kSide)
                 ? weight_panel<kProducts, kRate, false>(s, factor, shift, group, j, weights(j), kept, work)
                 : weight_panel<kProducts, 0, true>(s, factor, shift, group, j, weights(j), kept, work);
    };
    Lanes here = make_weights();
    __mmask16 beyond[2];
    for (int half = 0; half < 2; ++half) beyond[half] = _mm512_cmp_ps_mask(here.v[half].v, most.v, _CMP_NLE_UQ);
    if (__builtin_expect(beyond[0] | beyond[1], 0)) {
      multiply(j);
      work.finish();
      const Lanes high = panel_maxima(s, group, j);
      V correction[2];
      for (int half = 0; half < 2; ++half) {
        const V before = top.v[half];
        top.v[half].v = _mm512_mask_max_ps(before.v, beyond[half], before.v, high.v[half].v);
        correction[half].v = _mm512_mask_mov_ps(_mm512_set1_ps(1), beyond[half],
                                                exp2_weights<kParts>((before - top.v[half]) * factor).v);
        sum.v[half] = sum.v[half] * correction[half];
      }
      set_shift();
      for (int64_t i = 0; i < w.v_wide * kSide; i += kTileSide)
        (V::load(o + i) * correction[i / kTileSide % 2]).store(o + i);
      here = make_weights();
    }
    for (int half = 0; half < 2; ++half) sum.v[half] = sum.v[half] + here.v[half];
    if ((j / kSide + 1) % kBlockPanels == 0) multiply(j + kSide);
    if (kParts > 1 && __builtin_expect(w.odd_values[(j - j0) / kSide] != 0, 0)) {
      multiply(j + kSide);
      work.finish();
      for (uint32_t odd = w.odd_values[(j - j0) / kSide]; odd; odd &= odd - 1) {
        const int64_t key = j + __builtin_ctz(odd);
        add_odd_value<kParts>(a, key_row(a, a.v, head, key), group, key, weights(j), o);
      }
    }
  }
  multiply(round_up(end, kSide));
  work.finish();
  top.store(m);
  sum.store(l);
}

// Closes the softmax of a group and writes its n rows.
template <int kParts>
void finish_group(const AttentionArgs& a, const KeyHead& head, const FwdTiles<kParts>& w, int64_t number, int64_t n) {
  using V = Vec<float>;
  const Row* rows = w.rows + number * kSide;
  const float* o = w.o + number * w.v_wide * kSide;
  float m[kSide], inverse[kSide], out[kTileSide * 256];
  for (int64_t r = 0; r < kSide; r += kTileSide)  // the very shift that was in the exponents
    (V::load(w.m + number * kSide + r) * V::set1(float(a.scale * kLog2e)) * V::set1(0.693147181f)).store(m + r);
  finish_rows(a, head, rows, n, m, w.l + number * kSide, inverse);
  for (int64_t r = 0; r < n; ++r) inverse[r] *= float(1 / (1 - a.dropout_p));
  for (int half = 0; half * kTileSide < n; ++half) {
    turn_out(o, half, w.v_wide, out);
    for (int64_t r = half * kTileSide; r < n && r < (half + 1) * kTileSide; ++r)
      store_out(a, head, rows[r], out + r % kTileSide * w.v_wide, a.head_dim_v, inverse[r]);
  }
}

// 1 / (1 - dropout_p), which multiplies sums here, must be finite.
inline bool goes_by_tiles(const AttentionArgs& a) { return !has_features(a) && a.dropout_p < 1; }

template <int kParts>
using FwdPanels = void (*)(const AttentionArgs&, const KeyHead&, const FwdTiles<kParts>&, int64_t, int64_t, int64_t);

// Steps of the products for a panel: as many as its weights take.
template <int kProducts, class Kept>
FwdPanels<kPartsOf<kProducts>> fwd_panels_of(const FwdTiles<kPartsOf<kProducts>>& w) {
  const int64_t steps = w.q_depth / kTileSide + w.v_wide / kSide;
  return steps <= 4   ? fwd_panels<kProducts, 1, Kept>
         : steps <= 8 ? fwd_panels<kProducts, 2, Kept>
                      : fwd_panels<kProducts, 4, Kept>;
}

template <int kProducts>
void fwd_by_tiles(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  const KeyHead head = key_head(a, task.sequence, task.head_kv);
  const int64_t first_row = task.part * head.share;
  const int64_t n = head.rows - first_row < head.share ? head.rows - first_row : head.share;
  constexpr int kParts = kPartsOf<kProducts>;
  const FwdTiles<kParts> w(a, scratch);
  Ahead ahead(a, next);

  memset(w.zeros, 0, size_t(w.widest) * sizeof(*w.zeros));
  rows_of(a, head, first_row, n, w.rows);
  const int64_t groups = (n + kSide - 1) / kSide;
  const auto rows_in = [&](int64_t g) { return n - g * kSide < kSide ? n - g * kSide : kSide; };
  int64_t lo = INT64_MAX, hi = 0;  // keys that any of the rows sees
  for (int64_t g = 0; g < groups; ++g) {
    const Row* rows = w.rows + g * kSide;
    const void* queries[kSide];
    for (int64_t r = 0; r < kSide; ++r) queries[r] = r < rows_in(g) ? query_row(a, a.q, head, rows[r]) : w.zeros;
    pack_query_columns<kParts>(a, queries, a.head_dim, w.q + g * w.q_group, w.buffer);
    w.group[g] = TileGroup(rows, rows_in(g));
    lo = w.group[g].some_begin < lo ? w.group[g].some_begin : lo;
    hi = w.group[g].some_end > hi ? w.group[g].some_end : hi;
  }
  memset(w.o, 0, size_t(groups * w.v_wide * kSide) * sizeof(float));
  for (int64_t r = 0; r < groups * kSide; ++r) w.m[r] = -std::numeric_limits<float>::infinity(), w.l[r] = 0;

  const auto run = a.dropout_p > 0 ? fwd_panels_of<kProducts, SomeKept>(w) : fwd_panels_of<kProducts, AllKept>(w);
  configure_tiles(kTileSide, kTileSide);
  for (int64_t j0 = lo / w.keys * w.keys; j0 < hi; j0 += w.keys) {
    const int64_t block = hi - j0 < w.keys ? hi - j0 : w.keys;
    pack_panels(a, head, w, j0, block);
    // the next keys come into the L2 cache while these are worked on
    const int64_t following = j0 + w.keys, end = following + w.keys < hi ? following + w.keys : hi;
    const int64_t per_group = (w.keys + groups - 1) / groups;
    int64_t fetched = following;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t j = 0; j < per_group && fetched < end; ++j, ++fetched) {
        prefetch_row(key_row(a, a.k, head, fetched), a.head_dim * element_size(a.dtype));
        prefetch_row(key_row(a, a.v, head, fetched), a.head_dim_v * element_size(a.dtype));
      }
      for (int64_t r = 0; r < rows_in(g); ++r) {
        ahead.step(a);
        if (following >= hi)  // where this row will be written
          prefetch_row(out_row(a, head, w.rows[g * kSide + r]), a.head_dim_v * element_size(a.dtype));
      }
      run(a, head, w, g, j0, block);
    }
  }
  _tile_release();
  for (int64_t g = 0; g < groups; ++g) finish_group(a, head, w, g, rows_in(g));
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#endif  // LMK_TILES
