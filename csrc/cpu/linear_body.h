// Linear layers for one instruction set; included by linear.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "activation_body.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "epilogue_body.h"
#include "matmul.h"

namespace lmk {
namespace LMK_NS {
namespace {

// Rotates the leading elements of a head by the angles of its position; sign -1 rotates back.
template <class T>
void rotate_head(const HeadSplit& s, int64_t position, T sign, T* x) {
  const int64_t half = s.rotated / 2;
  const T* cos = reinterpret_cast<const T*>(s.cos) + position * half;
  const T* sin = reinterpret_cast<const T*>(s.sin) + position * half;
  if (s.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const T even = x[2 * i], odd = x[2 * i + 1], rise = sign * sin[i];
      x[2 * i] = even * cos[i] - odd * rise;
      x[2 * i + 1] = odd * cos[i] + even * rise;
    }
    return;
  }
  T* y = x + half;
  for (int64_t i = 0; i < half; ++i) {
    const T first = x[i], second = y[i], rise = sign * sin[i];
    x[i] = first * cos[i] - second * rise;
    y[i] = second * cos[i] + first * rise;
  }
}

// Where head `head` of a row of the product lies in its own tensor.
inline char* head_data(const HeadSplit& s, DType dtype, int64_t row, int64_t head) {
  const int64_t kv = head - s.heads;
  void* const base = kv < 0 ? s.q : kv < s.heads_kv ? s.k : s.v;
  const int64_t count = kv < 0 ? s.heads : s.heads_kv;
  const int64_t index = kv < 0 ? head : kv % s.heads_kv;
  return static_cast<char*>(base) + (row * count + index) * s.head_dim * element_size(dtype);
}

inline int64_t position_of(const HeadSplit& s, int64_t row) {
  const int64_t p = s.positions ? s.positions[row] : row % s.seq;
  return p < 0 ? 0 : p < s.table ? p : s.table - 1;
}

template <class T>
struct Finish {
  const LinearArgs& args;
  int64_t col, cols;

  void operator()(int64_t row, int64_t n, T* c, int64_t c_ld) const {
    for (int64_t r = 0; r < n; ++r) {
      if (args.split.q)
        split_row(row + r, c + r * c_ld);
      else
        finish_row(args.end, row + r, col, cols, c + r * c_ld);
    }
  }

  void bring(int64_t row, int64_t n, LinesAhead& ahead) const {
    const Epilogue& e = args.end;
    const auto rows = [&](const void* data, int64_t stride, DType dtype, bool for_write) {
      const int64_t size = element_size(dtype);
      if (data)
        ahead.add(static_cast<const char*>(data) + (row * stride + col) * size, n, cols * size, stride * size,
                  for_write);
    };
    rows(e.gate, e.out_row, e.pre_dtype, false);
    rows(e.residual, e.residual_row, e.dtype, false);
    rows(e.pre, e.out_row, e.pre_dtype, true);
    rows(e.out, e.out_row, e.dtype, true);
    const HeadSplit& s = args.split;
    int64_t from = -col;
    for (void* part : {s.q, s.k, s.v}) {
      const int64_t width = (part == s.q ? s.heads : s.heads_kv) * s.head_dim, size = element_size(e.dtype);
      const int64_t first = from < 0 ? -from : 0, last = width < cols - from ? width : cols - from;
      if (part)
        ahead.add(static_cast<char*>(part) + (row * width + first) * size, n, (last - first) * size, width * size,
                  true);
      from += width;
    }
  }

