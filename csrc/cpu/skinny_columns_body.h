// Weights (depth, cols) with contiguous columns, as GPT-2's checkpoints keep them: sums of rows. Included by
// skinny_body.h.
//
// A sum runs along 32 rows of the weight and then joins those before it. Columns are taken in panels of kColumnVecs
// vectors, so that a task reads each of the 32 rows in one run.

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t kColumnDepth = 32;

// Fetches runs of memory that are read next, a line of each of kStreams places in turn, or from one place.
struct RunWalk {
  const char* p = nullptr;
  int64_t run = 0, stride = 0, apart = 0, left = 0;  // bytes of a run, to the next, to the next place; runs of a place
  int64_t done = 0;                                  // of these bytes
  bool streams = false;

  RunWalk() = default;
  RunWalk(const Ahead& runs, int64_t count, bool streams)
      : p(runs.data), run(runs.run), stride(runs.stride), apart(count / kStreams * stride), streams(streams) {
    if (p) left = streams ? count / kStreams : count;
  }
  // `times` kStreams lines
  void fetch(int64_t times = 1) {
    for (; times > 0 && left > 0; --times) {
      for (int s = 0; s < kStreams; ++s) streams ? fetch_to_l1(p + s * apart + done) : fetch_to_l2(p + done + s * 64);
      done += streams ? 64 : kStreams * 64;
      if (done >= run) p += stride, done = 0, --left;
    }
  }
};

template <class M>
struct ColumnTile {
  const typename M::X* x;
  const typename M::Elem* w;
  int64_t x_row, w_row;
  int64_t depth;
  typename M::Acc* sums;  // (rows, sums_row)
  int64_t sums_row;
};

// sums[row][:] += x[row] * w, for a panel of columns; fetches as much as it reads.
template <class M, int kRows, bool kFetch>
[[gnu::noinline]] void column_tile(const ColumnTile<M>& t, RunWalk& ahead) {
  using V = typename M::V;
  constexpr int kLanes = V::kLanes;
  V acc[kRows][kColumnVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kColumnVecs; ++c) acc[r][c] = V::zero();
  const typename M::X* x = t.x;
  const typename M::Elem* w = t.w;
  const int64_t x_row = t.x_row, w_row = t.w_row;
  constexpr int64_t kStep = M::kPack * kColumnVecs * kLanes * int64_t(sizeof(typename M::Elem));  // bytes
  constexpr int64_t kEvery = kStreams * 64 / kStep * M::kPack;
  RunWalk walk = ahead;
  for (int64_t k = 0; k < t.depth; k += M::kPack) {
    if (kFetch && k % kEvery == 0) walk.fetch();
    typename M::W wv[kColumnVecs];
    M::load_columns(w, w_row, wv);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename M::W xv = M::broadcast_x(x + r * x_row);
#pragma GCC unroll 8
      for (int c = 0; c < kColumnVecs; ++c) acc[r][c] = M::dot(acc[r][c], wv[c], xv);
    }
    x += M::kPack, w += M::kPack * w_row;
  }
  if constexpr (kFetch) ahead = walk;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kColumnVecs; ++c) {
      typename M::Acc* p = t.sums + r * t.sums_row + c * kLanes;
      const V joined = V::load(p) + acc[r][c];
      joined.store(p);
    }
}

template <class M, bool kFetch>
void column_rows(int64_t rows, const ColumnTile<M>& t, RunWalk& ahead) {
  switch (rows) {
    case 1:
      return column_tile<M, 1, kFetch>(t, ahead);
    case 2:
      return column_tile<M, 2, kFetch>(t, ahead);
    case 3:
      return column_tile<M, 3, kFetch>(t, ahead);
    case 4:
      return column_tile<M, 4, kFetch>(t, ahead);
    case 5:
      return column_tile<M, 5, kFetch>(t, ahead);
    case 6:
      return column_tile<M, 6, kFetch>(t, ahead);
  }
}

