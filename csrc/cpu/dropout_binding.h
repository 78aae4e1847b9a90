// torch's side of dropout: checks, allocates, runs the kernel. Included by bindings.cpp.

#include "dropout.h"

namespace {

// In the order of lmk::DType.
constexpr ScalarType kScalarTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};

// The dtype of the result has a place in lmk::DType's order.
Tensor dropout(const Tensor& x_, const OptionalTensor& residual_, int64_t dropped, int64_t seed, int64_t dtype) {
  STD_TORCH_CHECK(dtype >= 0 && dtype < 4 && dropped >= 0 && dropped < lmk::kDropoutSteps && x_.is_cpu(),
                  "x must be on the CPU, dropped in [0, 2^16) and dtype that of a floating tensor");
  const Tensor x = x_.is_contiguous() ? x_ : torch::stable::contiguous(x_);
  lmk::DropoutArgs a{};
  a.x_dtype = dtype_of(x), a.dtype = static_cast<lmk::DType>(dtype);
  const bool wider = lmk::element_size(a.x_dtype) + lmk::element_size(a.dtype) == 6;  // 16 bits and float32
  STD_TORCH_CHECK(a.x_dtype == a.dtype || wider, "x and the result must have one dtype, or 16 bits and float32");
  OptionalTensor residual = residual_;
  if (residual) {
    STD_TORCH_CHECK(same_shape(x, *residual) && dtype_of(*residual) == a.dtype,
                    "residual must have x's shape and the dtype of the result");
    if (!residual->is_contiguous()) residual = torch::stable::contiguous(*residual);
    a.residual = residual->const_data_ptr();
  }
  Tensor out = new_tensor(x, x.sizes(), kScalarTypes[dtype]);
  a.x = x.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.seed = uint64_t(seed), a.dropped = int32_t(dropped);
  constexpr int64_t kPart = 64 * lmk::kDropoutUnit;
  const int64_t n = x.numel();
  run_tasks((n + kPart - 1) / kPart, 0, 10.0 * double(n),
            [&](int64_t task, void*) { lmk::dropout_kernel()(a, task * kPart, std::min(n, (task + 1) * kPart)); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }
