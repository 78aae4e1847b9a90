// The functions of micro.h for one instruction set; included by micro.cpp through foreach_isa.h.

#include "quantize_weight_body.h"  // and with it vec.h, vecmath.h, activation_body.h, gemm.h and rows.h
#include "philox.h"

namespace lmk {
namespace LMK_NS {
namespace {

// run(vector...) over arrays, a vector at a time; the last one is filled up with zeros.
template <class T, class Run>
void over_vectors(const Run& run, int64_t n, T* y) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  for (int64_t i = 0; i < n; i += kLanes) {
    T lanes[kLanes];
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    run(i, count).store(lanes);
    memcpy(y + i, lanes, size_t(count) * sizeof(T));
  }
}

template <class T>
Vec<T> load_lanes(const T* x, int64_t count) {
  T lanes[Vec<T>::kLanes] = {};
  memcpy(lanes, x, size_t(count) * sizeof(T));
  return Vec<T>::load(lanes);
}

template <class T, class Op>
struct Unary {
  const T* x;
  Vec<T> operator()(int64_t i, int64_t count) const { return Op::apply(load_lanes(x + i, count)); }
  static void run(const T* x, int64_t n, T* y) { over_vectors(Unary{x}, n, y); }
};

template <class T, class Op>
struct Binary {
  const T *a, *b;
  Vec<T> operator()(int64_t i, int64_t count) const {
    return Op::apply(load_lanes(a + i, count), load_lanes(b + i, count));
  }
  static void run(const T* a, const T* b, int64_t n, T* y) { over_vectors(Binary{a, b}, n, y); }
};

#define LMK_UNARY(function_)        \
  struct function_##_op {           \
    template <class T>              \
    static Vec<T> apply(Vec<T> x) { \
      return function_(x);          \
    }                               \
  };
#define LMK_BINARY(function_)                 \
  struct function_##_op {                     \
    template <class T>                        \
    static Vec<T> apply(Vec<T> a, Vec<T> b) { \
      return function_(a, b);                 \
    }                                         \
  };
LMK_UNARY(exp)
LMK_UNARY(tanh)
LMK_UNARY(round_small)
#if LMK_BF16_DOT
LMK_UNARY(exp_bf16)
LMK_UNARY(exp2)
#endif
LMK_BINARY(max)
LMK_BINARY(min)
LMK_BINARY(scale_by_power)
#undef LMK_UNARY
#undef LMK_BINARY

struct less_op {
  template <class T>
  static Vec<T> apply(Vec<T> a, Vec<T> b) {
    return select_less(a, b, Vec<T>::set1(T(1)), Vec<T>::zero());
  }
};

template <class T, bool kRounded = false>
struct Activate {
  Activation activation;
  bool grad;
  const T* x;
  Vec<T> operator()(int64_t i, int64_t count) const {
    const Vec<T> v = load_lanes(x + i, count);
    return grad ? activate_grad<T, kRounded>(activation, v) : activate<T, kRounded>(activation, v);
  }
  static void run(Activation activation, const T* x, int64_t n, T* y) {
    over_vectors(Activate{activation, false, x}, n, y);
  }
  static void run_grad(Activation activation, const T* x, int64_t n, T* y) {
    over_vectors(Activate{activation, true, x}, n, y);
  }
};

template <class T>
T reduce_add_of(const T* x) {
  return reduce_add(Vec<T>::load(x));
}
template <class T>
T reduce_max_of(const T* x) {
  return reduce_max(Vec<T>::load(x));
}

template <class T>
constexpr MicroVectors<T> vectors_of() {
  return {Vec<T>::kLanes,
          {{"exp", Unary<T, exp_op>::run},
           {"tanh", Unary<T, tanh_op>::run},
           {"round_small", Unary<T, round_small_op>::run}},
          {{"max", Binary<T, max_op>::run},
           {"min", Binary<T, min_op>::run},
           {"less", Binary<T, less_op>::run},
           {"scale_by_power", Binary<T, scale_by_power_op>::run}},
          reduce_add_of<T>,
          reduce_max_of<T>,
          Activate<T>::run,
          Activate<T>::run_grad,
          nullptr,
          nullptr,
          log_row,
          load_row<T>,
          store_row<T>};
}

