// Large matrix products C (rows, cols) = A (rows, depth) * B (depth, cols), block by block: B is packed once per task,
// A is read where it lies or packed by blocks of rows, and sums stay in scratch memory until an epilogue takes them.
// Meanwhile what is read and written next is brought into the caches.
// Included once per instruction set after rows.h, hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

inline const void* at(const Matrix& x, int64_t line, int64_t p) {
  return static_cast<const char*>(x.data) + (line * x.line_stride + p * x.depth_stride) * element_size(x.dtype);
}

constexpr int64_t kMatmulRows = 96;  // rows of A that are taken at once; a multiple of kTileRows
// Rows that share a pass over the packed B. Two tiles of them stay in the L1 and L2 caches, as do their sums.
template <class M>
constexpr int64_t kPassRows = kByTiles<M> ? 2 * kTileSide : kMatmulRows;
// Elements of the depth that are packed at once. Sums that pause lie in memory: where tiles multiply, that costs more
// than to read all of B from the L2 cache.
template <class M>
constexpr int64_t kMatmulDepth = kByTiles<M> ? 1536 : 384;

// The depth that is multiplied at once, in elements: whole tiles, of which the rest is zero.
template <class M>
int64_t depth_elements(int64_t n) {
  const int64_t elements = (n + M::kPack - 1) / M::kPack;
  return kByTiles<M> ? round_up(elements, 16) : elements;
}

// Lines that lie pages apart are not fetched ahead by the CPU: brings in the one that is packed so many lines later.
[[gnu::always_inline]] inline void fetch_line(const Matrix& x, int64_t line, int64_t p, int64_t lines) {
  constexpr int64_t kAhead = 8;
  const char* data = static_cast<const char*>(at(x, line, p + kAhead));
  for (int64_t i = 0; i < lines * element_size(x.dtype); i += 64) __builtin_prefetch(data + i);
}

template <class M>
struct MatmulScratch {
  using E = typename M::Elem;
  int64_t vecs, c_ld;
  E *b, *a, *buffer;
  typename M::Acc* c;
  MatmulScratch() = default;
  MatmulScratch(int64_t rows, int64_t cols, int64_t depth, Arena& arena) {
    constexpr int64_t kLanes = M::V::kLanes;
    vecs = (cols + kLanes - 1) / kLanes;
    c_ld = vecs * kLanes;
    const int64_t elements =
        round_up(depth < kMatmulDepth<M> * M::kPack ? (depth + M::kPack - 1) / M::kPack : kMatmulDepth<M>, 16);
    const int64_t block = rows < kMatmulRows ? rows : kMatmulRows;
    b = arena.take<E>(round_up(c_ld, panel_of<M>()) * elements);
    a = arena.take<E>(round_up(block, 16) * a_ld(elements));
    buffer = arena.take<E>(kLanes * elements);
    c = arena.take<typename M::Acc>((depth <= kMatmulDepth<M> * M::kPack ? kPassRows<M> : rows) * c_ld);
  }

  // Elements from one packed row of A to the next: whole vectors, and no multiple of what an L1 cache holds in a way.
  static int64_t a_ld(int64_t elements) { return round_up(elements, 16) + (kByTiles<M> ? 16 : 0); }
};

