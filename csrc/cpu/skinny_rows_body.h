// Weights (cols, depth) with contiguous depth: dot products of rows. Included by skinny_body.h.
//
// The sum of a block of the depth is one vector, which joins those before it; a tree adds its lanes at the end. Blocks
// keep sums exact, and weights and x in the L1 cache while more rows than one tile holds pass by.

namespace lmk {
namespace LMK_NS {
namespace {

// out (4,): the sums of the lanes of a, b, c and d
template <class T>
void reduce_four(const Vec<T> (&v)[4], T* out) {
#if LMK_LANES == 16
  if constexpr (sizeof(T) == 4) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0].v, v[1].v), _mm512_unpackhi_ps(v[0].v, v[1].v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2].v, v[3].v), _mm512_unpackhi_ps(v[2].v, v[3].v));
    const __m512 four = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    return;
  }
#elif LMK_LANES == 8
  if constexpr (sizeof(T) == 4) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0].v, v[1].v), _mm256_unpackhi_ps(v[0].v, v[1].v));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2].v, v[3].v), _mm256_unpackhi_ps(v[2].v, v[3].v));
    const __m256 four = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) out[i] = reduce_add(v[i]);
}

template <class M>
struct DotTile {
  const typename M::X* x;
  const typename M::Elem* w;
  int64_t x_row, w_row;
  int64_t steps;          // registers of depth
  typename M::Acc* sums;  // (rows, kDotCols) vectors, between blocks of the depth
  typename M::Acc* product;
  int64_t product_row;
  bool first, last;               // block of the depth
  const typename M::Elem* fetch;  // weights to fetch meanwhile, in the order of memory where rows are contiguous
};

// product[row][col] = x[row] * w[col]
template <class M, int kRows, int kCols, int kFetch>
[[gnu::noinline]] void dot_tile(const DotTile<M>& t) {
  using V = typename M::V;
  constexpr int kLanes = V::kLanes;
  V acc[kRows][kCols];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) acc[r][c] = V::zero();
  const typename M::X* x = t.x;
  const typename M::Elem *w = t.w, *fetch = t.fetch;
  const int64_t x_row = t.x_row, w_row = t.w_row;
  for (int64_t s = t.steps; s > 0; --s) {
#pragma GCC unroll 8
    for (int c = 0; c < kFetch; ++c) fetch_to_l2(fetch + c * M::kDepth);
    typename M::W wv[kCols];
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) wv[c] = M::load(w + c * w_row);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename M::W xv = M::load_x(x + r * x_row);
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) acc[r][c] = M::dot(acc[r][c], wv[c], xv);
    }
    x += M::kDepth, w += M::kDepth, fetch += kFetch * M::kDepth;
  }
  if (!t.first) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) acc[r][c] = V::load(t.sums + (r * kDotCols + c) * kLanes) + acc[r][c];
  }
  if (t.last) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      V four[4];
#pragma GCC unroll 8
      for (int c = 0; c < 4; ++c) four[c] = c < kCols ? acc[r][c < kCols ? c : 0] : V::zero();
      reduce_four(four, t.product + r * t.product_row);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) acc[r][c].store(t.sums + (r * kDotCols + c) * kLanes);
  }
}

template <class M, int kCols, int kFetch>
void dot_rows(int64_t rows, const DotTile<M>& t) {
  switch (rows) {
    case 1:
      return dot_tile<M, 1, kCols, kFetch>(t);
    case 2:
      return dot_tile<M, 2, kCols, kFetch>(t);
    case 3:
      return dot_tile<M, 3, kCols, kFetch>(t);
#if LMK_LANES == 16
    case 4:
      return dot_tile<M, 4, kCols, kFetch>(t);
    case 5:
      return dot_tile<M, 5, kCols, kFetch>(t);
    case 6:
      return dot_tile<M, 6, kCols, kFetch>(t);
#endif
  }
}

// All rows of x with one block of the depth of kCols rows of the weight. The tiles share the fetching of kDotCols rows
// from `fetch` on.
template <class M, int kCols>
void dot_block(const SkinnyArgs& a, DotTile<M> t) {
  const int64_t tiles = (a.rows + kDotRows - 1) / kDotRows;
  for (int64_t i = 0, r = 0, fetched = kCols < kDotCols ? kDotCols : 0; i < tiles; ++i) {
    const int64_t rows = (a.rows - r + tiles - i - 1) / (tiles - i);
    const int64_t share = (kDotCols - fetched + tiles - i - 1) / (tiles - i);
    if (share == 0)
      dot_rows<M, kCols, 0>(rows, t);
    else if (share == 1)
      dot_rows<M, kCols, 1>(rows, t);
    else if (share == 2)
      dot_rows<M, kCols, 2>(rows, t);
    else
      dot_rows<M, kCols, 4>(rows, t);
    r += rows, fetched += share;
    t.x += rows * t.x_row;
    t.sums += rows * kDotCols * M::V::kLanes;
    t.product += rows * t.product_row;
    t.fetch += share * t.steps * M::kDepth;
  }
}

