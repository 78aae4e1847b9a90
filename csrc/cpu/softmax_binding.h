// torch's side of softmax: checks, allocates, runs the kernels. Included by bindings.cpp.

#include "softmax.h"

namespace {

constexpr double kSoftmaxWork = 12;  // of an element, in units of run_tasks

// wide: a float32 result of 16-bit x
Tensor softmax_fwd(const Tensor& x, bool wide) {
  OptionalTensor copy;
  lmk::SoftmaxArgs a{};
  a.x = row_view(x, copy);
  const lmk::DType dtype = wide ? lmk::DType::f32 : a.x.dtype;
  STD_TORCH_CHECK(!wide || lmk::element_size(a.x.dtype) == 2, "a wide result is for x of 16 bits");
  Tensor y = new_tensor(x, x.sizes(), wide ? ScalarType::Float : x.scalar_type());
  if (y.numel() == 0) return y;
  a.cols = last_size(x);
  a.out = y.mutable_data_ptr();
  const lmk::SoftmaxKernels& kernels = lmk::softmax_kernels(dtype);
  const int64_t rows = x.numel() / a.cols, part = rows_per_task(rows, a.cols);
  run_tasks(
      (rows + part - 1) / part, kernels.scratch_per_column * a.cols, kSoftmaxWork * double(y.numel()),
      [&](int64_t task, void* scratch) { kernels.fwd(a, task * part, std::min(rows, (task + 1) * part), scratch); });
  return y;
}

// dx in the dtype of y
Tensor softmax_bwd(const Tensor& dy, const Tensor& y) {
  OptionalTensor copies[2];
  lmk::SoftmaxArgs a{};
  a.dy = row_view(dy, copies[0]);
  a.y = row_view(y, copies[1]);
  STD_TORCH_CHECK(same_shape(dy, y) && a.dy.dtype == a.y.dtype, "dy must have the shape and dtype of y");
  Tensor dx = new_tensor(y, y.sizes());
  if (dx.numel() == 0) return dx;
  a.cols = last_size(y);
  a.out = dx.mutable_data_ptr();
  const lmk::SoftmaxKernels& kernels = lmk::softmax_kernels(a.y.dtype);
  const int64_t rows = y.numel() / a.cols, part = rows_per_task(rows, a.cols);
  run_tasks((rows + part - 1) / part, 0, kSoftmaxWork * double(dx.numel()), [&](int64_t task, void* scratch) {
    kernels.bwd(a, task * part, std::min(rows, (task + 1) * part), scratch);
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
}
