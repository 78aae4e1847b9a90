// Large matrix products of float32 by tiles of bfloat16 (AMX).
//
// Three parts: an element is the sum of three bfloat16 of 8 bits each, exactly, and the six largest of the nine
// products of two such sums are added up. What is left out is below 2^-23 of a product. A tile adds up its 32 products
// before they join the sum, so that errors are smaller than those of fused multiply-adds.
//
// Two parts: an element is rounded to the sum of two, to 2^-17 of it, and the three largest products are added up
// ("high" in torch.set_float32_matmul_precision). A float16 is such a sum exactly; what is left out is below 2^-16 of a
// product. Included by matmul.h.

#include "split.h"

#if LMK_TILES

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kSplitSide = 2 * kTileSide;           // lines of a block, and the depth of a step
constexpr int64_t kSplitPart = kTileSide * kSplitSide;  // elements of a part of a step
constexpr int64_t kSplitDepth = 768;                    // that is packed at once

template <int kParts_>
struct MathSplit {
  using Acc = float;
  using Elem = uint32_t;  // two bfloat16, the earlier one in the low half
  using V = Vec<float>;
  static constexpr int kPack = 2, kParts = kParts_;
  static constexpr int64_t kStep = kParts * kSplitPart;  // elements of all parts, one behind the other
  static V exp(V x) { return LMK_NS::exp(x); }
};

template <class M>
constexpr bool kBySplit = false;
template <int kParts>
inline constexpr bool kBySplit<MathSplit<kParts>> = true;

inline int64_t split_steps(int64_t depth) { return depth > 0 ? (depth + kSplitSide - 1) / kSplitSide : 1; }

template <int kParts>
struct MatmulScratch<MathSplit<kParts>> {
  static constexpr int64_t kStep = MathSplit<kParts>::kStep;
  int64_t c_ld;
  uint32_t *a, *b, *turned;
  float *c, *sum;
  MatmulScratch<MathFma<float>> plain;  // in the same memory

  MatmulScratch(int64_t rows, int64_t cols, int64_t depth, Arena& arena) {
    c_ld = round_up(cols, kSplitSide);
    const int64_t steps = split_steps(depth < kSplitDepth ? depth : kSplitDepth), before = arena.used();
    plain = MatmulScratch<MathFma<float>>(rows, cols, depth, arena);
    Arena own(plain.b);
    b = own.take<uint32_t>(c_ld * steps * kStep / kSplitSide);
    a = own.take<uint32_t>(kMatmulRows * steps * kStep / kSplitSide);
    turned = own.take<uint32_t>(kParts * kTileSide * kMatmulRows);
    c = own.take<float>((depth <= kSplitDepth ? kSplitSide : round_up(rows, kSplitSide)) * c_ld);
    sum = own.take<float>(kSplitSide * kSplitSide);
    const int64_t more = own.used() - (arena.used() - before);
    if (more > 0) arena.take<char>(more);
  }
};

