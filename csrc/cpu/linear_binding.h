// torch's side of linear layers: checks, allocates, runs the kernels. Included by bindings.cpp.

#include "linear.h"

namespace {

// A matrix with unit stride on one of its axes, as rows of A or as columns of B.
lmk::Matrix lines_of(const Tensor& x, int64_t line_axis) {
  return {x.const_data_ptr(), x.stride(line_axis), x.stride(1 - line_axis), dtype_of(x)};
}

// Whether an axis has stride 1 and no rows overlap.
bool is_dense_matrix(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2, "expected a CPU tensor of 2 axes");
  return (x.stride(1) == 1 && x.stride(0) >= x.size(1)) || (x.stride(0) == 1 && x.stride(1) >= x.size(0));
}

Tensor dense_matrix(const Tensor& x) { return is_dense_matrix(x) ? x : torch::stable::contiguous(x); }

Tensor dense_rows(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2, "expected a CPU tensor of 2 axes");
  return x.stride(1) == 1 && x.stride(0) >= x.size(1) ? x : torch::stable::contiguous(x);
}

// Blocks of C, as large as leaves a few for every thread: what is packed serves a whole block.
void choose_blocks(lmk::LinearArgs& a, const lmk::LinearKernels& kernels, int64_t col_unit) {
  constexpr int64_t kLeastRows = 192, kPackedBytes = 1200 << 10;  // more than half of an L2 cache
  const auto& share = a.a.depth_stride == 1 ? kernels.share : kernels.share_packing_a;
  const int64_t threads = torch::stable::get_num_threads(), wanted = share.tasks_per_thread * threads;
  const auto count = [](int64_t n, int64_t part) { return (n + part - 1) / part; };
  const int64_t column = std::max<int64_t>(1, std::min(a.depth, kernels.most_depth)) * kernels.packed_bytes;
  const int64_t most_cols = std::clamp(kPackedBytes / column, kernels.least_cols, share.most_cols);
  int64_t row_blocks = std::max<int64_t>(1, count(a.rows, kernels.most_rows)),
          col_blocks = std::max<int64_t>(1, count(a.cols, most_cols));
  const auto uneven = [&](int64_t tasks) { return tasks < 4 * threads && tasks % threads != 0; };
  while (row_blocks * col_blocks < wanted || uneven(row_blocks * col_blocks)) {
    if (count(a.cols, col_blocks + 1) >= kernels.least_cols)
      ++col_blocks;
    else if (count(a.rows, row_blocks + 1) >= kLeastRows)
      ++row_blocks;
    else
      break;
  }
  a.rows_per_task = count(count(a.rows, row_blocks), kernels.row_unit) * kernels.row_unit;
  a.cols_per_task = count(count(a.cols, col_blocks), col_unit) * col_unit;
}

// Products that do not wait for each other, in one parallel region; all of one dtype.
void run_matmuls(std::span<lmk::LinearArgs> products, int64_t col_unit = 64) {
  if (products.empty()) return;
  const lmk::LinearKernels& kernels = lmk::linear_kernels(products[0].compute, products[0].parts);
  int64_t scratch_bytes = 0;
  double flops = 0;
  for (lmk::LinearArgs& a : products) {
    if (a.rows == 0 || a.cols == 0) continue;
    choose_blocks(a, kernels, col_unit);
    a.tasks_apart = torch::stable::get_num_threads();
    scratch_bytes = std::max(scratch_bytes, kernels.scratch(a));
    flops += 2.0 * double(a.rows) * double(a.cols) * double(a.depth);
  }
  // the smallest tasks last: a thread that is done waits for one of them at most
  const auto task_size = [](const lmk::LinearArgs& a) { return a.rows_per_task * a.cols_per_task * a.depth; };
  std::stable_sort(products.begin(), products.end(),
                   [&](const auto& x, const auto& y) { return task_size(x) > task_size(y); });
  std::vector<int64_t> ends;  // of the tasks of each
  int64_t tasks = 0;
  for (const lmk::LinearArgs& a : products) {
    const auto blocks = [](int64_t n, int64_t part) { return part ? (n + part - 1) / part : 0; };
    tasks += blocks(a.rows, a.rows_per_task) * blocks(a.cols, a.cols_per_task);
    ends.push_back(tasks);
  }
  run_tasks(tasks, scratch_bytes, flops, [&](int64_t task, void* scratch) {
    const size_t i = size_t(std::upper_bound(ends.begin(), ends.end(), task) - ends.begin());
    kernels.matmul(products[i], i > 0 ? task - ends[i - 1] : task, scratch);
  });
}

