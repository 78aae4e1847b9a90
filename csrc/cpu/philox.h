// Philox-4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), one counter per lane of a vector.
// Included once per instruction set, hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

// LMK_LANES unsigned numbers of 32 bits.
struct Words {
#if LMK_LANES == 4
  uint32_t v[4];  // gcc makes twice as much of loops over these as of its own vectors
#elif LMK_LANES == 8
  __m256i v;
#else
  __m512i v;
#endif
  static Words load(const uint32_t* p) {
    Words x;
    memcpy(&x.v, p, sizeof(x.v));
    return x;
  }
  void store(uint32_t* p) const { memcpy(p, &v, sizeof(v)); }
};

// high and low: the halves of x * factor. transpose4: lane 4 k + w of x[i] from lane 4 k + i of x[w].
#if LMK_LANES == 4

inline Words words1(uint32_t x) { return {{x, x, x, x}}; }
inline Words operator+(Words a, Words b) {
  for (int lane = 0; lane < 4; ++lane) a.v[lane] += b.v[lane];
  return a;
}
inline Words operator^(Words a, Words b) {
  for (int lane = 0; lane < 4; ++lane) a.v[lane] ^= b.v[lane];
  return a;
}
inline void multiply(Words x, uint32_t factor, Words& high, Words& low) {
  for (int lane = 0; lane < 4; ++lane) {
    const uint64_t product = uint64_t(x.v[lane]) * factor;
    high.v[lane] = uint32_t(product >> 32), low.v[lane] = uint32_t(product);
  }
}
inline void transpose4(Words* x) {
  for (int i = 0; i < 4; ++i)
    for (int w = 0; w < i; ++w) {
      const uint32_t below = x[i].v[w];
      x[i].v[w] = x[w].v[i], x[w].v[i] = below;
    }
}

#elif LMK_LANES == 8

inline Words words1(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
inline Words operator+(Words a, Words b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline void multiply(Words x, uint32_t factor, Words& high, Words& low) {
  const __m256i f = words1(factor).v;
  const __m256i even = _mm256_mul_epu32(x.v, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(x.v, 32), f);
  high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
inline void transpose4(Words* x) {
  const __m256i a = _mm256_unpacklo_epi32(x[0].v, x[1].v), b = _mm256_unpackhi_epi32(x[0].v, x[1].v);
  const __m256i c = _mm256_unpacklo_epi32(x[2].v, x[3].v), d = _mm256_unpackhi_epi32(x[2].v, x[3].v);
  x[0].v = _mm256_unpacklo_epi64(a, c), x[1].v = _mm256_unpackhi_epi64(a, c);
  x[2].v = _mm256_unpacklo_epi64(b, d), x[3].v = _mm256_unpackhi_epi64(b, d);
}

#else

inline Words words1(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
inline Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline void multiply(Words x, uint32_t factor, Words& high, Words& low) {
  const __m512i f = words1(factor).v;
  const __m512i even = _mm512_mul_epu32(x.v, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x.v, 32), f);
  high.v = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_ENUM(0xf5));  // lanes 1, 1, 3, 3
  low.v = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_ENUM(0xa0));   // lanes 0, 0, 2, 2
}
inline void transpose4(Words* x) {
  const __m512i a = _mm512_unpacklo_epi32(x[0].v, x[1].v), b = _mm512_unpackhi_epi32(x[0].v, x[1].v);
  const __m512i c = _mm512_unpacklo_epi32(x[2].v, x[3].v), d = _mm512_unpackhi_epi32(x[2].v, x[3].v);
  x[0].v = _mm512_unpacklo_epi64(a, c), x[1].v = _mm512_unpackhi_epi64(a, c);
  x[2].v = _mm512_unpacklo_epi64(b, d), x[3].v = _mm512_unpackhi_epi64(b, d);
}

#endif

constexpr uint32_t kPhiloxFactor[] = {0xD2511F53u, 0xCD9E8D57u};
constexpr int kPhiloxRounds = 10;

// The two halves of the key in a round.
struct PhiloxKey {
  uint32_t k[2];
  PhiloxKey(uint64_t seed, int round)
      : k{uint32_t(seed) + uint32_t(round) * 0x9E3779B9u, uint32_t(seed >> 32) + uint32_t(round) * 0xBB67AE85u} {}
};

// The rounds from kFirst on, on the four words of kVectors vectors of counters.
template <int kFirst, int kVectors>
[[gnu::always_inline]] inline void philox_rounds(uint64_t seed, Words (*x)[4]) {
#pragma GCC unroll 10
  for (int round = kFirst; round < kPhiloxRounds; ++round) {
    const PhiloxKey key(seed, round);
    const Words k0 = words1(key.k[0]), k1 = words1(key.k[1]);
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      Words high0, low0, high1, low1;
      multiply(x[n][0], kPhiloxFactor[0], high0, low0);
      multiply(x[n][2], kPhiloxFactor[1], high1, low1);
      x[n][0] = high1 ^ x[n][1] ^ k0;
      x[n][1] = low1;
      x[n][2] = high0 ^ x[n][3] ^ k1;
      x[n][3] = low0;
    }
  }
}

// words (4 * LMK_LANES,): word w of counter (first + i, c1, c2, c3) at 4 * i + w.
inline void philox(uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* words) {
  struct Order {
    uint32_t lane[LMK_LANES];
  };
  static constexpr Order kOrder = [] {  // that transpose4 makes the natural one
    Order order{};
    for (uint32_t i = 0; i < LMK_LANES; ++i) order.lane[i] = i % 4 * (LMK_LANES / 4) + i / 4;
    return order;
  }();
  Words x[1][4] = {{Words::load(kOrder.lane) + words1(first), words1(c1), words1(c2), words1(c3)}};
  philox_rounds<0, 1>(seed, x);
  transpose4(x[0]);
  for (int i = 0; i < 4; ++i) x[0][i].store(words + i * LMK_LANES);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