// Lines [line, line + count) over [k, k + n), in blocks of kSplitSide lines by steps by parts, with zeros beyond. A
// part is lines of pairs for the left factor, and pairs of lines for the right one. Returns the bits of the largest
// element.
template <int kParts, bool kLeft>
uint32_t pack_split(const Matrix& x, int64_t line, int64_t count, int64_t k, int64_t n, uint32_t* turned,
                    uint32_t* dst) {
  constexpr int64_t kRow = kLeft ? kTileSide : kSplitSide;
  const int64_t steps = split_steps(n), groups = round_up(count, kSplitSide) / kTileSide;
  // where the first of 16 lines has its part of a step
  const auto place = [&](int64_t group, int64_t step, int part) {
    return dst + (group / 2 * steps + step) * MathSplit<kParts>::kStep + part * kSplitPart +
           group % 2 * kTileSide * (kLeft ? kRow : 1);
  };
  __m512i largest = _mm512_setzero_si512();
  if (x.depth_stride == 1) {
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t first = group * kTileSide, from = step * kSplitSide;
        for (int64_t i = 0; i < kTileSide; ++i) {
          SplitParts<kParts> pairs{};
          if (first + i < count) {
            const char* data = static_cast<const char*>(at(x, line + first + i, k + from));
            __builtin_prefetch(data + 512);
            __builtin_prefetch(data + 576);
            pairs = pairs_along<kParts>(x.dtype, data, n - from, largest);
          }
          for (int p = 0; p < kParts; ++p)
            _mm512_storeu_si512(kLeft ? place(group, step, p) + i * kRow : turned + (p * kTileSide + i) * kTileSide,
                                pairs.part[p]);
        }
        for (int p = 0; !kLeft && p < kParts; ++p)
          turn_tile(turned + p * kTileSide * kTileSide, place(group, step, p), kRow);
      }
  } else {
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t i = 0; i < kTileSide; ++i) {
        const int64_t from = step * kSplitSide + 2 * i;
        const void* even = from < n ? at(x, line, k + from) : nullptr;
        const void* odd = from + 1 < n ? at(x, line, k + from + 1) : nullptr;
        for (int64_t l = 0; l < 2 && from + l < n; ++l) fetch_line(x, line, k + from + l, count);
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t first = group * kTileSide;
          const SplitParts<kParts> pairs =
              even ? pairs_across<kParts>(x.dtype, even, odd, first, count - first, largest) : SplitParts<kParts>{};
          for (int p = 0; p < kParts; ++p)
            _mm512_storeu_si512(
                kLeft ? turned + ((group * kParts + p) * kTileSide + i) * kTileSide : place(group, step, p) + i * kRow,
                pairs.part[p]);
        }
      }
      for (int64_t group = 0; kLeft && group < groups; ++group)
        for (int p = 0; p < kParts; ++p)
          turn_tile(turned + (group * kParts + p) * kTileSide * kTileSide, place(group, step, p), kRow);
    }
  }
  return _mm512_reduce_max_epu32(largest);
}

// Of the step after this one: the share of 1 / kShares that product number kShare of this one brings into the L1 cache.
template <int kParts, int kShare, int kShares>
[[gnu::always_inline]] inline void fetch_step(const uint32_t* a, const uint32_t* b) {
  constexpr int64_t kStep = MathSplit<kParts>::kStep, kLines = kStep / 16;
  constexpr int64_t kFrom = kShare * kLines / kShares, kTo = (kShare + 1) * kLines / kShares;
#pragma GCC unroll 22
  for (int64_t i = kFrom; i < kTo; ++i) {
    __builtin_prefetch(a + kStep + i * 16);
    __builtin_prefetch(b + kStep + i * 16);
  }
}

