// torch's side of linear layers with quantised weights. Included by bindings.cpp after skinny_binding.h.

#include "quantize_weight.h"

namespace {

// activation(x weight^T + bias) + residual with a weight of (cols, depth) in `bits` bits; data and scales as in
// quantize_weight.h.
Tensor quantized_linear_fwd(const Tensor& x_, const Tensor& data, const Tensor& scales, int64_t cols, int64_t bits,
                            const OptionalTensor& bias, const OptionalTensor& residual_, int64_t activation) {
  const Tensor x = dense_rows(x_);
  const OptionalTensor residual = residual_ ? OptionalTensor(dense_rows(*residual_)) : residual_;
  STD_TORCH_CHECK(bits == 8 || bits == 4, "bits must be 8 or 4");
  lmk::QuantizedArgs a{};
  a.dtype = dtype_of(x);
  STD_TORCH_CHECK(a.dtype != lmk::DType::f64, "x must be float32, bfloat16 or float16");
  a.bits = int(bits);
  a.rows = x.size(0), a.depth = x.size(1), a.cols = cols;
  const auto blocks = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit; };
  const int64_t panels = blocks(cols, lmk::kPanelCols);
  a.padded = blocks(a.depth, lmk::kWeightGroup) * lmk::kWeightGroup;
  a.groups = bits == 4 ? blocks(a.padded, lmk::kWeightGroup) : std::max<int64_t>(1, blocks(a.padded, lmk::kByteGroup));
  STD_TORCH_CHECK(data.is_cpu() && data.is_contiguous() && data.scalar_type() == ScalarType::Byte &&
                      data.numel() == panels * lmk::kPanelCols * a.padded * bits / 8,
                  "data must be contiguous uint8 of the weight's size");
  STD_TORCH_CHECK(scales.is_cpu() && scales.is_contiguous() &&
                      scales.scalar_type() == (bits == 4 ? ScalarType::BFloat16 : ScalarType::Float) &&
                      scales.numel() == panels * lmk::kPanelCols * (bits == 4 ? a.groups : 1),
                  "scales must be contiguous, float32 per column (8 bits) or bfloat16 per group (4 bits)");
  a.x = x.const_data_ptr(), a.x_row = x.stride(0);
  a.data = static_cast<const uint8_t*>(data.const_data_ptr());
  a.scales = scales.const_data_ptr();
  Tensor out = x;
  a.epilogue = epilogue_of(x, cols, bias, residual, activation, out);
  if (out.numel() == 0) return out;

  a.levels_row = lmk::levels_row(a.depth);
  Tensor levels = new_tensor(x, {a.rows * a.levels_row}, ScalarType::Char);
  Tensor sums = new_tensor(x, {a.rows * (a.groups + 1)}, ScalarType::Int);
  a.levels = static_cast<int8_t*>(levels.mutable_data_ptr());
  a.sums = static_cast<int32_t*>(sums.mutable_data_ptr());
  a.x_scales = reinterpret_cast<float*>(a.sums + a.rows * a.groups);
  const lmk::QuantizedKernels& kernels = lmk::quantized_kernels();
  constexpr int64_t kPackedRows = 8;
  run_tasks(blocks(a.rows, kPackedRows), kernels.pack_scratch(a), 8.0 * a.rows * a.padded,
            [&](int64_t task, void* scratch) {
              for (int64_t row = task * kPackedRows; row < std::min(a.rows, (task + 1) * kPackedRows); ++row)
                kernels.pack_x(a, row, scratch);
            });

  constexpr int64_t kTasks = 16, kLeastBytes = 32 * 1024, kRowUnit = 32, kFewRows = 64;
  const int64_t panel_bytes = std::max<int64_t>(1, lmk::kPanelCols * a.padded * bits / 8);
  const int64_t row_blocks = blocks(a.rows, kernels.most_rows);
  a.rows_per_task = std::min(a.rows, blocks(blocks(a.rows, row_blocks), kRowUnit) * kRowUnit);
  a.panels_per_task = std::max(blocks(panels, kTasks), blocks(kLeastBytes, panel_bytes));
  if (a.rows > kFewRows) {  // columns that leave every thread two tasks or more
    const int64_t wanted = blocks(2 * torch::stable::get_num_threads(), row_blocks);
    a.panels_per_task = std::min(kernels.wide_panels, blocks(panels, wanted));
  }
  a.streams = lmk::prefers_streams();
  const int64_t unit = a.streams && bits == 8 && a.rows == 1 ? lmk::kStreams : kernels.tile_panels;
  a.panels_per_task = blocks(a.panels_per_task, unit) * unit;
  const int64_t tasks = blocks(a.rows, a.rows_per_task) * blocks(panels, a.panels_per_task);
  run_tasks(tasks, kernels.scratch(a), std::max<double>(2.0 * a.rows * a.cols * a.depth, kFlopsPerByte * data.numel()),
            [&](int64_t task, void* scratch) { kernels.run(a, task, scratch); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) { m.impl("quantized_linear_fwd", TORCH_BOX(&quantized_linear_fwd)); }
