// A few rows against many rows that are read once, where they lie and in their own dtype, straight into registers:
// dot products, and sums of the rows with weights. Included once per instruction set after elements.h and fetch.h,
// hence no include guard.
//
// How an instruction set multiplies is a struct P:
//   T, V              accumulator and its vector, in which results are handed over
//   Query             element of the few rows, packed by pack_query, and Weight, by pack_weights; both return the unit
//                     that the results are to be multiplied by
//   exp               exact enough for weights
//   Adding            how the lanes of accumulators are added up
//   kElement          bytes of an element of the many rows
//   kColumns          columns that one step reads, kQueries the elements of a Query that they meet
//   kKeys, kRegs      rows that a step of the weighted sum joins, and accumulators that it needs

namespace lmk {
namespace LMK_NS {
namespace {

inline float widen(int8_t x) { return float(x); }

// The n < kLanes elements from p on, zeros in the lanes behind them; reads nothing else.
#if LMK_LANES == 16
inline Vec<float> load_vec(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1); }
inline Vec<float> load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline Vec<double> load_first(const double* p, int64_t n) {
  return {_mm512_maskz_loadu_pd(__mmask8(first_lanes(n)), p)};
}
inline Vec<float> load_first(const Bf16* p, int64_t n) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec<float> load_first(const F16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
inline Vec<float> load_first(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)))};
}
#else
#if LMK_LANES == 8
inline Vec<float> load_vec(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
#else
inline Vec<float> load_vec(const int8_t* p) {
  float lanes[Vec<float>::kLanes];
  for (int i = 0; i < Vec<float>::kLanes; ++i) lanes[i] = widen(p[i]);
  return Vec<float>::load(lanes);
}
#endif
template <class E>
Vec<Acc<E> > load_first(const E* p, int64_t n) {
  Acc<E> lanes[Vec<Acc<E> >::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = widen(p[i]);
  return Vec<Acc<E> >::load(lanes);
}
#endif

// One vector with the sum of x[i] in lane i.
#if LMK_LANES == 16
inline Vec<double> add_up(const Vec<double>* x) {
  __m512d t[4];
  for (int i = 0; i < 4; ++i)
    t[i] =
        _mm512_add_pd(_mm512_unpacklo_pd(x[2 * i].v, x[2 * i + 1].v), _mm512_unpackhi_pd(x[2 * i].v, x[2 * i + 1].v));
  for (int i = 0; i < 2; ++i)
    t[i] = _mm512_add_pd(_mm512_shuffle_f64x2(t[2 * i], t[2 * i + 1], 0x88),
                         _mm512_shuffle_f64x2(t[2 * i], t[2 * i + 1], 0xdd));
  return {_mm512_add_pd(_mm512_shuffle_f64x2(t[0], t[1], 0x88), _mm512_shuffle_f64x2(t[0], t[1], 0xdd))};
}
#elif LMK_LANES == 8
inline Vec<float> add_up(const Vec<float>* x) {
  __m256 t[2];
  for (int i = 0; i < 2; ++i)
    t[i] = _mm256_hadd_ps(_mm256_hadd_ps(x[4 * i].v, x[4 * i + 1].v), _mm256_hadd_ps(x[4 * i + 2].v, x[4 * i + 3].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(t[0], t[1], 0x20), _mm256_permute2f128_ps(t[0], t[1], 0x31))};
}
inline Vec<double> add_up(const Vec<double>* x) {
  const __m256d t = _mm256_hadd_pd(x[0].v, x[1].v), u = _mm256_hadd_pd(x[2].v, x[3].v);
  return {_mm256_add_pd(_mm256_permute2f128_pd(t, u, 0x20), _mm256_permute2f128_pd(t, u, 0x31))};
}
#else
template <class V>
V add_up(const V* x) {
  V sums;
  for (int i = 0; i < V::kLanes; ++i) sums.v[i] = reduce_add(x[i]);
  return sums;
}
#endif

// One vector with the sum of accumulator i in lane i: begin, then steps 0 to 3, which may stand between other work.
template <class V>
struct AddAtOnce {
  V x;
  void begin(const V* acc) { x = add_up(acc); }
  void step(int) {}
  V sums() const { return x; }
};

template <class T>
struct AddingOf {
  using Type = AddAtOnce<Vec<T> >;
};

#if LMK_LANES == 16
struct FloatLanes {
  static __m512 bits(Vec<float> x) { return x.v; }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static Vec<float> sums(__m512 x) { return {x}; }
};
struct IntegerLanes {
  static __m512 bits(__m512i x) { return _mm512_castsi512_ps(x); }
  static __m512 add(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static Vec<float> sums(__m512 x) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(x))}; }
};