void run_matmul(lmk::LinearArgs& a, int64_t col_unit = 64) { run_matmuls({&a, 1}, col_unit); }

// x has the dtype of other, or float32 where that has 16 bits.
void check_wide(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type() ||
                      (x.scalar_type() == ScalarType::Float && other.scalar_type() != ScalarType::Double),
                  "weight, residual and dout must have the dtype of x, or float32 for 16 bits");
}

void check_weight(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && weight.is_cpu() && weight.dim() == 2 && weight.size(1) == x.size(1),
                  "x must be (rows, in) and weight (out, in)");
  check_wide(weight, x);
  if (bias)
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_contiguous(),
                    "bias must be (out,)");
}

lmk::LinearArgs product_args(const Tensor& x, const Tensor& weight, int64_t parts) {
  lmk::LinearArgs a{};
  a.parts = parts;
  a.rows = x.size(0), a.cols = weight.size(0), a.depth = x.size(1);
  a.a = lines_of(x, 0), a.b = lines_of(weight, 0);
  a.compute = dtype_of(x);
  return a;
}

// In skinny_binding.h.
void run_skinny(const Tensor& x, const Tensor& weight, const lmk::Epilogue& epilogue);

// Up to this many rows the reading of the weight, once, is what a product costs.
bool is_skinny(const Tensor& x, const Tensor& weight) {
  constexpr int64_t kMostRows = 32;
  return x.size(0) <= kMostRows && weight.scalar_type() == x.scalar_type();
}

// out = activation(x weight^T + bias) + residual and what the activation was applied to, where it is wanted. With a
// gate, out = activation(gate) * (x weight^T + bias) + residual.
std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias,
                                      const OptionalTensor& residual_, const OptionalTensor& gate, int64_t activation,
                                      bool need_pre, int64_t parts) {
  check_weight(x_, weight_, bias);
  const Tensor x = dense_matrix(x_), weight = dense_matrix(weight_);
  lmk::LinearArgs a = product_args(x, weight, parts);
  const OptionalTensor residual = residual_ ? OptionalTensor(dense_rows(*residual_)) : residual_;
  for (const OptionalTensor* y : {&residual, &gate})
    if (*y)
      STD_TORCH_CHECK((*y)->is_cpu() && (*y)->dim() == 2 && (*y)->size(0) == a.rows && (*y)->size(1) == a.cols,
                      "residual and gate must be (rows, out)");
  if (residual) check_wide(*residual, x);
  if (gate)
    STD_TORCH_CHECK(gate->is_contiguous() && gate->scalar_type() == x.scalar_type(),
                    "gate must be contiguous, in the dtype of x");
  Tensor out = new_tensor(x, {a.rows, a.cols}, residual ? residual->scalar_type() : x.scalar_type());
  Tensor pre = new_tensor(x, {need_pre ? a.rows : 0, need_pre ? a.cols : 0});
  a.end.dtype = dtype_of(out);
  a.end.pre_dtype = a.compute;
  a.end.out = out.mutable_data_ptr();
  a.end.out_row = a.cols;
  a.end.pre = need_pre ? pre.mutable_data_ptr() : nullptr;
  a.end.activation = static_cast<lmk::Activation>(activation);
  if (gate) a.end.gate = gate->const_data_ptr();
  if (bias) a.end.bias = bias->const_data_ptr(), a.end.bias_dtype = dtype_of(*bias);
  if (residual) a.end.residual = residual->const_data_ptr(), a.end.residual_row = residual->stride(0);
  if (is_skinny(x, weight))
    run_skinny(dense_rows(x), weight, a.end);
  else
    run_matmul(a);
  return {out, pre};
}