// Packs columns [col, col + cols) of B over [k, k + n). Sets the strides of B in g.
template <class M>
void pack_b(const Matrix& b, int64_t col, int64_t cols, int64_t k, int64_t n, const MatmulScratch<M>& w,
            GemmArgs<M>& g) {
  constexpr int64_t kPanel = panel_of<M>();
  const int64_t elements = depth_elements<M>(n), filled = (n + M::kPack - 1) / M::kPack;
  g.b = w.b;
  g.b_depth = kPanel;
  g.b_panel = kPanel * elements;
  if (b.depth_stride == 1) {
    const void* lines[kPanel];
    for (int64_t c = 0; c < cols; c += kPanel) {
      const int64_t have = cols - c < kPanel ? cols - c : kPanel;
      for (int64_t i = 0; i < have; ++i) lines[i] = at(b, col + c + i, k);
      pack_columns<M>(b.dtype, lines, have, n, w.b + c * elements, w.buffer);
      for (int64_t p = filled * kPanel; p < elements * kPanel; ++p) w.b[c * elements + p] = 0;
    }
    return;
  }
  // by tiles the lines of a panel should be neighbours, or their reading crosses a page every few lines
  const int64_t width = kByTiles<M> ? kPanel : w.c_ld;
  if (!kByTiles<M>) g.b_depth = w.c_ld, g.b_panel = kPanel;
  for (int64_t p = 0; p < n; p += M::kPack) {
    const int64_t have = n - p < M::kPack ? n - p : M::kPack;
    for (int64_t i = 0; i < M::kPack; ++i) fetch_line(b, col, k + p + i, cols);
    for (int64_t c = 0; c < cols; c += width) {
      const void* lines[2] = {at(b, col + c, k + p), at(b, col + c, k + p + 1)};
      pack_depth<M>(b.dtype, lines, have, cols - c < width ? cols - c : width,
                    w.b + c * elements + p / M::kPack * width, width);
    }
  }
  for (int64_t c = 0; c < cols; c += width)
    for (int64_t p = filled * width; p < elements * width; ++p) w.b[c * elements + p] = 0;
}

#if LMK_TILES
// Rows [row, row + rows) of A, whose columns lie in memory, over [k, k + n): (elements / kTileSide, rows, kTileSide).
inline void turn_a(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t n, int64_t elements, uint32_t* dst) {
  uint32_t part[kTileSide * kMatmulRows];
  const int64_t ld = round_up(rows, kTileSide);
  for (int64_t p = 0; p < elements; p += kTileSide, dst += ld * kTileSide) {
    for (int64_t i = 0; i < kTileSide; ++i) {
      const int64_t q = 2 * (p + i), have = n - q < 2 ? n - q : 2;
      if (have <= 0) {
        for (int64_t r = 0; r < ld; ++r) part[i * ld + r] = 0;
        continue;
      }
      const void* lines[2] = {at(a, row, k + q), at(a, row, k + q + 1)};
      for (int64_t l = 0; l < have; ++l) fetch_line(a, row, k + q + l, rows);
      pack_depth<MathBf16>(a.dtype, lines, have, rows, part + i * ld, ld);
    }
    turn(part, ld, rows, kTileSide, dst, kTileSide);
  }
}
#endif

// Rows [row, row + rows) of A over [k, k + n) as the A of a product: where they lie, or packed.
template <class M>
void take_a(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t n, const MatmulScratch<M>& w,
            GemmArgs<M>& g) {
  using E = typename M::Elem;
  const int64_t elements = depth_elements<M>(n);
  g.a = w.a;
  g.a_depth = 1;
  if (a.depth_stride == 1) {
    const bool in_place = element_size(a.dtype) * M::kPack == int64_t(sizeof(E)) && n == elements * M::kPack &&
                          a.line_stride % M::kPack == 0;
    // the lines of a tile must not all fall on one set of the L1 cache
    const bool one_set = kByTiles<M> && a.line_stride * element_size(a.dtype) % 4096 == 0;
    if (in_place && !one_set) {
      g.a = static_cast<const E*>(at(a, row, k));
      g.a_row = a.line_stride / M::kPack;
      return;
    }
    const int64_t ld = w.a_ld(elements);
    for (int64_t i = 0; i < rows; ++i) {
      const void* line = at(a, row + i, k);
      pack_rows<M>(a.dtype, &line, 1, n, w.a + i * ld, ld);
    }
    g.a_row = ld;
    return;
  }
#if LMK_TILES
  if constexpr (kByTiles<M>) {
    turn_a(a, row, rows, k, n, elements, w.a);
    g.a_row = kTileSide;
    g.a_step = round_up(rows, kTileSide) * kTileSide;
    return;
  }
#endif
  const int64_t ld = round_up(rows, 16);
  for (int64_t p = 0; p < n; p += M::kPack) {
    const void* lines[2] = {at(a, row, k + p), at(a, row, k + p + 1)};
    for (int64_t i = 0; i < M::kPack; ++i) fetch_line(a, row, k + p + i, rows);
    pack_depth<M>(a.dtype, lines, n - p < M::kPack ? n - p : M::kPack, rows, w.a + p / M::kPack * ld, ld);
  }
  g.a_row = 1;
  g.a_depth = ld;
}

