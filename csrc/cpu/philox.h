// Philox-4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), many counters at a time.
// Included once per instruction set, hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

// words (4 * kCounters,): word w of counter (first + i, c1, c2, c3) at 4 * i + w.
template <int kCounters>
void philox(uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* words) {
  uint32_t x0[kCounters], x1[kCounters], x2[kCounters], x3[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    x0[i] = first + uint32_t(i);
    x1[i] = c1;
    x2[i] = c2;
    x3[i] = c3;
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t p0 = uint64_t(x0[i]) * 0xD2511F53u, p1 = uint64_t(x2[i]) * 0xCD9E8D57u;
      x0[i] = uint32_t(p1 >> 32) ^ x1[i] ^ k0;
      x1[i] = uint32_t(p1);
      x2[i] = uint32_t(p0 >> 32) ^ x3[i] ^ k1;
      x3[i] = uint32_t(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kCounters; ++i) {
    words[4 * i] = x0[i];
    words[4 * i + 1] = x1[i];
    words[4 * i + 2] = x2[i];
    words[4 * i + 3] = x3[i];
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