// The same for a single row of x and a block of the depth, with the same bits: in the order of memory, which comes
// faster than panel by panel. cols: of whole panels; block (cols,): room for the sums of this block
template <class M>
void column_lines(const ColumnTile<M>& t, int64_t cols, Ahead next, typename M::Acc* block) {
  using V = typename M::V;
  constexpr int64_t kLanes = V::kLanes, kPanel = kColumnVecs * kLanes, kAtOnce = 2, kDistance = 8192;
  constexpr int64_t size = sizeof(typename M::Elem);
  const int64_t apart = round_up((kDistance + cols * size - 1) / (cols * size), kAtOnce);
  for (int64_t d = 0; d < t.depth; d += kAtOnce) {
    const typename M::Elem* w = t.w + d * t.w_row;
    const char* fetch[kAtOnce];
    for (int64_t i = 0; i < kAtOnce; ++i) {
      const int64_t row = d + i + apart;
      fetch[i] = row < t.depth ? reinterpret_cast<const char*>(t.w + row * t.w_row)
                               : next.data + (row - t.depth) * next.stride;
    }
    typename M::W x[kAtOnce / M::kPack];
#pragma GCC unroll 2
    for (int i = 0; i < kAtOnce / M::kPack; ++i) x[i] = M::broadcast_x(t.x + d + i * M::kPack);
    const bool first = d == 0, last = d + kAtOnce == t.depth;
    for (int64_t c = 0; c < cols; c += kPanel) {
      for (int64_t i = 0; i < kAtOnce; ++i)
        for (int64_t line = 0; line < kPanel * size; line += 64) fetch_to_l2(fetch[i] + c * size + line);
      V acc[kColumnVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kColumnVecs; ++v) acc[v] = first ? V::zero() : V::load(block + c + v * kLanes);
#pragma GCC unroll 2
      for (int i = 0; i < kAtOnce / M::kPack; ++i) {
        typename M::W wv[kColumnVecs];
        M::load_columns(w + i * M::kPack * t.w_row + c, t.w_row, wv);
#pragma GCC unroll 8
        for (int v = 0; v < kColumnVecs; ++v) acc[v] = M::dot(acc[v], wv[v], x[i]);
      }
      typename M::Acc* dst = last ? t.sums + c : block + c;
#pragma GCC unroll 8
      for (int v = 0; v < kColumnVecs; ++v) {
        if (last) acc[v] = V::load(dst + v * kLanes) + acc[v];
        acc[v].store(dst + v * kLanes);
      }
    }
  }
}

template <class M>
int64_t columns_scratch(const SkinnyArgs& a, int64_t cols) {
  constexpr int64_t kPanel = kColumnVecs * M::V::kLanes;
  return (a.rows + (a.rows == 1)) * round_up(cols, kPanel) * int64_t(sizeof(typename M::Acc)) +
         kColumnDepth * kPanel * int64_t(sizeof(typename M::Elem));
}

template <class M>
void run_columns(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  using T = typename M::Acc;
  using Elem = typename M::Elem;
  constexpr int64_t kPanel = kColumnVecs * M::V::kLanes;
  const int64_t ld = round_up(cols, kPanel), tiles = (a.rows + kColumnRows - 1) / kColumnRows;
  T *sums = static_cast<T*>(scratch), *block = sums + a.rows * ld;
  Elem* padded = reinterpret_cast<Elem*>(block + (a.rows == 1) * ld);
  const Elem* weight = static_cast<const Elem*>(a.weight) + first;
  for (int64_t i = 0; i < a.rows * ld; ++i) sums[i] = T(0);
  for (int64_t k = 0; k < a.depth; k += kColumnDepth) {
    const int64_t depth = a.depth - k < kColumnDepth ? a.depth - k : kColumnDepth;
    const int64_t size = sizeof(Elem), run = ld * size, later = k + kColumnDepth;
    RunWalk ahead({reinterpret_cast<const char*>(weight + later * a.weight_row), run, a.weight_row * size},
                  a.depth - later < kColumnDepth ? a.depth - later : kColumnDepth, a.streams);
    if (later >= a.depth) ahead = RunWalk(a.next, kColumnDepth, a.streams);
    int64_t c = 0;
    if (a.rows == 1 && depth % 2 == 0 && cols >= kPanel) {
      const bool more = k + kColumnDepth < a.depth || !a.next.data;
      const Elem* w = weight + k * a.weight_row;
      const Ahead next{reinterpret_cast<const char*>(w + depth * a.weight_row), run, a.weight_row * size};
      c = cols / kPanel * kPanel;
      column_lines<M>({static_cast<const typename M::X*>(a.packed) + k, w, a.packed_row, a.weight_row, depth, sums, ld},
                      c, more ? next : a.next, block);
    }
    for (; c < cols; c += kPanel) {
      ColumnTile<M> t{static_cast<const typename M::X*>(a.packed) + k,
                      weight + k * a.weight_row + c,
                      a.packed_row,
                      a.weight_row,
                      depth,
                      sums + c,
                      ld};
      if (c + kPanel > cols || depth % M::kPack) {  // zeros where there is no weight
        for (int64_t d = 0; d < round_up(depth, M::kPack); ++d)
          for (int64_t i = 0; i < kPanel; ++i)
            padded[d * kPanel + i] = d < depth && c + i < cols ? t.w[d * t.w_row + i] : Elem(0);
        t.w = padded, t.w_row = kPanel;
      }
      for (int64_t i = 0, r = 0; i < tiles; ++i) {
        const int64_t rows = (a.rows - r + tiles - i - 1) / (tiles - i);
        if (i == 0)
          column_rows<M, true>(rows, t, ahead);
        else
          column_rows<M, false>(rows, t, ahead);
        r += rows, t.x += rows * t.x_row, t.sums += rows * ld;
      }
    }
  }
  for (int64_t r = 0; r < a.rows; ++r) {
    M::order_columns(sums + r * ld, ld);
    finish_row(a.epilogue, r, first, cols, sums + r * ld);
  }
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
