// Rows of tensors in any dtype to and from the element types that the matrix products read.
// Included once per instruction set after vec.h and gemm.h, hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  return uint16_t(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Exact. The exponent is rebased by a multiplication, which also normalises subnormals.
inline float from_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = uint32_t(half & 0x7fffu) << 13;
  const float scaled = from_bits(rest) * from_bits(0x77800000u);  // 2^112
  return from_bits(sign | ((half & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : to_bits(scaled)));
}

// Round to nearest even; above 65520 infinity; NaN stays NaN.
inline uint16_t to_f16(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, mag = bits & 0x7fffffffu;
  if (mag > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (mag >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (mag < 0x38800000u) {  // subnormal: the addition of 1/2 rounds at 2^-24
    return uint16_t(sign | (to_bits(from_bits(mag) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1)) >> 13));
}

// A row is a few vectors long: a loop in place beats a call of memcpy.
template <class T>
inline void copy_row(const void* src, int64_t n, T* dst) {
  constexpr int kLanes = Vec<T>::kLanes;
  const T* p = static_cast<const T*>(src);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Vec<T>::load(p + i).store(dst + i);
  for (; i < n; ++i) dst[i] = p[i];
}

template <class T>
void load_row(DType dtype, const void* src, int64_t n, T* dst) {
  if constexpr (sizeof(T) == 8) {
    copy_row(src, n, dst);
  } else if (dtype == DType::f32) {
    copy_row(src, n, dst);
  } else if (dtype == DType::bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    int64_t i = 0;
#if LMK_LANES == 16
    for (; i + 16 <= n; i += 16) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)));
      _mm512_storeu_ps(dst + i, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
    }
#elif LMK_LANES == 8
    for (; i + 8 <= n; i += 8) {
      const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
      _mm256_storeu_ps(dst + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
    }
#endif
    for (; i < n; ++i) dst[i] = from_bits(uint32_t(p[i]) << 16);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    int64_t i = 0;
#if LMK_LANES >= 8
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
#endif
    for (; i < n; ++i) dst[i] = from_f16(p[i]);
  }
}

template <class T>
void store_row(DType dtype, const T* src, int64_t n, void* dst) {
  if constexpr (sizeof(T) == 8) {
    copy_row(src, n, static_cast<T*>(dst));
  } else if (dtype == DType::f32) {
    copy_row(src, n, static_cast<T*>(dst));
  } else if (dtype == DType::bf16) {
    uint16_t* p = static_cast<uint16_t*>(dst);
    int64_t i = 0;
#if LMK_BF16_DOT
    for (; i + 32 <= n; i += 32) {
      const __m512 a = _mm512_loadu_ps(src + i), b = _mm512_loadu_ps(src + i + 16);
      constexpr int kSubnormal = 0x20;  // which the instruction would turn into zeros
      if (!_mm512_kortestz(_mm512_fpclass_ps_mask(a, kSubnormal), _mm512_fpclass_ps_mask(b, kSubnormal))) break;
      _mm512_storeu_si512(p + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
    }
#endif
    for (; i < n; ++i) p[i] = to_bf16(src[i]);
  } else {
    uint16_t* p = static_cast<uint16_t*>(dst);
    int64_t i = 0;
#if LMK_LANES >= 8
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
    for (; i < n; ++i) p[i] = to_f16(src[i]);
  }
}

// One element of a tensor of parameters (bias, slopes) at any stride.
template <class T>
T load_one(DType dtype, const void* src, int64_t index) {
  T x;
  load_row<T>(dtype, static_cast<const char*>(src) + index * element_size(dtype), 1, &x);
  return x;
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class M>
constexpr int64_t panel_of() {
  return kPackedVecs<M> * M::V::kLanes;
}

// Hands out aligned pieces of the scratch memory; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(n * int64_t(sizeof(T)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

#if LMK_BF16_DOT
inline __mmask16 lanes_below(int64_t n) { return n < 16 ? __mmask16((1 << n) - 1) : __mmask16(0xffff); }

inline void copy_pairs(const void* src, int64_t n, uint32_t* dst) {
  const uint32_t* p = static_cast<const uint32_t*>(src);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = lanes_below(n - i);
    _mm512_mask_storeu_epi32(dst + i, lanes, _mm512_maskz_loadu_epi32(lanes, p + i));
  }
}

// dst (ceil(n / 2),): neighbours in x (n,), rounded, as pairs; 0 beyond n
inline void round_pairs(const float* x, int64_t n, uint32_t* dst) {
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 wide = _mm512_maskz_loadu_ps(lanes_below(n - i), x + i);
    const __m512i pairs = _mm512_castsi256_si512(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(wide)));
    _mm512_mask_storeu_epi32(dst + i / 2, lanes_below((n - i + 1) / 2) & 0xff, pairs);
  }
}

// 16 elements, or as many as lanes says, in the low halves of 32 bits
inline __m512i load_low(DType dtype, const void* src, int64_t i, __mmask16 lanes) {
  if (dtype == DType::f32) {
    const __m512 wide = _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(src) + i);
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(wide)));
  }
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(src) + i));
}

// dst (n,): element c of two rows as a pair; odd may be null for a row of zeros
inline void join_pairs(DType dtype, const void* even, const void* odd, int64_t n, uint32_t* dst) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = lanes_below(n - i);
    __m512i pair = load_low(dtype, even, i, lanes);
    if (odd) pair = _mm512_or_si512(pair, _mm512_slli_epi32(load_low(dtype, odd, i, lanes), 16));
    _mm512_mask_storeu_epi32(dst + i, lanes, pair);
  }
}
#endif

