// Rows of queries, keys and values as factors of tiles, in parts, and which of them are odd. Included by
// attention_tiles_body.h.

namespace lmk {
namespace LMK_NS {
namespace {

// Whether a row is not multiplied in parts: it holds an infinity or a NaN, or is next to the end of the range of
// floats.
inline bool odd_row(DType dtype, const void* row, int64_t dim) {
  __m512i largest = _mm512_setzero_si512();
  join_bits(dtype, row, dim, largest);
  return !splits(largest);
}

// Those of kSide rows, as bits.
inline uint32_t odd_rows(DType dtype, const void* const* rows, int64_t dim) {
  uint32_t odd = 0;
  for (int r = 0; r < kSide; ++r) odd |= uint32_t(odd_row(dtype, rows[r], dim)) << r;
  return odd;
}

inline const char* column(const AttentionArgs& a, const void* row, int64_t c) {
  return static_cast<const char*>(row) + c * element_size(a.dtype);
}

// Pairs of rows (kSide,): dst, parts (kTileSide, wide), zero beyond dim. Returns false where a row is odd.
template <int kParts>
bool pack_pairs(const AttentionArgs& a, const void* const* rows, int64_t dim, int64_t wide, uint32_t* dst) {
  __m512i largest = _mm512_setzero_si512();
  if constexpr (kParts == 1)
    pack_depth<MathBf16>(a.dtype, rows, kSide, dim, dst, wide);
  else
    for (int64_t i = 0; i < kTileSide; ++i)
      for (int64_t c = 0; c < wide; c += kTileSide) {
        const SplitParts<kParts> pairs =
            pairs_across<kParts>(a.dtype, rows[2 * i], rows[2 * i + 1], c, dim - c, largest);
        for (int p = 0; p < kParts; ++p) _mm512_storeu_si512(dst + (p * kTileSide + i) * wide + c, pairs.part[p]);
      }
  return splits(largest);
}

// The same turned: dst, parts (wide, kTileSide). buffer: (kParts, kTileSide, wide).
template <int kParts>
bool pack_turned(const AttentionArgs& a, const void* const* rows, int64_t dim, int64_t wide, uint32_t* buffer,
                 uint32_t* dst) {
  const bool fine = pack_pairs<kParts>(a, rows, dim, wide, buffer);
  for (int p = 0; p < kParts; ++p, buffer += kTileSide * wide, dst += wide * kTileSide) {
    const void* lines[kTileSide];
    for (int64_t i = 0; i < kTileSide; ++i) lines[i] = buffer + i * wide;
    for (int64_t c = 0; c < wide; c += kTileSide) transpose_tile(lines, c, dst + c * kTileSide, kTileSide);
  }
  return fine;
}

// A panel of rows (kSide,) as the left factor: dst (dim in pairs by kTileSide, parts, kSide, kTileSide), zero beyond
// dim. What is read together lies together. Returns false where a row is odd.
template <int kParts>
bool pack_panel(const AttentionArgs& a, const void* const* rows, int64_t dim, uint32_t* dst) {
  __m512i largest = _mm512_setzero_si512();
  if constexpr (kParts == 1) {
    for (int64_t c = 0; c < dim; c += kSide, dst += kPanelPairs) {
      const void* parts[kSide];
      for (int64_t r = 0; r < kSide; ++r) parts[r] = column(a, rows[r], c);
      pack_rows<MathBf16>(a.dtype, parts, kSide, dim - c < kSide ? dim - c : kSide, dst, kTileSide);
    }
  } else {
    for (int64_t r = 0; r < kSide; ++r) {
      uint32_t* to = dst + r * kTileSide;
      for (int64_t c = 0; c < dim; c += kSide) {
        const SplitParts<kParts> pairs = pairs_along<kParts>(a.dtype, column(a, rows[r], c), dim - c, largest);
        for (int p = 0; p < kParts; ++p, to += kPanelPairs) _mm512_storeu_si512(to, pairs.part[p]);
      }
    }
  }
  return splits(largest);
}

// A group of rows (kSide,) by columns: dst (dim in pairs up to whole tiles, kSide), by steps of kTileSide and parts.
// An odd row is NaN where it is not finite, and so will be all its scores, as no other key makes up for one that is.
template <int kParts>
void pack_query_columns(const AttentionArgs& a, const void* const* rows, int64_t dim, uint32_t* dst, uint32_t* buffer) {
  if constexpr (kParts == 1) {
    pack_columns<MathBf16>(a.dtype, rows, kSide, dim, dst, buffer);
    const int64_t depth = (dim + 1) / 2;
    memset(dst + depth * kSide, 0, size_t((round_up(depth, kTileSide) - depth) * kSide) * sizeof(*dst));
  } else {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t c = 0; c < dim; c += kSide)
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t i = 0; i < kTileSide; ++i) {
          const char* line = column(a, rows[half * kTileSide + i], c);
          const SplitParts<kParts> pairs = pairs_along<kParts>(a.dtype, line, dim - c, largest);
          for (int p = 0; p < kParts; ++p) _mm512_storeu_si512(buffer + (p * kTileSide + i) * kTileSide, pairs.part[p]);
        }
        for (int p = 0; p < kParts; ++p)
          turn_tile(buffer + p * kTileSide * kTileSide, dst + (c / kSide * kParts + p) * kPanelPairs + half * kTileSide,
                    kSide);
      }
    if (__builtin_expect(splits(largest), 1)) return;
    for (uint32_t odd = odd_rows(a.dtype, rows, dim); odd; odd &= odd - 1) {
      const int r = __builtin_ctz(odd);
      for (int64_t c = 0; c < dim; ++c) {
        float rest = load_one<float>(a.dtype, rows[r], c);
        if (!(std::fabs(rest) <= std::numeric_limits<float>::max())) rest = std::numeric_limits<float>::quiet_NaN();
        for (int p = 0; p < kParts; ++p) {  // not rounded
          uint32_t& pair = dst[(c / kSide * kParts + p) * kPanelPairs + c % kSide / 2 * kSide + r];
          const uint32_t part = to_bits(rest) & 0xffff0000;
          pair = c % 2 ? (pair & 0xffff) | part : (pair & 0xffff0000) | part >> 16;
          rest -= from_bits(part);
        }
      }
    }
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
