// Vectors that may end early, after n elements, so that a row of any length is one loop. Included once per instruction
// set after elements.h, hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