// Steps wait for each other. In one piece they would fill the scheduler, and what comes after them would wait too.
template <class Lanes>
struct AddInSteps {
  __m512 x[8];
  template <class Acc>
  [[gnu::always_inline]] void begin(const Acc* acc) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512 a = Lanes::bits(acc[2 * i]), b = Lanes::bits(acc[2 * i + 1]);
      x[i] = Lanes::add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
  }
  [[gnu::always_inline]] void step(int n) {
    if (n < 2) {
#pragma GCC unroll 2
      for (int i = 2 * n; i < 2 * n + 2; ++i)
        x[i] = Lanes::add(_mm512_shuffle_ps(x[2 * i], x[2 * i + 1], 0x44),
                          _mm512_shuffle_ps(x[2 * i], x[2 * i + 1], 0xee));
    } else if (n == 2) {
      for (int i = 0; i < 2; ++i) x[i] = blocks(x[2 * i], x[2 * i + 1]);
    } else {
      x[0] = blocks(x[0], x[1]);
    }
  }
  Vec<float> sums() const { return Lanes::sums(x[0]); }
  static __m512 blocks(__m512 a, __m512 b) {
    return Lanes::add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
};
template <>
struct AddingOf<float> {
  using Type = AddInSteps<FloatLanes>;
};
#endif

// The largest |x| of x (n,), in whole vectors.
template <class T>
T largest_magnitude(const T* x, int64_t n) {
  using V = Vec<T>;
  V most = V::zero();
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const V y = V::load(x + i);
    most = max(max(y, V::zero() - y), most);
  }
  return reduce_max(most);
}

// Integers as vectors hold them, saturated where they do not fit
#if LMK_LANES == 16
inline void store_integers(Vec<float> x, int16_t* y) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x.v)));
}
inline void store_integers(Vec<float> x, int8_t* y) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
#else
template <class I>
void store_integers(Vec<float> x, I* y) {
  float lanes[Vec<float>::kLanes];
  round_small(x).store(lanes);
  for (int lane = 0; lane < Vec<float>::kLanes; ++lane) y[lane] = I(lanes[lane]);
}
#endif

// x (n,), n a multiple of kLanes, is unit * y (n,) for integers |y| <= most, up to rounding; returns unit. Where x is
// not finite that is NaN and y is 0, so that whatever is computed from it is NaN.
template <class I>
float quantise_row(const float* x, int64_t n, float most, I* y) {
  using V = Vec<float>;
  V probe = V::zero();
  for (int64_t i = 0; i < n; i += V::kLanes) probe = fma(V::load(x + i), V::zero(), probe);
  const float unit = largest_magnitude(x, n) / most + reduce_add(probe);
  for (int64_t i = 0; i < n; i += V::kLanes)
    store_integers(unit > 0 ? V::load(x + i) / V::set1(unit) : V::zero(), y + i);
  return unit;
}

// Everything in accumulator precision: rows are converted as they are loaded.
template <class E>
struct FmaProducts {
  using T = LMK_NS::Acc<E>;
  using V = Vec<T>;
  using Query = T;
  using Weight = T;
  using Acc = V;
  using Row = V;
  using Adding = typename AddingOf<T>::Type;
  static constexpr int kElement = sizeof(E), kColumns = V::kLanes, kQueries = V::kLanes, kKeys = 1, kRegs = 1;