Tensor bias_gradient(const Tensor& like, int64_t cols, bool needed) {
  return new_tensor(like, {needed ? cols : 0}, accumulator(like));
}

// a.dbias, where it is wanted, through sums of blocks of rows.
void run_activation(lmk::ActivationArgs& a, const Tensor& dbias) {
  const lmk::LinearKernels& kernels = lmk::linear_kernels(a.dtype);
  const int64_t blocks = (a.rows + lmk::kActivationRows - 1) / lmk::kActivationRows;
  const int64_t strips = (a.cols + lmk::kActivationCols - 1) / lmk::kActivationCols;
  const bool sums = dbias.numel() > 0;
  Tensor partial = new_tensor(dbias, {sums ? blocks : 0, sums ? a.cols : 0});
  if (sums) a.dbias = dbias.mutable_data_ptr(), a.partial = partial.mutable_data_ptr();
  run_tasks(blocks * strips, 0, 20.0 * a.rows * a.cols, [&](int64_t task, void*) { kernels.activation(a, task); });
  if (sums) run_tasks(strips, 0, 1.0 * blocks * a.cols, [&](int64_t task, void*) { kernels.sum_blocks(a, task); });
}

// The gradients of x and weight for out = x weight^T, whose gradient is dout. What else goes to x is added to dx, which
// then has its dtype.
std::tuple<Tensor, Tensor> product_gradients(const Tensor& dout, const Tensor& x, const Tensor& weight, bool need_dx,
                                             bool need_dweight, int64_t parts, const OptionalTensor& to_x = {}) {
  const int64_t rows = x.size(0), depth = x.size(1), cols = weight.size(0);
  Tensor dx = new_tensor(to_x ? *to_x : x, {need_dx ? rows : 0, need_dx ? depth : 0});
  Tensor dweight = new_tensor(weight, {0, 0});
  std::vector<lmk::LinearArgs> products;
  const auto product = [&](const Tensor& c, const lmk::Matrix& a, const lmk::Matrix& b, int64_t common) {
    lmk::LinearArgs p{};
    p.compute = dtype_of(x), p.parts = parts;
    p.rows = c.size(0), p.cols = c.size(1), p.depth = common;
    p.a = a, p.b = b;
    p.end.dtype = dtype_of(c), p.end.out = c.mutable_data_ptr(), p.end.out_row = p.cols;
    products.push_back(p);
  };
  if (need_dx) product(dx, lines_of(dout, 0), lines_of(weight, 1), cols);
  if (need_dx && to_x) products[0].end.residual = to_x->const_data_ptr(), products[0].end.residual_row = depth;
  // in the layout of the weight
  const bool turned = weight.stride(0) == 1 && weight.stride(1) != 1;
  if (need_dweight) {
    const Tensor &first = turned ? x : dout, &second = turned ? dout : x;
    dweight = new_tensor(weight, {first.size(1), second.size(1)});
    product(dweight, lines_of(first, 1), lines_of(second, 1), rows);
  }
  run_matmuls(products);
  if (need_dweight && turned) dweight = torch::stable::transpose(dweight, 0, 1);
  return {dx, dweight};
}

