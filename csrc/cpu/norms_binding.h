// torch's side of layer norm and RMS norm: checks, allocates, runs the kernels. Included by bindings.cpp.

#include "norms.h"

namespace {

lmk::NormVector norm_vector(const OptionalTensor& x, int64_t cols, OptionalTensor& copy) {
  if (!x) return {};
  STD_TORCH_CHECK(x->is_cpu() && x->dim() == 1 && x->size(0) == cols, "weight and bias must be (d,)");
  if (!x->is_contiguous()) copy = torch::stable::contiguous(*x);
  return {(copy ? *copy : *x).const_data_ptr(), dtype_of(*x)};
}

// In units of run_tasks: an element takes a fifth of a nanosecond in the cache.
double norm_work(const lmk::NormArgs& a) { return 6.0 * double(a.rows) * double(a.cols); }

// y; then s with a residual; then, for the backward, rstd and, where one is subtracted, the mean. A list, because
// making a tensor that nobody reads costs a microsecond.
std::vector<Tensor> norm_fwd(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                             const OptionalTensor& bias, double eps, bool center, bool for_backward) {
  OptionalTensor copies[4];
  lmk::NormArgs a{};
  a.x = row_view(x, copies[0]);
  a.dtype = a.x.dtype;
  if (residual) {
    STD_TORCH_CHECK(same_shape(x, *residual), "residual must have x's shape");
    a.residual = row_view(*residual, copies[1]);
    if (a.residual.dtype == lmk::DType::f32) a.dtype = lmk::DType::f32;
    for (const lmk::DType dtype : {a.x.dtype, a.residual.dtype})
      STD_TORCH_CHECK(dtype == a.dtype || (a.dtype == lmk::DType::f32 && lmk::element_size(dtype) == 2),
                      "x and residual must have one dtype, or 16 bits and float32");
  }
  a.cols = last_size(x);
  a.rows = a.cols ? x.numel() / a.cols : 0;
  a.weight = norm_vector(weight, a.cols, copies[2]);
  a.bias = norm_vector(bias, a.cols, copies[3]);
  a.eps = eps;
  const Tensor& like = residual && a.dtype != a.x.dtype ? *residual : x;
  const auto lead = x.sizes().slice(0, x.dim() - 1);
  std::vector<Tensor> results{new_tensor(like, x.sizes())};
  a.y = results.back().mutable_data_ptr();
  if (residual) {
    results.push_back(new_tensor(like, x.sizes()));
    a.s = results.back().mutable_data_ptr();
  }
  if (for_backward) {
    results.push_back(new_tensor(x, lead, accumulator(x)));
    a.rstd = results.back().mutable_data_ptr();
    if (center) {
      results.push_back(new_tensor(x, lead, accumulator(x)));
      a.mean = results.back().mutable_data_ptr();
    }
  }
  if (a.rows == 0) {
    if (a.rstd) torch::stable::zero_(results.back());
    return results;
  }

  const lmk::NormKernels& kernels = (center ? lmk::layer_norm_kernels : lmk::rms_norm_kernels)(a.dtype);
  const int64_t per_task = rows_per_task(a.rows, a.cols);
  run_tasks((a.rows + per_task - 1) / per_task, kernels.scratch(a), norm_work(a), [&](int64_t task, void* scratch) {
    kernels.fwd(a, task * per_task, std::min(a.rows, (task + 1) * per_task), scratch);
  });
  return results;
}

// dx, then dweight and dbias where wanted.
std::vector<Tensor> norm_bwd(const Tensor& dy, const OptionalTensor& ds, const Tensor& s, const Tensor& rstd,
                             const OptionalTensor& mean, const OptionalTensor& weight, const OptionalTensor& bias,
                             bool need_dweight, bool need_dbias) {
  OptionalTensor copies[5];
  lmk::NormArgs a{};
  a.dy = row_view(dy, copies[0]);
  a.sum = row_view(s, copies[1]);
  if (ds) a.ds = row_view(*ds, copies[2]);
  a.dtype = a.sum.dtype;
  STD_TORCH_CHECK(same_shape(dy, s) && a.dy.dtype == a.dtype && (!ds || (same_shape(*ds, s) && a.ds.dtype == a.dtype)),
                  "dy and ds must have the shape and dtype of s");
  a.cols = last_size(s);
  a.rows = a.cols ? s.numel() / a.cols : 0;
  a.weight = norm_vector(weight, a.cols, copies[3]);
  a.bias = norm_vector(bias, a.cols, copies[4]);
  for (const Tensor* x : {&rstd, mean ? &*mean : &rstd})
    STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == accumulator(s) && x->is_contiguous() &&
                        (x->numel() == a.rows || a.rows == 0),
                    "mean and rstd must be contiguous, of the accumulator's dtype, one for each row");
  a.rstd = const_cast<void*>(rstd.const_data_ptr());
  a.mean = mean ? const_cast<void*>(mean->const_data_ptr()) : nullptr;

  need_dweight &= weight.has_value(), need_dbias &= bias.has_value();
  std::vector<Tensor> results{new_tensor(s, s.sizes())};
  a.dx = results.back().mutable_data_ptr();
  if (need_dweight) {
    results.push_back(new_tensor(*weight, {a.cols}));
    a.dweight = results.back().mutable_data_ptr();
  }
  if (need_dbias) {
    results.push_back(new_tensor(*bias, {a.cols}));
    a.dbias = results.back().mutable_data_ptr();
  }
  if (a.rows == 0) {
    for (Tensor& x : results) torch::stable::zero_(x);
    return results;
  }
  // Chunks, and with them the order of the sums, depend on the shape alone. Each costs two rows of memory.
  constexpr int64_t kMostChunks = 64, kLeastRows = 16;
  a.chunk_rows = std::max(kLeastRows, (a.rows + kMostChunks - 1) / kMostChunks);
  a.chunks = (a.rows + a.chunk_rows - 1) / a.chunk_rows;
  OptionalTensor partial;
  if (need_dweight || need_dbias) {
    partial = new_tensor(s, {a.chunks, 2, a.cols}, accumulator(s));
    a.partial = partial->mutable_data_ptr();
  }
  const lmk::NormKernels& kernels = (mean ? lmk::layer_norm_kernels : lmk::rms_norm_kernels)(a.dtype);
  run_tasks(a.chunks, kernels.scratch(a), 2 * norm_work(a),
            [&](int64_t chunk, void* scratch) { kernels.bwd(a, chunk, scratch); });
  if (partial) {
    constexpr int64_t kColumns = 256;
    run_tasks((a.cols + kColumns - 1) / kColumns, 0, 4.0 * double(a.chunks * a.cols), [&](int64_t task, void*) {
      kernels.bwd_finish(a, task * kColumns, std::min(a.cols, (task + 1) * kColumns));
    });
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("norm_fwd", TORCH_BOX(&norm_fwd));
  m.impl("norm_bwd", TORCH_BOX(&norm_bwd));
}