  static T pack_query(const T* x, int64_t n, Query* q) {
    for (int64_t i = 0; i < n; i += V::kLanes) V::load(x + i).store(q + i);
    return 1;
  }
  static V exp(V x) { return LMK_NS::exp(x); }
  static T pack_weights(T* p, const T* scales, int64_t n) {
    if (scales)
      for (int64_t i = 0; i < n; i += V::kLanes) (V::load(p + i) * V::load(scales + i)).store(p + i);
    return 1;
  }

  static Acc zero() { return V::zero(); }
  static Row load_query(const Query* q) { return V::load(q); }
  static Row load(const char* p) { return load_vec(reinterpret_cast<const E*>(p)); }
  static Row load(const char* p, int64_t n) { return load_first(reinterpret_cast<const E*>(p), n); }
  static Acc dot(Acc acc, Row a, Row b) { return fma(a, b, acc); }

  static void join(const Row* rows, Row* joined) { joined[0] = rows[0]; }
  static Row broadcast(const Weight* p) { return V::set1(*p); }
  static void in_order(const Acc* acc, V* columns) { columns[0] = acc[0]; }
};

#if LMK_BF16_DOT

// Neighbours in registers of 16-bit elements come in pairs: of columns in a dot product, of rows in a weighted sum,
// whose accumulators then hold columns 0-3, 8-11, 16-19, 24-27 and the others of 32.
struct PairProducts {
  using T = float;
  using V = Vec<float>;
  using Row = __m512i;
  static constexpr int kColumns = 32, kQueries = 16, kKeys = 2, kRegs = 2;

  static Row load_query(const uint32_t* q) { return _mm512_loadu_si512(q); }
  static Row broadcast(const uint32_t* p) { return _mm512_set1_epi32(int(*p)); }
  static void join(const Row* rows, Row* joined) {
    joined[0] = _mm512_unpacklo_epi16(rows[0], rows[1]);
    joined[1] = _mm512_unpackhi_epi16(rows[0], rows[1]);
  }
  static void in_order(V low, V high, V* columns) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    columns[0] = {_mm512_permutex2var_ps(low.v, first, high.v)};
    columns[1] = {_mm512_permutex2var_ps(low.v, second, high.v)};
  }
};

// bfloat16 by vdpbf16ps: queries and weights are rounded to bfloat16, sums are float32.
struct Bf16Products : PairProducts {
  using Query = uint32_t;
  using Weight = uint32_t;
  using Acc = V;
  using Adding = AddInSteps<FloatLanes>;
  static constexpr int kElement = 2;

  static T pack_query(const T* x, int64_t n, Query* q) {
    MathBf16::pack_row(x, n, q);
    return 1;
  }
  static V exp(V x) { return exp_bf16(x); }
  static T pack_weights(T* p, const T*, int64_t n) {
    MathBf16::pack_row(p, n, reinterpret_cast<uint32_t*>(p));
    return 1;
  }

  static Acc zero() { return V::zero(); }
  static Row load(const char* p) { return _mm512_loadu_si512(p); }
  static Row load(const char* p, int64_t n) { return _mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1, p); }
  static Acc dot(Acc acc, Row a, Row b) {
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
  static void in_order(const Acc* acc, V* columns) { PairProducts::in_order(acc[0], acc[1], columns); }
};

// int8 by vpdpwssd: queries and weights are 16-bit integers times a unit (one part in 32767 of the row's largest), sums
// are exact: of 256 products at most, which stay below 2^31.
struct Int8Products : PairProducts {
  using Query = uint32_t;
  using Weight = uint32_t;
  using Acc = __m512i;
  using Adding = AddInSteps<IntegerLanes>;
  static constexpr int kElement = 1;