// C (kSplitSide, kSplitSide) = A B, or C += A B. sum: (kSplitSide, kSplitSide), for that. whole: all four products of
// two parts, with which those of float16 are exact.
template <int kParts>
void multiply_split(const uint32_t* a, const uint32_t* b, int64_t steps, float* c, int64_t c_ld, bool add, float* sum,
                    bool whole = false) {
  constexpr int64_t kStep = MathSplit<kParts>::kStep;
  const auto left = [](const uint32_t* x) __attribute__((always_inline)) {
    _tile_loadd(4, x, kTileSide * 4);
    _tile_loadd(5, x + kTileSide * kTileSide, kTileSide * 4);
  };
  const auto right = [](const uint32_t* x) __attribute__((always_inline)) {
    _tile_loadd(6, x, kSplitSide * 4);
    _tile_loadd(7, x + kTileSide, kSplitSide * 4);
  };
  const auto multiply = []() __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  const auto store = [](float* to, int64_t ld) __attribute__((always_inline)) {
    _tile_stored(0, to, ld * 4);
    _tile_stored(1, to + kTileSide, ld * 4);
    _tile_stored(2, to + kTileSide * ld, ld * 4);
    _tile_stored(3, to + kTileSide * ld + kTileSide, ld * 4);
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  // in an order in which each product shares a factor with the one before
  for (; steps > 0; --steps, a += kStep, b += kStep) {
    if constexpr (kParts == 2) {
      fetch_step<2, 0, 3>(a, b);
      left(a + kSplitPart);
      right(b);
      multiply();
      fetch_step<2, 1, 3>(a, b);
      left(a);
      multiply();
      fetch_step<2, 2, 3>(a, b);
      right(b + kSplitPart);
      multiply();
      if (whole) {
        left(a + kSplitPart);
        multiply();
      }
    } else {
      fetch_step<3, 0, 6>(a, b);
      left(a + 2 * kSplitPart);
      right(b);
      multiply();
      fetch_step<3, 1, 6>(a, b);
      left(a + kSplitPart);
      multiply();
      fetch_step<3, 2, 6>(a, b);
      right(b + kSplitPart);
      multiply();
      fetch_step<3, 3, 6>(a, b);
      left(a);
      multiply();
      fetch_step<3, 4, 6>(a, b);
      right(b + 2 * kSplitPart);
      multiply();
      fetch_step<3, 5, 6>(a, b);
      right(b);
      multiply();
    }
  }
  if (!add) return store(c, c_ld);
  store(sum, kSplitSide);
  for (int64_t r = 0; r < kSplitSide; ++r)
    for (int64_t i = 0; i < kSplitSide; i += kTileSide) {
      float* to = c + r * c_ld + i;
      (Vec<float>::load(to) + Vec<float>::load(sum + r * kSplitSide + i)).store(to);
    }
}

template <int kParts, class Epilogue>
void matmul_split(const Matrix& a, const Matrix& b, const Block& block, int64_t depth,
                  const MatmulScratch<MathSplit<kParts>>& w, const Epilogue& epilogue) {
  const auto [row, rows, col, cols] = block;
  constexpr int64_t kStep = MathSplit<kParts>::kStep;
  const int64_t parts = (depth + kSplitDepth - 1) / kSplitDepth;
  const int64_t step = parts > 1 ? round_up((depth + parts - 1) / parts, kSplitSide) : kSplitDepth;
  const int64_t take = a.depth_stride == 1 ? kSplitSide : kMatmulRows;
  for (int64_t k = 0; k == 0 || k < depth; k += step) {
    const int64_t n = depth - k < step ? depth - k : step, steps = split_steps(n);
    const bool last = k + step >= depth;
    const uint32_t bits = pack_split<kParts, false>(b, col, cols, k, n, w.turned, w.b);
    for (int64_t taken = 0; taken < rows; taken += take) {
      const int64_t count = rows - taken < take ? rows - taken : take;
      if (!splits(pack_split<kParts, true>(a, row + taken, count, k, n, w.turned, w.a), bits)) {
        // rows before these are finished or, where the depth goes on, taken anew
        const int64_t done = last ? taken : 0;
        return matmul<MathFma<float>>(a, b, {row + done, rows - done, col, cols}, {}, depth, w.plain, epilogue);
      }
      configure_tiles(kTileSide, kTileSide);
      for (int64_t i = 0; i < count; i += kSplitSide) {
        const int64_t r = taken + i, have = count - i < kSplitSide ? count - i : kSplitSide;
        float* const c = depth <= kSplitDepth ? w.c : w.c + r * w.c_ld;
        for (int64_t j = 0; j < w.c_ld; j += kSplitSide)
          multiply_split<kParts>(w.a + i / kSplitSide * steps * kStep, w.b + j / kSplitSide * steps * kStep, steps,
                                 c + j, w.c_ld, k > 0, w.sum);
        if (last) epilogue(row + r, have, c, w.c_ld);
      }
      _tile_release();
    }
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#else

namespace lmk {
namespace LMK_NS {
namespace {

template <class M>
constexpr bool kBySplit = false;

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#endif  // LMK_TILES
