// For kernels that pass over rows of any length and dtype, several times. Included once per instruction set after
// rows.h and elements.h, hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class E>
__attribute__((noinline)) Vec<Acc<E>> load_some(const E* p, int64_t n, Acc<E> fill) {
  using V = Vec<Acc<E>>;
  Acc<E> lanes[V::kLanes];
  for (int64_t lane = 0; lane < V::kLanes; ++lane) lanes[lane] = lane < n ? widen(p[lane]) : fill;
  return V::load(lanes);
}

template <class E>
__attribute__((noinline)) void store_some(Vec<Acc<E>> x, int64_t n, E* p) {
  using V = Vec<Acc<E>>;
  Acc<E> lanes[V::kLanes];
  x.store(lanes);
  for (int64_t lane = 0; lane < n; ++lane) narrow(lanes[lane], p + lane);
}

// The n elements from p on; the lanes beyond them read as `fill`.
template <class E>
inline Vec<Acc<E>> load_up_to(const E* p, int64_t n, Acc<E> fill = 0) {
  return n >= Vec<Acc<E>>::kLanes ? load_vec(p) : load_some(p, n, fill);
}

// The lanes beyond n are not written.
template <class E>
inline void store_up_to(Vec<Acc<E>> x, int64_t n, E* p) {
  if (n >= Vec<Acc<E>>::kLanes)
    store_vec(x, p);
  else
    store_some(x, n, p);
}

// Fetches the line that vector number `u` of a pass begins, where it begins one.
template <class E>
inline void fetch_vec(const E* p, int u) {
  constexpr int64_t kBytes = Vec<Acc<E>>::kLanes * int64_t(sizeof(E));
  if (u * kBytes % 64 == 0) __builtin_prefetch(p);
}

constexpr int kUnroll = 4;  // independent sums hide the latency of an addition
// A sum grows by so many additions in the accumulator, and over these in double: a row of 50,000 is as exact as one of
// 768.
constexpr int64_t kAdditions = 32;
template <class V>
constexpr int64_t kBlock = kAdditions * kUnroll * V::kLanes;

template <class V>
struct Sums {
  V part[kUnroll];
};

template <class V>
inline Sums<V> no_sums() {
  return {{V::zero(), V::zero(), V::zero(), V::zero()}};
}

template <class V>
inline double total(const Sums<V>& s) {
  return double(reduce_add((s.part[0] + s.part[1]) + (s.part[2] + s.part[3])));
}

template <class E>
inline const E* row_of(const RowView& x, int64_t row) {
  return static_cast<const E*>(x.data) + row * x.stride;
}

// A row as elements E: in place where it is, else (16 bits beside float32) widened into the scratch.
template <class E>
const E* row_in_dtype(const RowView& x, int64_t row, int64_t cols, Acc<E>* scratch) {
  if (element_size(x.dtype) == sizeof(E)) return row_of<E>(x, row);
  load_row(x.dtype, row_of<uint16_t>(x, row), cols, scratch);
  return reinterpret_cast<const E*>(scratch);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