// Packed rows, the A of a product: dst (n, ld) elements, zero beyond n_cols.
template <class M>
void pack_rows(DType dtype, const void* const* rows, int64_t n, int64_t n_cols, typename M::Elem* dst, int64_t ld) {
  for (int64_t r = 0; r < n; ++r) {
    typename M::Elem* row = dst + r * ld;
    if constexpr (M::kPack == 1) {
      if (element_size(dtype) == sizeof(row[0]))
        copy_row(rows[r], n_cols, row);
      else
        load_row(dtype, rows[r], n_cols, row);
      for (int64_t c = n_cols; c < ld; ++c) row[c] = 0;
    } else {
      const int64_t pairs = n_cols / 2;
      if (dtype == DType::f32) {
        round_pairs(static_cast<const float*>(rows[r]), n_cols, row);
      } else {
        copy_pairs(rows[r], pairs, row);
        if (n_cols % 2) row[pairs] = static_cast<const uint16_t*>(rows[r])[n_cols - 1];
      }
      for (int64_t c = (n_cols + 1) / 2; c < ld; ++c) row[c] = 0;
    }
  }
}

// Packed rows, the B of a product over the rows: dst (ceil(n / kPack), ld) elements, zero beyond n and n_cols.
template <class M>
void pack_depth(DType dtype, const void* const* rows, int64_t n, int64_t n_cols, typename M::Elem* dst, int64_t ld) {
  if constexpr (M::kPack == 1) {
    pack_rows<M>(dtype, rows, n, n_cols, dst, ld);
  } else {
    for (int64_t r = 0; r < n; r += 2, dst += ld) {
      join_pairs(dtype, rows[r], r + 1 < n ? rows[r + 1] : nullptr, n_cols, dst);
      for (int64_t c = n_cols; c < ld; ++c) dst[c] = 0;
    }
  }
}

#if LMK_LANES == 16
// dst (16, dst_ld) = transpose of 32-bit elements [k, k + 16) of 16 rows
inline void transpose_tile(const void* const* rows, int64_t k, void* dst, int64_t dst_ld) {
  float* d = static_cast<float*>(dst);
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(static_cast<const float*>(rows[i]) + k);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  // r[4 g + c], 128-bit part p: rows 4 g .. 4 g + 3 of column 4 p + c
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x88);
    t[c + 4] = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xdd);
    t[c + 8] = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x88);
    t[c + 12] = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    _mm512_storeu_ps(d + c * dst_ld, _mm512_shuffle_f32x4(t[c], t[c + 8], 0x88));
    _mm512_storeu_ps(d + (c + 4) * dst_ld, _mm512_shuffle_f32x4(t[c + 4], t[c + 12], 0x88));
    _mm512_storeu_ps(d + (c + 8) * dst_ld, _mm512_shuffle_f32x4(t[c], t[c + 8], 0xdd));
    _mm512_storeu_ps(d + (c + 12) * dst_ld, _mm512_shuffle_f32x4(t[c + 4], t[c + 12], 0xdd));
  }
}
#elif LMK_LANES == 8
// dst (8, dst_ld) = transpose of 32-bit elements [k, k + 8) of 8 rows
inline void transpose_tile(const void* const* rows, int64_t k, void* dst, int64_t dst_ld) {
  float* d = static_cast<float*>(dst);
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(static_cast<const float*>(rows[i]) + k);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(d + c * dst_ld, _mm256_permute2f128_ps(r[c], r[c + 4], 0x20));
    _mm256_storeu_ps(d + (c + 4) * dst_ld, _mm256_permute2f128_ps(r[c], r[c + 4], 0x31));
  }
}
#endif

// Packed columns, the B of a product over the columns: panels of kPackedVecs vectors of rows,
// dst (panels, ceil(n_cols / kPack), panel) elements; rows beyond n, up to whole
// kColumnUnit, are zero. buffer: kLanes * (ceil(n_cols / kPack)
// rounded up to 16) elements.
template <class M>
void pack_columns(DType dtype, const void* const* rows, int64_t n, int64_t n_cols, typename M::Elem* dst,
                  typename M::Elem* buffer) {
  using E = typename M::Elem;
  constexpr int64_t kLanes = M::V::kLanes, kPanel = panel_of<M>();
  const int64_t depth = (n_cols + M::kPack - 1) / M::kPack, ld = round_up(depth, 16);
  for (int64_t r = 0; r < round_up(n, kColumnUnit<M>); r += kLanes) {
    E* out = dst + r / kPanel * kPanel * depth + r % kPanel;
    const int64_t have = n - r < 0 ? 0 : n - r < kLanes ? n - r : kLanes;
    const void* lanes[kLanes];
    for (int64_t i = 0; i < have; ++i) lanes[i] = rows[r + i];
    // straight from the source where it holds elements already, in whole vectors and of whole tiles
    const bool direct = have == kLanes && depth % kLanes == 0 && n_cols % M::kPack == 0 &&
                        element_size(dtype) * M::kPack == int64_t(sizeof(E));
    if (!direct) {
      pack_rows<M>(dtype, lanes, have, n_cols, buffer, ld);
      for (int64_t i = have * ld; i < kLanes * ld; ++i) buffer[i] = 0;
      for (int64_t i = 0; i < kLanes; ++i) lanes[i] = buffer + i * ld;
    }
    int64_t k = 0;
#if LMK_LANES >= 8
    if constexpr (sizeof(E) == 4)
      for (; k + kLanes <= depth; k += kLanes) transpose_tile(lanes, k, out + k * kPanel, kPanel);
#endif
    for (; k < depth; ++k)
      for (int64_t lane = 0; lane < kLanes; ++lane) out[k * kPanel + lane] = static_cast<const E*>(lanes[lane])[k];
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