  // Parts of heads occur only where nothing is rotated.
  void split_row(int64_t row, T* c) const {
    const HeadSplit& s = args.split;
    const Epilogue& e = args.end;
    if (e.bias) add_row(e.bias_dtype, static_cast<const char*>(e.bias) + col * element_size(e.bias_dtype), cols, c);
    for (int64_t i = 0; i < cols;) {
      const int64_t head = (col + i) / s.head_dim, from = (col + i) % s.head_dim;
      const int64_t n = s.head_dim - from < cols - i ? s.head_dim - from : cols - i;
      if (s.cos && head < s.heads + s.heads_kv) rotate_head(s, position_of(s, row), T(1), c + i);
      store_row(e.dtype, c + i, n, head_data(s, e.dtype, row, head) + from * element_size(e.dtype));
      i += n;
    }
  }
};

template <class M>
int64_t linear_scratch(const LinearArgs& a) {
  Arena arena(nullptr);
  MatmulScratch<M>(a.rows_per_task, a.cols_per_task, a.depth, arena);
  return arena.used();
}

// Empty for a task beyond the last.
inline Block block_of(const LinearArgs& a, int64_t task) {
  const int64_t across = (a.cols + a.cols_per_task - 1) / a.cols_per_task;
  const int64_t row = task / across * a.rows_per_task, col = task % across * a.cols_per_task;
  if (row >= a.rows) return {};
  return {row, a.rows - row < a.rows_per_task ? a.rows - row : a.rows_per_task, col,
          a.cols - col < a.cols_per_task ? a.cols - col : a.cols_per_task};
}

template <class M>
void linear_matmul(const LinearArgs& a, int64_t task, void* scratch) {
  const Block block = block_of(a, task);
  Arena arena(scratch);
  const MatmulScratch<M> w(block.rows, block.cols, a.depth, arena);
  const Finish<typename M::Acc> finish{a, block.col, block.cols};
  if constexpr (kBySplit<M>)
    matmul_split(a.a, a.b, block, a.depth, w, finish);
  else
    matmul<M>(a.a, a.b, block, block_of(a, task + a.tasks_apart), a.depth, w, finish);
}

// A part of a row of ActivationArgs. sum (columns,) is added to.
template <class E, class D>
struct ActivationRow {
  Activation activation;
  const D* dout;
  const E *pre, *gate;
  E *dpre, *dgate, *out;
  Acc<E>* sum;

  void vector(int64_t i) const {
    using V = Vec<Acc<E>>;
    V d = load_vec(dout + i);
    // before any store: all rows may lie at the same place of a page, and then a load waits for the stores before it
    const V total = sum ? V::load(sum + i) : V::zero();
    if (gate) {
      const V p = load_vec(pre + i);
      const auto active = activated<Acc<E>, kRounds<E>>(activation, load_vec(gate + i));
      if (out) store_vec(active.value * p, out + i);
      if (dgate) store_vec(d * p * active.slope, dgate + i);
      d = d * active.value;
    } else if (pre) {
      const auto active = activated<Acc<E>, kRounds<E>>(activation, load_vec(pre + i));
      if (out) store_vec(active.value, out + i);
      d = d * active.slope;
    }
    if (dpre) store_vec(d, dpre + i);
    if (sum) (total + d).store(sum + i);
  }

  // Fewer columns than a vector has, by way of whole vectors.
  void rest(int64_t i, int64_t n) const {
    constexpr int64_t kLanes = Vec<Acc<E>>::kLanes;
    const size_t bytes = size_t(n) * sizeof(E);
    D douts[kLanes] = {};
    E pres[kLanes] = {}, gates[kLanes] = {}, dpres[kLanes], dgates[kLanes], outs[kLanes];
    Acc<E> sums[kLanes] = {};
    memcpy(douts, dout + i, size_t(n) * sizeof(D));
    if (pre) memcpy(pres, pre + i, bytes);
    if (gate) memcpy(gates, gate + i, bytes);
    ActivationRow{activation, douts, pre ? pres : nullptr, gate ? gates : nullptr, dpres, dgates, outs, sums}.vector(0);
    if (dpre) memcpy(dpre + i, dpres, bytes);
    if (dgate) memcpy(dgate + i, dgates, bytes);
    if (out) memcpy(out + i, outs, bytes);
    for (int64_t c = 0; sum && c < n; ++c) sum[i + c] += sums[c];
  }
};

template <class E, class D>
void activation_block(const ActivationArgs& a, int64_t task) {
  using T = Acc<E>;
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const int64_t strips = (a.cols + kActivationCols - 1) / kActivationCols;
  const int64_t row = task / strips * kActivationRows, col = task % strips * kActivationCols;
  const int64_t end = row + kActivationRows < a.rows ? row + kActivationRows : a.rows;
  const int64_t n = a.cols - col < kActivationCols ? a.cols - col : kActivationCols;
  T* const sum = a.partial ? static_cast<T*>(a.partial) + task / strips * a.cols + col : nullptr;
  for (int64_t i = 0; sum && i < n; ++i) sum[i] = 0;
  for (int64_t r = row; r < end; ++r) {
    const auto part = [&](auto* base) { return base ? base + r * a.cols + col : nullptr; };
    const ActivationRow<E, D> x{a.activation,
                                static_cast<const D*>(a.dout) + r * a.dout_row + col,
                                part(static_cast<const E*>(a.pre)),
                                part(static_cast<const E*>(a.gate)),
                                part(static_cast<E*>(a.dpre)),
                                part(static_cast<E*>(a.dgate)),
                                part(static_cast<E*>(a.out)),
                                sum};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) x.vector(i);
    if (i < n) x.rest(i, n - i);
  }
}

template <class T>
void activation_task(const ActivationArgs& a, int64_t task) {
  if constexpr (sizeof(T) == 8)
    activation_block<double, double>(a, task);
  else if (a.dtype == DType::f32)
    activation_block<float, float>(a, task);
  else if (a.dtype == DType::bf16 && a.dout_dtype == DType::f32)
    activation_block<Bf16, float>(a, task);
  else if (a.dtype == DType::bf16)
    activation_block<Bf16, Bf16>(a, task);
  else if (a.dout_dtype == DType::f32)
    activation_block<F16, float>(a, task);
  else
    activation_block<F16, F16>(a, task);
}

// Sums of blocks of rows join a double.
template <class T>
void sum_blocks(const ActivationArgs& a, int64_t task) {
  const int64_t col = task * kActivationCols, blocks = (a.rows + kActivationRows - 1) / kActivationRows;
  const int64_t n = a.cols - col < kActivationCols ? a.cols - col : kActivationCols;
  double total[kActivationCols] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const T* sum = static_cast<const T*>(a.partial) + block * a.cols + col;
    for (int64_t i = 0; i < n; ++i) total[i] += double(sum[i]);
  }
  for (int64_t i = 0; i < n; ++i) static_cast<T*>(a.dbias)[col + i] = T(total[i]);
}