// dx, dweight, dbias; those not needed are empty. pre is what the activation was applied to; to_x as above, contiguous.
std::tuple<Tensor, Tensor, Tensor> linear_gradients(const Tensor& dout_, const Tensor& x_, const Tensor& weight_,
                                                    const OptionalTensor& pre, int64_t activation, bool need_dx,
                                                    bool need_dweight, bool need_dbias, int64_t parts,
                                                    const OptionalTensor& to_x = {}) {
  check_weight(x_, weight_, {});
  const Tensor x = dense_matrix(x_), weight = dense_matrix(weight_);
  Tensor dout = dense_rows(dout_);
  lmk::ActivationArgs p{};
  p.dtype = dtype_of(x);
  p.rows = x.size(0), p.cols = weight.size(0);
  STD_TORCH_CHECK(dout.size(0) == p.rows && dout.size(1) == p.cols, "dout must be (rows, out)");
  check_wide(dout, x);
  p.activation = static_cast<lmk::Activation>(activation);
  Tensor dbias = bias_gradient(x, p.cols, need_dbias);
  const bool active = p.activation != lmk::Activation::none;
  if (active || need_dbias) {
    p.dout = dout.const_data_ptr();
    p.dout_row = dout.stride(0), p.dout_dtype = dtype_of(dout);
    Tensor dpre = new_tensor(x, {active ? p.rows : 0, active ? p.cols : 0});
    if (active) {
      STD_TORCH_CHECK(
          pre && pre->is_contiguous() && pre->scalar_type() == x.scalar_type() && pre->numel() == p.rows * p.cols,
          "pre must be (rows, out), contiguous, in the dtype of x");
      p.pre = pre->const_data_ptr();
      p.dpre = dpre.mutable_data_ptr();
    }
    run_activation(p, dbias);
    if (active) dout = dpre;
  }
  const auto [dx, dweight] = product_gradients(dout, x, weight, need_dx, need_dweight, parts, to_x);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                              const OptionalTensor& pre, int64_t activation, bool need_dx,
                                              bool need_dweight, bool need_dbias, int64_t parts) {
  return linear_gradients(dout, x, weight, pre, activation, need_dx, need_dweight, need_dbias, parts);
}

// The gradients of activation(pre), or of activation(gate) * pre, and the value again: dpre, dgate, out, dbias.
std::tuple<Tensor, Tensor, Tensor, Tensor> activation_bwd(const Tensor& dout_, const Tensor& pre,
                                                          const OptionalTensor& gate, int64_t activation,
                                                          bool need_dbias) {
  const Tensor dout = dense_rows(dout_);
  lmk::ActivationArgs p{};
  p.dtype = dtype_of(pre);
  p.rows = pre.size(0), p.cols = pre.size(1);
  for (const Tensor* y : {&pre, gate ? &*gate : &pre})
    STD_TORCH_CHECK(y->is_cpu() && y->is_contiguous() && y->scalar_type() == pre.scalar_type() && y->dim() == 2 &&
                        y->size(0) == dout.size(0) && y->size(1) == dout.size(1),
                    "dout, pre and gate must have one shape, pre and gate be contiguous and of one dtype");
  check_wide(dout, pre);
  p.activation = static_cast<lmk::Activation>(activation);
  Tensor dpre = new_tensor(pre, {p.rows, p.cols}), out = new_tensor(pre, {p.rows, p.cols});
  Tensor dgate = new_tensor(pre, {gate ? p.rows : 0, gate ? p.cols : 0});
  Tensor dbias = bias_gradient(pre, p.cols, need_dbias);
  p.dout = dout.const_data_ptr(), p.dout_row = dout.stride(0), p.dout_dtype = dtype_of(dout);
  p.pre = pre.const_data_ptr(), p.gate = gate ? gate->const_data_ptr() : nullptr;
  p.dpre = dpre.mutable_data_ptr(), p.out = out.mutable_data_ptr();
  p.dgate = gate ? dgate.mutable_data_ptr() : nullptr;
  run_activation(p, dbias);
  return {dpre, dgate, out, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&linear_bwd));
  m.impl("activation_bwd", TORCH_BOX(&activation_bwd));
}
