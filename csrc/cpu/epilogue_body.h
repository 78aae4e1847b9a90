// out = activation(product + bias) + residual on a part of a row, and what the activation was applied to. Included once
// per instruction set after rows.h and activation_body.h, hence no include guard.

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

// What finish_row does without a gate where all tensors hold T, in whole vectors: a single pass.
template <class T>
void finish_vectors(const Epilogue& e, int64_t row, int64_t col, int64_t n, const T* product) {
  using V = Vec<T>;
  const int64_t at = row * e.out_row + col;
  T *out = static_cast<T*>(e.out) + at, *pre = e.pre ? static_cast<T*>(e.pre) + at : nullptr;
  const T* bias = e.bias ? static_cast<const T*>(e.bias) + col : nullptr;
  const T* residual = e.residual ? static_cast<const T*>(e.residual) + row * e.residual_row + col : nullptr;
  for (int64_t i = 0; i < n; i += V::kLanes) {
    V x = V::load(product + i);
    if (bias) x = x + V::load(bias + i);
    if (pre) x.store(pre + i);
    if (e.activation != Activation::none) x = activate<T>(e.activation, x);
    if (residual) x = x + V::load(residual + i);
    x.store(out + i);
    __builtin_prefetch(out + 4 * e.out_row + i, 1, 3);  // rows lie pages apart
  }
}

// product: n elements of a row of the product from column `col` on, which are overwritten, and room for whole vectors.
template <class T>
void finish_row(const Epilogue& e, int64_t row, int64_t col, int64_t n, T* product) {
  const int64_t size = element_size(e.dtype);
  const auto holds_t = [](DType dtype) { return element_size(dtype) == int64_t(sizeof(T)); };
  if (!e.gate && n % Vec<T>::kLanes == 0 && holds_t(e.dtype) && (!e.pre || holds_t(e.pre_dtype)) &&
      (!e.bias || holds_t(e.bias_dtype)))
    return finish_vectors(e, row, col, n, product);
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