  static T pack_query(const T* x, int64_t n, Query* q) {
    return quantise_row(x, n, 32767.f, reinterpret_cast<int16_t*>(q));
  }
  static V exp(V x) { return LMK_NS::exp(x); }
  static T pack_weights(T* p, const T* scales, int64_t n) {
    V most = V::zero(), probe = V::zero();
    for (int64_t i = 0; i < n; i += 16) {
      const V weight = V::load(p + i) * V::load(scales + i);
      weight.store(p + i);
      most = max(max(weight, V::zero() - weight), most);
      probe = fma(weight, V::zero(), probe);  // NaN where a weight is not finite, and then it is the unit
    }
    const float largest = reduce_max(most), unit = largest / 32767.f + reduce_add(probe);
    const V inverse = V::set1(unit > 1e-35f ? 1 / unit : 0.f);
    int16_t* pairs = reinterpret_cast<int16_t*>(p);
    for (int64_t i = 0; i < n; i += 16) store_integers(V::load(p + i) * inverse, pairs + i);
    return unit;
  }

  static Acc zero() { return _mm512_setzero_si512(); }
  static Row load(const char* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Row load(const char* p, int64_t n) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((__mmask32(1) << n) - 1, p));
  }
  static Acc dot(Acc acc, Row a, Row b) { return _mm512_dpwssd_epi32(acc, a, b); }
  static void in_order(const Acc* acc, V* columns) {
    PairProducts::in_order({_mm512_cvtepi32_ps(acc[0])}, {_mm512_cvtepi32_ps(acc[1])}, columns);
  }
};

#endif

#if LMK_BF16_DOT
using ProductsForBf16 = Bf16Products;
using ProductsForInt8 = Int8Products;
#else
using ProductsForBf16 = FmaProducts<Bf16>;
using ProductsForInt8 = FmaProducts<int8_t>;
#endif

[[gnu::always_inline]] inline void fetch_bytes(const char* row, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 64) fetch_to_l2(row + i);
}

// Columns c .. c + kColumns of kLanes / kRows rows against q (kRows, q_ld) from there on. If kFetch, the same bytes of
// next are fetched. If kWoven, the accumulators begin at 0, and between the rows the sums of the tile before are added
// up.
template <class P, int kRows, bool kWhole, bool kFetch, bool kWoven>
[[gnu::always_inline]] inline void dot_step(const typename P::Query* q, int64_t q_ld, const char* const* rows,
                                            int64_t c, int64_t columns, typename P::Acc* acc,
                                            typename P::Adding& before, const char* const* next) {
  constexpr int kMany = P::V::kLanes / kRows, kEvery = kMany < 4 ? 1 : kMany / 4;
  const bool whole = kWhole || c + P::kColumns <= columns;
  typename P::Row a[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) a[r] = P::load_query(q + r * q_ld);
#pragma GCC unroll 16
  for (int j = 0; j < kMany; ++j) {
    const char* from = rows[j] + c * P::kElement;
    if (kFetch && c * P::kElement % 64 == 0) fetch_to_l2(next[j] + c * P::kElement);
    const typename P::Row b = whole ? P::load(from) : P::load(from, columns - c);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      typename P::Acc& sum = acc[r * kMany + j];
      sum = P::dot(kWoven ? P::zero() : sum, a[r], b);
    }
    if (kWoven && (j + 1) % kEvery == 0) before.step(j / kEvery);
  }
}

template <class P, int kRows>
[[gnu::always_inline]] inline void store_sums(const typename P::Adding& adding, typename P::T* s, int64_t s_ld) {
  if constexpr (kRows == 1) {
    adding.sums().store(s);
  } else {
    constexpr int kMany = P::V::kLanes / kRows;
    typename P::T lanes[P::V::kLanes];
    adding.sums().store(lanes);
    for (int r = 0; r < kRows; ++r) memcpy(s + r * s_ld, lanes + r * kMany, sizeof(lanes) / kRows);
  }
}