// product (rows, kCols) = x times kCols rows of the weight; `fetch` is what the next ones read
template <class M, int kCols>
void dot_columns(const SkinnyArgs& a, const typename M::Elem* w, const typename M::Elem* fetch, typename M::Acc* sums,
                 typename M::Acc* product, int64_t product_row) {
  constexpr int64_t kBlock = 2048 / sizeof(typename M::Elem);
  const typename M::X* x = static_cast<const typename M::X*>(a.packed);
  const int64_t whole = a.depth / M::kDepth * M::kDepth;
  DotTile<M> t{x, w, a.packed_row, a.weight_row, 0, sums, product, product_row, true, false, nullptr};
  if (whole < a.depth || whole == 0) {  // the rest that fills no register comes first
    typename M::Elem padded[kCols * M::kDepth] = {};
    for (int c = 0; c < kCols; ++c)
      for (int64_t k = whole; k < a.depth; ++k) padded[c * M::kDepth + k - whole] = w[c * a.weight_row + k];
    t.x = x + whole, t.w = padded, t.w_row = M::kDepth, t.steps = whole < a.depth, t.last = whole == 0;
    t.fetch = padded;
    dot_block<M, kCols>(a, t);
    t.w_row = a.weight_row, t.first = false;
  }
  for (int64_t k = 0; k < whole; k += kBlock) {
    const int64_t depth = whole - k < kBlock ? whole - k : kBlock;
    t.x = x + k, t.w = w + k, t.fetch = fetch + kCols * k, t.steps = depth / M::kDepth, t.last = k + depth == whole;
    dot_block<M, kCols>(a, t);
    t.first = false;
  }
}

// sum (kRows,) = a row of the weight times kRows rows of x, with the bits of a tile, in the order of memory: from there
// a core takes one stream half as fast again as four. fetch: a row that is read some kilobytes later
template <class M, int kRows>
inline void dot_row(const SkinnyArgs& a, const typename M::Elem* w, const typename M::Elem* fetch,
                    typename M::V (&sum)[kRows]) {
  using V = typename M::V;
  constexpr int64_t kBlock = 2048 / sizeof(typename M::Elem);
  const typename M::X* x = static_cast<const typename M::X*>(a.packed);
  const int64_t whole = a.depth / M::kDepth * M::kDepth, x_row = a.packed_row;
  bool first = true;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = V::zero();
  if (whole < a.depth) {
    typename M::Elem padded[M::kDepth] = {};
    for (int64_t k = whole; k < a.depth; ++k) padded[k - whole] = w[k];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = M::dot(sum[r], M::load(padded), M::load_x(x + r * x_row + whole));
    first = false;
  }
  for (int64_t k = 0; k < whole; k += kBlock) {
    const int64_t end = whole - k < kBlock ? whole : k + kBlock;
    V acc[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) acc[r] = V::zero();
#pragma GCC unroll 4
    for (int64_t i = k; i < end; i += M::kDepth) {
      fetch_to_l2(fetch + i);
      const typename M::W wv = M::load(w + i);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r] = M::dot(acc[r], wv, M::load_x(x + r * x_row + i));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = first ? acc[r] : sum[r] + acc[r];
    first = false;
  }
}

// product (kRows, cols) = x times rows of the weight
template <class M, int kRows>
void dot_in_order(const SkinnyArgs& a, const typename M::Elem* w, int64_t cols, typename M::Acc* product,
                  int64_t product_row) {
  using Elem = typename M::Elem;
  const int64_t bytes = a.weight_row * int64_t(sizeof(Elem)), apart = (kDistance + bytes - 1) / bytes;
  const Elem* next = reinterpret_cast<const Elem*>(a.next.data);
  for (int64_t c = 0; c < cols; c += 4) {
    typename M::V sums[4][kRows];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t row = c + i, later = row + apart;
      const Elem* fetch = later < cols || !next ? w + later * a.weight_row : next + (later - cols) * a.weight_row;
      if (row < cols)
        dot_row<M, kRows>(a, w + row * a.weight_row, fetch, sums[i]);
      else
        for (int r = 0; r < kRows; ++r) sums[i][r] = M::V::zero();
    }
    for (int r = 0; r < kRows; ++r) {
      const typename M::V four[4] = {sums[0][r], sums[1][r], sums[2][r], sums[3][r]};
      reduce_four(four, product + r * product_row + c);
    }
  }
}