constexpr MicroVectors<float> vectors_of_float() {
  MicroVectors<float> vectors = vectors_of<float>();
#if LMK_BF16_DOT
  vectors.unary[3] = {"exp_bf16", Unary<float, exp_bf16_op>::run};
  vectors.unary[4] = {"exp2", Unary<float, exp2_op>::run};
  vectors.activate_bf16 = Activate<float, true>::run;
  vectors.activate_grad_bf16 = Activate<float, true>::run_grad;
#endif
  return vectors;
}

template <class M>
struct Products {
  using E = typename M::Elem;
  using Acc = typename M::Acc;

  static void multiply(const GemmCall& c) {
    const GemmArgs<M> args{
        static_cast<const E*>(c.a), c.a_row, c.a_depth, static_cast<const E*>(c.b),       c.b_depth, c.b_panel,
        static_cast<Acc*>(c.c),     c.c_row, c.depth,   static_cast<const Acc*>(c.factor)};
    switch (static_cast<Start>(c.start)) {
      case Start::zero:
        return gemm<M, Start::zero>(args, c.rows, c.vecs);
      case Start::add:
        return gemm<M, Start::add>(args, c.rows, c.vecs);
      case Start::scale_and_add:
        return gemm<M, Start::scale_and_add>(args, c.rows, c.vecs);
    }
  }
  static void rows(DType dtype, const void* const* rows, int64_t n, int64_t n_cols, void* dst, int64_t ld) {
    pack_rows<M>(dtype, rows, n, n_cols, static_cast<E*>(dst), ld);
  }
  static void depth(DType dtype, const void* const* rows, int64_t n, int64_t n_cols, void* dst, int64_t ld) {
    pack_depth<M>(dtype, rows, n, n_cols, static_cast<E*>(dst), ld);
  }
  static void columns(DType dtype, const void* const* rows, int64_t n, int64_t n_cols, void* dst, void* buffer) {
    pack_columns<M>(dtype, rows, n, n_cols, static_cast<E*>(dst), static_cast<E*>(buffer));
  }
  static constexpr MicroProducts table = {M::V::kLanes, multiply, rows, depth, columns};
};

// As byte_tile and nibble_tile go through one group of weights.
template <int kBits>
void integer_dot(const float* x, float factor, const uint8_t* weights, float* y) {
  using I = Integers<kBits>;
  constexpr int kSteps = kWeightGroup / 4, kBytes = LMK_LANES * 4;
  int8_t levels[kWeightGroup];
  round_to_levels(x, factor, kWeightGroup, levels);
  typename I::Sum sum = I::zero();
  if constexpr (kBits == 4)
    for (int i = 0; i < kSteps / 2; ++i) {
      const typename I::W w = I::load(weights + i * kBytes);
      sum = I::step(sum, I::low(w), four_levels(levels + 4 * i));
      sum = I::step(sum, I::high(w), four_levels(levels + 4 * i + kWeightGroup / 2));
    }
  else
    for (int i = 0; i < kSteps; ++i) sum = I::step(sum, I::load(weights + i * kBytes), four_levels(levels + 4 * i));
  I::value(sum, sum_of_levels(levels, kWeightGroup)).store(y);
}

constexpr Micro kMicro[] = {{
    vectors_of_float(),
    vectors_of<double>(),
    Products<MathFma<float>>::table,
    Products<MathFma<double>>::table,
#if LMK_BF16_DOT
    Products<MathBf16>::table,
#else
    {},
#endif
    kTileVecs,
#if LMK_LANES >= 8
    transpose_tile,
#else
    nullptr,
#endif
#if LMK_BF16_DOT
    MathBf16::pack_row,
    MathBf16::pack_row_pair,
#else
    nullptr,
    nullptr,
#endif
    to_bf16,
    to_f16,
    from_f16,
    {integer_dot<8>, integer_dot<4>},
    philox,
}};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