// s (kRows, s_ld) = q (kRows, q_ld) . rows[0 .. n]. kWhole: columns is a multiple of kColumns; kFetch: there is a next.
template <class P, int kRows, bool kWhole, bool kFetch>
[[gnu::noinline]] void dot_rows(const typename P::Query* q, int64_t q_ld, const char* const* rows, int64_t n,
                                int64_t columns, typename P::T* s, int64_t s_ld, const char* const* next,
                                int64_t next_bytes) {
  constexpr int kMany = P::V::kLanes / kRows;
  constexpr bool kWoven = kRows > 1;  // one row has too few products to weave anything into
  typename P::Acc acc[P::V::kLanes];
  const auto clear = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < P::V::kLanes; ++i) acc[i] = P::zero();
  };
  typename P::Adding adding;
  const auto finish = [&](int64_t j) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) adding.step(i);
    store_sums<P, kRows>(adding, s + j, s_ld);
  };
  clear();
  if (kWoven) adding.begin(acc);
  for (int64_t j = 0; j < n; j += kMany) {
    const char* const* more = kFetch ? next + j : nullptr;
    if (kFetch && !kWoven)  // so fast through a row, memory does better with its lines one after another
      for (int i = 0; i < kMany; ++i) fetch_bytes(more[i], 0, next_bytes);
    const typename P::Query* from = q;
    int64_t c = 0;
    if (kWoven) {
      dot_step<P, kRows, kWhole, kFetch, true>(from, q_ld, rows + j, c, columns, acc, adding, more);
      store_sums<P, kRows>(adding, s + (j ? j - kMany : 0), s_ld);  // at first zeros, to be overwritten
      c += P::kColumns, from += P::kQueries;
    } else {
      clear();
    }
    for (; c < columns; c += P::kColumns, from += P::kQueries)
      dot_step<P, kRows, kWhole, kFetch && kWoven, false>(from, q_ld, rows + j, c, columns, acc, adding, more);
    if (kFetch && kWoven)
      for (int i = 0; i < kMany; ++i) fetch_bytes(more[i], round_up(columns * P::kElement, 64), next_bytes);
    adding.begin(acc);
    if (!kWoven) finish(j);
  }
  if (kWoven) finish(round_up(n, kMany) - kMany);
}

// s (m, s_ld) = q (m, q_ld) . rows[0 .. n] over `columns`. rows and next hold pointers up to n rounded up to kLanes,
// the last of which may repeat. next (or null): rows of next_bytes that will be read soon; they are fetched on the way.
template <class P>
void dots(const typename P::Query* q, int64_t q_ld, int64_t m, const char* const* rows, int64_t n, int64_t columns,
          typename P::T* s, int64_t s_ld, const char* const* next, int64_t next_bytes) {
  const bool whole = columns % P::kColumns == 0;
  int64_t r = 0;
  const auto some = [&](auto rows_at_once) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows_at_once)::value;
    for (; r + kRows <= m; r += kRows, next = nullptr) {
      const auto run = next ? (whole ? dot_rows<P, kRows, true, true> : dot_rows<P, kRows, false, true>)
                            : (whole ? dot_rows<P, kRows, true, false> : dot_rows<P, kRows, false, false>);
      run(q + r * q_ld, q_ld, rows, n, columns, s + r * s_ld, s_ld, next, next_bytes);
    }
  };
  if constexpr (P::V::kLanes >= 4) some(std::integral_constant<int, 4>());
  some(std::integral_constant<int, 2>());
  some(std::integral_constant<int, 1>());
}

// s (n,) becomes the weights exp(factor s + shift), by the exponential of M; returns their sum.
template <class M, class T>
T weights_row(T* s, int64_t n, T factor, T shift) {
  using V = Vec<T>;
  const V f = V::set1(factor), c = V::set1(shift);
  V sum = V::zero();
  for (int64_t j = 0; j < n; j += V::kLanes) {
    const V p = M::exp(fma(V::load(s + j), f, c));
    p.store(s + j);
    sum = sum + p;
  }
  return reduce_add(sum);
}

