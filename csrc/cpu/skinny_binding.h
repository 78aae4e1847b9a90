// torch's side of linear layers on few rows. Included by bindings.cpp.

#include "skinny.h"

namespace {

// What follows a product of x (rows, depth) that has `cols` columns, and the result (rows, cols), in the dtype of the
// residual or of x. x may be any floating tensor; residual must outlive the epilogue.
lmk::Epilogue epilogue_of(const Tensor& x, int64_t cols, const OptionalTensor& bias, const OptionalTensor& residual,
                          int64_t activation, Tensor& out) {
  lmk::Epilogue e{};
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == cols && bias->is_contiguous(),
                    "bias must be (out,)");
    check_wide(*bias, x);
    e.bias = bias->const_data_ptr(), e.bias_dtype = dtype_of(*bias);
  }
  if (residual) {
    STD_TORCH_CHECK(residual->dim() == 2 && residual->size(0) == x.size(0) && residual->size(1) == cols,
                    "residual must be (rows, out)");
    check_wide(*residual, x);
    e.residual = residual->const_data_ptr(), e.residual_row = residual->stride(0);
  }
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(lmk::Activation::tanh), "no such activation");
  e.activation = static_cast<lmk::Activation>(activation);
  out = new_tensor(x, {x.size(0), cols}, residual ? residual->scalar_type() : x.scalar_type());
  e.out = out.mutable_data_ptr(), e.out_row = cols, e.dtype = dtype_of(out);
  return e;
}

// Reading memory costs a core as much as this many operations per byte, by the measure of run_tasks.
constexpr double kFlopsPerByte = 2;

// Tasks that share a weight whose columns are neighbours in memory: few read long runs of it. No result depends on it.
int64_t column_tasks() { return std::clamp<int64_t>(2 * torch::stable::get_num_threads(), 4, 16); }

// The product of x (rows, depth), depth contiguous, with a weight of its dtype that is contiguous along either axis,
// and what follows it.
void run_skinny(const Tensor& x, const Tensor& weight, const lmk::Epilogue& epilogue) {
  lmk::SkinnyArgs a{};
  a.dtype = dtype_of(x);
  a.rows = x.size(0), a.depth = x.size(1), a.cols = weight.size(0);
  if (a.rows == 0 || a.cols == 0) return;
  a.x = x.const_data_ptr(), a.x_row = x.stride(0);
  a.transposed = weight.stride(1) != 1;
  a.weight = weight.const_data_ptr(), a.weight_row = weight.stride(a.transposed ? 1 : 0);
  a.epilogue = epilogue;
  a.streams = lmk::prefers_streams();

  const lmk::SkinnyKernels& kernels = lmk::skinny_kernels(a.dtype);
  const int64_t unit = kernels.packed_unit;
  std::optional<Tensor> packed;
  if (a.rows == 1 && a.depth % unit == 0 && kernels.packed_size == lmk::element_size(a.dtype)) {
    a.packed = a.x;
  } else {
    // an odd number of cache lines: rows a multiple of 4096 bytes apart would share the sets of the L1 cache
    const int64_t line = 64 / kernels.packed_size;
    a.packed_row = (a.depth + unit - 1) / unit * unit;
    a.packed_row = ((a.packed_row + line - 1) / line | 1) * line;
    packed = new_tensor(x, {a.rows * a.packed_row * kernels.packed_size}, ScalarType::Byte);
    a.packed = packed->mutable_data_ptr();
    for (int64_t r = 0; r < a.rows; ++r) kernels.pack_x(a, packed->mutable_data_ptr(), r);
  }

  // from the shape and the threads, although results depend on neither
  constexpr int64_t kTasks = 16, kLeastBytes = 64 * 1024;
  const int64_t threads = torch::stable::get_num_threads(), wanted = a.transposed ? column_tasks() : kTasks;
  const int64_t column_bytes = std::max<int64_t>(1, a.depth * lmk::element_size(a.dtype));
  const int64_t granule = a.transposed ? kernels.column_unit : lmk::kStreams;
  int64_t cols = std::max((a.cols + wanted - 1) / wanted, kLeastBytes / column_bytes);
  cols = (cols + granule - 1) / granule * granule;
  const int64_t tasks = (a.cols + cols - 1) / cols, size = lmk::element_size(a.dtype);
  const double work = std::max(2.0 * a.rows * a.cols * a.depth, kFlopsPerByte * a.cols * column_bytes);
  run_tasks(tasks, kernels.scratch(a, cols), work, [&](int64_t task, void* scratch) {
    lmk::SkinnyArgs own = a;
    if (const int64_t next = task + threads; next < tasks) {  // most likely
      const int64_t step = (a.transposed ? 1 : a.weight_row) * size;
      own.next = {static_cast<const char*>(a.weight) + next * cols * step, (a.transposed ? cols : a.depth) * size,
                  a.weight_row * size};
    }
    kernels.run(own, task * cols, std::min(cols, a.cols - task * cols), scratch);
  });
}

// activation(x weight^T + bias) + residual
Tensor skinny_linear_fwd(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias,
                         const OptionalTensor& residual_, int64_t activation) {
  check_weight(x_, weight_, bias);
  STD_TORCH_CHECK(weight_.scalar_type() == x_.scalar_type(), "weight must have the dtype of x");
  const Tensor x = dense_rows(x_), weight = dense_matrix(weight_);
  const OptionalTensor residual = residual_ ? OptionalTensor(dense_rows(*residual_)) : residual_;
  Tensor out = x;
  const lmk::Epilogue epilogue = epilogue_of(x, weight.size(0), bias, residual, activation, out);
  run_skinny(x, weight, epilogue);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) { m.impl("skinny_linear_fwd", TORCH_BOX(&skinny_linear_fwd)); }
