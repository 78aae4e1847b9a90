// Elements as the sum of two or three bfloat16, in pairs as tiles (AMX) read them. Included once per instruction set
// after rows.h, hence no include guard.

#if LMK_TILES

namespace lmk {
namespace LMK_NS {
namespace {

// The parts of 16 elements, in the upper halves of 32 bits; what the lower halves hold does not count.
template <int kParts>
struct SplitParts {
  __m512i part[kParts];
};

// largest: of elements' bits without their sign
[[gnu::always_inline]] inline void join_bits(__m512 x, __m512i& largest) {
  largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}

template <int kParts>
[[gnu::always_inline]] inline SplitParts<kParts> parts_of(__m512 x, __m512i& largest) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000)), bits = _mm512_castps_si512(x);
  join_bits(x, largest);
  if constexpr (kParts == 2) {
    const __m512i half = _mm512_set1_epi32(0x8000), first = _mm512_and_si512(_mm512_add_epi32(bits, half), upper);
    const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(first));
    return {{first, _mm512_add_epi32(_mm512_castps_si512(rest), half)}};
  } else {
    const __m512i first = _mm512_and_si512(bits, upper);
    const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(first));
    const __m512i second = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    return {{first, second, _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(second)))}};
  }
}

// Whether products of parts are neither lost below the range of floats nor beyond it, nor made NaN by an infinity's
// missing parts, into which the largest floats may be rounded. a, b: bits of the largest elements of the factors
inline bool splits(uint32_t a, uint32_t b) {
  constexpr uint32_t kInfinity = 0x7f800000 - 0x8000;
  constexpr int kRange = 100;
  if (a >= kInfinity || b >= kInfinity) return false;
  const int x = int(a >> 23) - 127, y = int(b >> 23) - 127;  // exponents
  return a == 0 || b == 0 || (x >= -kRange && y >= -kRange && x + y >= -kRange && x + y <= kRange);
}

// The same for factors whose largest elements are joined.
inline bool splits(__m512i largest) {
  const uint32_t bits = _mm512_reduce_max_epu32(largest);
  return splits(bits, bits);
}

[[gnu::always_inline]] inline __m512 load_floats(DType dtype, const void* line, int64_t i, int64_t n) {
  const __mmask16 lanes = n <= 0 ? __mmask16(0) : lanes_below(n);
  if (dtype == DType::f32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(line) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(line) + i);
  if (dtype == DType::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void join_bits(DType dtype, const void* line, int64_t n, __m512i& largest) {
  for (int64_t i = 0; i < n; i += kTileSide) join_bits(load_floats(dtype, line, i, n - i), largest);
}

// Pairs of neighbours of a line along the depth, 32 elements or n of them.
template <int kParts>
[[gnu::always_inline]] inline SplitParts<kParts> pairs_along(DType dtype, const void* line, int64_t n,
                                                             __m512i& largest) {
  alignas(64) static constexpr uint16_t kUpper[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(kUpper);
  const SplitParts<kParts> low = parts_of<kParts>(load_floats(dtype, line, 0, n), largest),
                           high = parts_of<kParts>(load_floats(dtype, line, 16, n - 16), largest);
  SplitParts<kParts> pairs;
  for (int p = 0; p < kParts; ++p) pairs.part[p] = _mm512_permutex2var_epi16(low.part[p], upper, high.part[p]);
  return pairs;
}

// Pairs of 16 lines' elements, or n of them, in two neighbouring rows; odd may be null for zeros.
template <int kParts>
[[gnu::always_inline]] inline SplitParts<kParts> pairs_across(DType dtype, const void* even, const void* odd, int64_t i,
                                                              int64_t n, __m512i& largest) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  constexpr int kAAndBOrC = 0xea;
  const SplitParts<kParts> low = parts_of<kParts>(load_floats(dtype, even, i, n), largest);
  SplitParts<kParts> pairs = odd ? parts_of<kParts>(load_floats(dtype, odd, i, n), largest) : SplitParts<kParts>{};
  for (int p = 0; p < kParts; ++p)
    pairs.part[p] = _mm512_ternarylogic_epi32(pairs.part[p], upper, _mm512_srli_epi32(low.part[p], 16), kAAndBOrC);
  return pairs;
}

inline void turn_tile(const uint32_t* tile, uint32_t* dst, int64_t dst_ld) {
  const void* lines[kTileSide];
  for (int64_t i = 0; i < kTileSide; ++i) lines[i] = tile + i * kTileSide;
  transpose_tile(lines, 0, dst, dst_ld);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#endif  // LMK_TILES
