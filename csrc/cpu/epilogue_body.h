// out = activation(product + bias) + residual on a part of a row, and what the activation was applied to. Included once
// per instruction set after elements.h and activation_body.h, hence no include guard.

namespace lmk {
namespace LMK_NS {
namespace {

// dst (n,) += src (n,) in any dtype
template <class T>
void add_row(DType dtype, const void* src, int64_t n, T* dst) {
  constexpr int64_t kPart = 64;
  T part[kPart];
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t have = n - i < kPart ? n - i : kPart;
    load_row(dtype, static_cast<const char*>(src) + i * element_size(dtype), have, part);
    for (int64_t l = 0; l < have; ++l) dst[i + l] += part[l];
  }
}

// dst (n,) *= activation(gate (n,))
template <class T>
void gate_row(Activation activation, DType dtype, const void* gate, int64_t n, T* dst) {
  constexpr int64_t kPart = 64;
  T part[kPart];
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t have = n - i < kPart ? n - i : kPart;
    load_row(dtype, static_cast<const char*>(gate) + i * element_size(dtype), have, part);
    for (int64_t l = have; l % Vec<T>::kLanes; ++l) part[l] = 0;
    for (int64_t l = 0; l < have; l += Vec<T>::kLanes) activate<T>(activation, Vec<T>::load(part + l)).store(part + l);
    for (int64_t l = 0; l < have; ++l) dst[i + l] *= part[l];
  }
}

// What finish_row does without a gate in whole vectors: a single pass. All tensors hold E, the bias B.
template <class E, class B>
void finish_vectors(const Epilogue& e, int64_t row, int64_t col, int64_t n, const Acc<E>* product) {
  using V = Vec<Acc<E>>;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t at = row * e.out_row + col;
  E *out = static_cast<E*>(e.out) + at, *pre = e.pre ? static_cast<E*>(e.pre) + at : nullptr;
  const B* bias = e.bias ? static_cast<const B*>(e.bias) + col : nullptr;
  const E* residual = e.residual ? static_cast<const E*>(e.residual) + row * e.residual_row + col : nullptr;
  const auto finished = [&](int64_t i) __attribute__((always_inline)) {
    V x = V::load(product + i);
    if (bias) x = x + load_vec(bias + i);
    if (pre) store_vec(x, pre + i);
    if (e.activation != Activation::none) x = activate<Acc<E>, kRounds<E>>(e.activation, x);
    return residual ? x + load_vec(residual + i) : x;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const V one = finished(i), other = finished(i + kLanes);
    store_pair(one, other, out + i);
    __builtin_prefetch(out + 4 * e.out_row + i, 1, 3);  // rows lie pages apart
  }
  if (i < n) store_vec(finished(i), out + i);
}

// Whether finish_vectors has done it.
inline bool finishes_vectors(const Epilogue& e, int64_t row, int64_t col, int64_t n, const double* product) {
  return finish_vectors<double, double>(e, row, col, n, product), true;
}
inline bool finishes_vectors(const Epilogue& e, int64_t row, int64_t col, int64_t n, const float* product) {
  const bool alike = !e.bias || e.bias_dtype == e.dtype, single = e.bias_dtype == DType::f32;
  if (e.dtype == DType::f32 && alike) return finish_vectors<float, float>(e, row, col, n, product), true;
  if (e.dtype == DType::bf16 && alike) return finish_vectors<Bf16, Bf16>(e, row, col, n, product), true;
  if (e.dtype == DType::bf16 && single) return finish_vectors<Bf16, float>(e, row, col, n, product), true;
  if (e.dtype == DType::f16 && alike) return finish_vectors<F16, F16>(e, row, col, n, product), true;
  if (e.dtype == DType::f16 && single) return finish_vectors<F16, float>(e, row, col, n, product), true;
  return false;
}

// product: n elements of a row of the product from column `col` on, which are overwritten, and room for whole vectors.
template <class T>
void finish_row(const Epilogue& e, int64_t row, int64_t col, int64_t n, T* product) {
  const int64_t size = element_size(e.dtype);
  if (!e.gate && n % Vec<T>::kLanes == 0 && (!e.pre || e.pre_dtype == e.dtype) &&
      finishes_vectors(e, row, col, n, product))
    return;
  if (e.bias) add_row(e.bias_dtype, static_cast<const char*>(e.bias) + col * element_size(e.bias_dtype), n, product);
  const int64_t inner = (row * e.out_row + col) * element_size(e.pre_dtype);
  if (e.pre) store_row(e.pre_dtype, product, n, static_cast<char*>(e.pre) + inner);
  if (e.gate)
    gate_row(e.activation, e.pre_dtype, static_cast<const char*>(e.gate) + inner, n, product);
  else if (e.activation != Activation::none)
    for (int64_t i = 0; i < n; i += Vec<T>::kLanes)
      activate<T>(e.activation, Vec<T>::load(product + i)).store(product + i);
  if (e.residual)
    add_row(e.dtype, static_cast<const char*>(e.residual) + (row * e.residual_row + col) * size, n, product);
  store_row(e.dtype, product, n, static_cast<char*>(e.out) + (row * e.out_row + col) * size);
}

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