// One row; kJoin: from the heads to the product.
template <class T, bool kJoin>
void move_row(const JoinArgs& a, int64_t row) {
  const HeadSplit& s = a.split;
  const int64_t heads = s.heads + 2 * s.heads_kv, size = element_size(a.dtype), bytes = s.head_dim * size;
  constexpr int64_t kLargest = 1024;
  T x[kLargest];
  char* product = static_cast<char*>(a.product) + row * heads * bytes;
  for (int64_t head = 0; head < heads; ++head, product += bytes) {
    char* own = head_data(s, a.dtype, row, head);
    char *const to = kJoin ? product : own, *const from = kJoin ? own : product;
    if (s.cos && head < s.heads + s.heads_kv) {
      load_row(a.dtype, from, s.head_dim, x);
      rotate_head(s, position_of(s, row), T(kJoin ? -1 : 1), x);
      store_row(a.dtype, x, s.head_dim, to);
    } else {
      memcpy(to, from, bytes);
    }
  }
}

template <class M>
constexpr LinearKernels linear_of(int64_t packed_bytes, int64_t most_depth = kMatmulDepth<M> * M::kPack) {
  using T = typename M::Acc;
  // tiles multiply so fast that to pack B once, for all rows, and to read A a few times is worth more than even shares
  constexpr bool kTiles = kByTiles<M>;
  constexpr TaskShare kShare = kTiles ? TaskShare{384, 1} : TaskShare{192, 4};
  return {.accumulator_size = sizeof(T),
          .row_unit = kTiles ? 32 : kTileRows,
          .most_rows = kTiles ? 1152 : 576,
          .least_cols = kTiles ? 192 : 128,
          .share = kShare,
          .share_packing_a = kTiles ? kShare : TaskShare{768, 2},
          .most_depth = most_depth,
          .packed_bytes = packed_bytes,
          .scratch = linear_scratch<M>,
          .matmul = linear_matmul<M>,
          .activation = activation_task<T>,
          .sum_blocks = sum_blocks<T>,
          .split = move_row<T, false>,
          .join = move_row<T, true>};
}

// Where there are tiles, of so many parts to an element.
template <int kParts>
constexpr LinearKernels linear_of_float() {
#if LMK_TILES
  return linear_of<MathSplit<kParts>>(2 * kParts, kSplitDepth);
#else
  return linear_of<MathFma<float>>(sizeof(float));
#endif
}

// One row per DType, in its order.
constexpr LinearKernels kLinear[] = {linear_of_float<3>(), linear_of<MathForBf16>(LMK_BF16_DOT ? 2 : 4),
                                     linear_of_float<2>(), linear_of<MathFma<double>>(sizeof(double))};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