// o = correction * o + unit * (p . rows), row by row of o and p
template <class P>
struct WeightedSum {
  using T = typename P::T;
  const typename P::Weight* p;  // (m, p_ld), one per kKeys rows
  int64_t p_ld;
  const char* const* rows;  // n, a multiple of kKeys; a pointer that repeats has weight 0
  int64_t n, columns;
  T* o;  // (m, o_ld)
  int64_t o_ld;
  const T *correction, *unit;  // (m,)
  const char* const* next;     // n rows of next_bytes that will be read soon, or null
  int64_t next_bytes;
};

template <class P, int kRows, int kSteps, bool kWhole>
[[gnu::noinline]] void weigh_tile(const WeightedSum<P>& w, int64_t row, int64_t col, const char* const* next) {
  using V = typename P::V;
  constexpr int kRegs = kSteps * P::kRegs;
  typename P::Acc acc[kRows][kRegs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kRegs; ++i) acc[r][i] = P::zero();
  const typename P::Weight* p = w.p + row * w.p_ld;
  // of the rows that will be read next: as much as this tile reads, and in the last one the rest
  const int64_t begin = col * P::kElement / 64 * 64, after = col + kSteps * P::kColumns;
  const int64_t end = after < w.columns && after * P::kElement < w.next_bytes ? after * P::kElement : w.next_bytes;
  for (int64_t j = 0; j < w.n; j += P::kKeys, ++p) {
    if (next)
      for (int k = 0; k < P::kKeys; ++k) fetch_bytes(next[j + k], begin, end);
    typename P::Row weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weight[r] = P::broadcast(p + r * w.p_ld);
#pragma GCC unroll 16
    for (int i = 0; i < kSteps; ++i) {
      typename P::Row x[P::kKeys], joined[P::kRegs];
#pragma GCC unroll 2
      for (int k = 0; k < P::kKeys; ++k) {
        const char* from = w.rows[j + k] + (col + i * P::kColumns) * P::kElement;
        x[k] = kWhole ? P::load(from) : P::load(from, w.columns - col);
      }
      P::join(x, joined);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int k = 0; k < P::kRegs; ++k)
          acc[r][i * P::kRegs + k] = P::dot(acc[r][i * P::kRegs + k], weight[r], joined[k]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const V correction = V::set1(w.correction[row + r]), unit = V::set1(w.unit[row + r]);
    typename P::T* o = w.o + (row + r) * w.o_ld + col;
#pragma GCC unroll 16
    for (int i = 0; i < kSteps; ++i) {
      V sums[P::kRegs];
      P::in_order(acc[r] + i * P::kRegs, sums);
      for (int k = 0; k < P::kRegs; ++k, o += V::kLanes) fma(V::load(o), correction, sums[k] * unit).store(o);
    }
  }
}

template <class P, int kRows, int kSteps>
void weigh_columns(const WeightedSum<P>& w, int64_t row, int64_t col) {
  for (; col + kSteps * P::kColumns <= w.columns; col += kSteps * P::kColumns)
    weigh_tile<P, kRows, kSteps, true>(w, row, col, row == 0 ? w.next : nullptr);
  if constexpr (kSteps > 1)
    weigh_columns<P, kRows, kSteps / 2>(w, row, col);
  else if (col < w.columns)
    weigh_tile<P, kRows, 1, false>(w, row, col, row == 0 ? w.next : nullptr);
}

template <class P>
void weighted_sums(const WeightedSum<P>& w, int64_t m) {
  // accumulators of a tile: half of the registers
#if LMK_LANES == 16
  constexpr int kMost = 16 / P::kRegs;
#else
  constexpr int kMost = 8 / P::kRegs;
#endif
  int64_t row = 0;
  for (; row + 4 <= m; row += 4) weigh_columns<P, 4, kMost / 4>(w, row, 0);
  for (; row + 2 <= m; row += 2) weigh_columns<P, 2, kMost / 2>(w, row, 0);
  if (row < m) weigh_columns<P, 1, kMost>(w, row, 0);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