template <class M>
void dot_few(const SkinnyArgs& a, const typename M::Elem* w, int64_t cols, typename M::Acc* product,
             int64_t product_row) {
  switch (a.rows) {
    case 1:
      return dot_in_order<M, 1>(a, w, cols, product, product_row);
    case 2:
      return dot_in_order<M, 2>(a, w, cols, product, product_row);
    case 3:
      return dot_in_order<M, 3>(a, w, cols, product, product_row);
#if LMK_LANES == 16
    case 4:
      return dot_in_order<M, 4>(a, w, cols, product, product_row);
    case 5:
      return dot_in_order<M, 5>(a, w, cols, product, product_row);
    case 6:
      return dot_in_order<M, 6>(a, w, cols, product, product_row);
#endif
  }
}

// For a single row of x, the same with the same bits, from kStreams places of memory in turn, each of which gives
// `cols` rows.
template <class M>
[[gnu::noinline]] void dot_streams(const SkinnyArgs& a, const typename M::Elem* w, int64_t cols,
                                   typename M::Acc* product) {
  using V = typename M::V;
  constexpr int64_t kBlock = 2048 / sizeof(typename M::Elem);
  const typename M::X* x = static_cast<const typename M::X*>(a.packed);
  const int64_t whole = a.depth / M::kDepth * M::kDepth, stream = cols * a.weight_row;
  for (int64_t c = 0; c < cols; ++c, w += a.weight_row) {
    V sum[kStreams];
    bool first = true;
    if (whole < a.depth) {
      for (int s = 0; s < kStreams; ++s) {
        typename M::Elem padded[M::kDepth] = {};
        for (int64_t k = whole; k < a.depth; ++k) padded[k - whole] = w[s * stream + k];
        sum[s] = M::dot(V::zero(), M::load(padded), M::load_x(x + whole));
      }
      first = false;
    }
    for (int64_t k = 0; k < whole; k += kBlock) {
      const int64_t end = whole - k < kBlock ? whole : k + kBlock;
      V acc[kStreams];
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) acc[s] = V::zero();
      for (int64_t i = k; i < end; i += M::kDepth) {
        const typename M::W xv = M::load_x(x + i);
#pragma GCC unroll 8
        for (int s = 0; s < kStreams; ++s) acc[s] = M::dot(acc[s], M::load(w + s * stream + i), xv);
      }
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) sum[s] = first ? acc[s] : sum[s] + acc[s];
      first = false;
    }
    for (int s = 0; s < kStreams; s += 4) {
      typename M::Acc four[4];
      const V some[4] = {sum[s], sum[s + 1], sum[s + 2], sum[s + 3]};
      reduce_four(some, four);
      for (int i = 0; i < 4; ++i) product[(s + i) * cols + c] = four[i];
    }
  }
}

constexpr int64_t kFewBytes = 24 * 1024;

// A tile writes kDotCols columns, one that has a single column too; finish_row wants whole vectors.
inline int64_t product_row(int64_t cols) { return round_up(cols + kDotCols - 1, 16); }

template <class M>
int64_t rows_scratch(const SkinnyArgs& a, int64_t cols) {
  return a.rows * (kDotCols * M::V::kLanes + product_row(cols)) * int64_t(sizeof(typename M::Acc));
}

template <class M>
void run_rows(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  using T = typename M::Acc;
  T *sums = static_cast<T*>(scratch), *product = sums + a.rows * kDotCols * M::V::kLanes;
  const int64_t ld = product_row(cols);
  const typename M::Elem* w = static_cast<const typename M::Elem*>(a.weight) + first * a.weight_row;
  int64_t c = 0;
  if (a.rows == 1 && a.streams && cols >= kStreams) {
    c = cols / kStreams * kStreams;
    dot_streams<M>(a, w, cols / kStreams, product);
  }
  // several pass a row of the weight together as long as all of x stays in the L1 cache
  const bool few = a.rows <= kDotRows && a.rows * a.packed_row * int64_t(sizeof(typename M::X)) <= kFewBytes;
  if (a.rows == 1 || (few && !a.streams)) {
    dot_few<M>(a, w + c * a.weight_row, cols - c, product + c, ld);
    c = cols;
  }
  for (; c + kDotCols <= cols; c += kDotCols) {
    const typename M::Elem *tile = w + c * a.weight_row, *fetch = tile + kDotCols * a.weight_row;
    if (c + 2 * kDotCols > cols && a.next.data) fetch = reinterpret_cast<const typename M::Elem*>(a.next.data);
    dot_columns<M, kDotCols>(a, tile, fetch, sums, product + c, ld);
  }
  for (; c < cols; ++c) {
    const typename M::Elem* column = w + c * a.weight_row;
    dot_columns<M, 1>(a, column, column, sums, product + c, ld);
  }
  for (int64_t r = 0; r < a.rows; ++r) finish_row(a.epilogue, r, first, cols, product + r * ld);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