// Of lines [line, line + lines) over [k, k + n): the given one of so many shares.
inline void bring(const Matrix& x, int64_t line, int64_t lines, int64_t k, int64_t n, int64_t share, int64_t shares,
                  LinesAhead& ahead) {
  const int64_t size = element_size(x.dtype);
  const bool along = x.depth_stride == 1;
  const int64_t count = along ? lines : n, stride = (along ? x.line_stride : x.depth_stride) * size;
  const int64_t first = count * share / shares, last = count * (share + 1) / shares;
  ahead.add(static_cast<const char*>(at(x, line, k)) + first * stride, last - first, (along ? n : lines) * size,
            stride);
}

// A part of C.
struct Block {
  int64_t row, rows, col, cols;
};

// The part `block` of C. epilogue(row, n, c, c_ld) takes the sums c (n, cols), rows of whole vectors, of rows
// [row, row + n), and may change them; if it has bring(row, n, ahead), that adds the memory it will touch. `next` is
// what this thread will probably compute then, empty if unknown.
template <class M, class Epilogue>
void matmul(const Matrix& a, const Matrix& b, const Block& block, const Block& next, int64_t depth,
            const MatmulScratch<M>& w, const Epilogue& epilogue) {
  const auto [row, rows, col, cols] = block;
  GemmArgs<M> g{};
  LinesAhead ahead;
  g.ahead = &ahead;
  g.c_row = w.c_ld;
  const int64_t most = kMatmulDepth<M> * M::kPack, parts = (depth + most - 1) / most;
  const bool even = kByTiles<M> && parts > 1;
  const int64_t step = even ? round_up((depth + parts - 1) / parts, 2 * kTileSide) : most;
  // packed rows of A should leave room for B in the L2 cache; columns are worth packing many at once
  const int64_t take = a.depth_stride == 1 ? kPassRows<M> : kMatmulRows;
  const int64_t passes = (rows + kPassRows<M> - 1) / kPassRows<M>;
  const auto up_to = [](int64_t n, int64_t most) { return n < most ? n : most; };
  for (int64_t k = 0; k == 0 || k < depth; k += step) {
    const int64_t n = up_to(depth - k, step);
    const bool last = k + step >= depth;
    // what comes after this part of the depth
    const Block& then = last ? next : block;
    const int64_t k_then = last ? 0 : k + step, n_then = up_to(depth - k_then, step);
    pack_b<M>(b, col, cols, k, n, w, g);
    g.depth = depth_elements<M>(n);
    for (int64_t taken = 0; taken < rows; taken += take) {
      const int64_t count = up_to(rows - taken, take);
      take_a<M>(a, row + taken, count, k, n, w, g);
      for (int64_t i = 0; i < count; i += kPassRows<M>) {
        const int64_t r = taken + i, have = up_to(count - i, kPassRows<M>);
        g.c = depth <= most ? w.c : w.c + r * w.c_ld;
        if constexpr (!kByTiles<M>) {
          ahead.clear();
          bring(b, then.col, then.cols, k_then, n_then, r / kPassRows<M>, passes, ahead);
          if (taken + take < rows)
            bring(a, row + taken + take, up_to(rows - taken - take, take), k, n, 0, 1, ahead);
          else
            bring(a, then.row, up_to(then.rows, take), k_then, n_then, 0, 1, ahead);
          if constexpr (requires { epilogue.bring(row, have, ahead); })
            if (last) epilogue.bring(row + r, have, ahead);
        }
        if (k == 0)
          gemm<M, Start::zero, !kByTiles<M>>(g, have, w.vecs);
        else
          gemm<M, Start::add, !kByTiles<M>>(g, have, w.vecs);
        if (last) epilogue(row + r, have, g.c, w.c_ld);
        g.a += kPassRows<M> * g.a_row;
      }
    }
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#include "matmul_split.h"
