// torch's side of linear cross entropy: checks, allocates, runs the kernels. Included by bindings.cpp after
// linear_binding.h, whose functions it uses.

#include "linear_cross_entropy.h"

namespace {

// Rows of hidden whose label counts, in order.
std::vector<int64_t> counted_tokens(const Tensor& labels, int64_t vocab, int64_t ignore_index) {
  std::vector<int64_t> tokens;
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < labels.size(0); ++i) {
    if (label[i] == ignore_index) continue;
    STD_TORCH_CHECK(label[i] >= 0 && label[i] < vocab, "labels must be in [0, ", vocab, ") or ignore_index ",
                    ignore_index, ", got ", label[i]);
    tokens.push_back(i);
  }
  return tokens;
}

// Blocks and chunks follow from the shape alone, so the results do not depend on threads. Columns decide no bit: where
// there are more threads than splits, they share those of dhidden.
void choose_loss_blocks(lmk::LossArgs& a, const lmk::LossKernels& kernels, int64_t count) {
  // Bytes of a chunk's logits. The weight and its gradient are read once per chunk, so large chunks are fast; where
  // dweight has 16 bits its sums need memory beside them.
  constexpr int64_t kLogits = 144 << 20, kLogitsBesideSums = 88 << 20;
  constexpr int64_t kMostTokens = 768, kBlocks = 64, kMostRows = 384, kSplits = 16;
  const auto up = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; };
  int64_t most = kMostTokens;
  if (a.keep_logits) {
    const int64_t bytes = a.dweight && lmk::element_size(a.dweight_dtype) == 2 ? kLogitsBesideSums : kLogits;
    most = std::clamp(bytes / (a.vocab * kernels.accumulator_size) / kernels.panel * kernels.panel, kernels.panel,
                      kMostTokens);
  }
  const int64_t chunks = (count + most - 1) / most;
  a.capacity = up((count + chunks - 1) / chunks, kernels.panel);
  a.vocab_block = std::min(up((a.vocab + kBlocks - 1) / kBlocks, kernels.row_unit), up(kMostRows, kernels.row_unit));
  a.split_rows = up((a.vocab + kSplits - 1) / kSplits, kernels.split_unit);
  a.splits = (a.vocab + a.split_rows - 1) / a.split_rows;
  const int64_t shares = (torch::stable::get_num_threads() + a.splits - 1) / a.splits;
  a.hidden_cols_per_task = std::min(kernels.hidden_cols, up((a.depth + shares - 1) / shares, 64));
}

void run_loss(lmk::LossArgs& a, const Tensor& like, const std::vector<int64_t>& tokens) {
  const int64_t count = int64_t(tokens.size());
  const lmk::LossKernels& kernels = lmk::loss_kernels(a.compute, a.parts, count);
  choose_loss_blocks(a, kernels, count);
  Tensor low, shared = new_tensor(like, {kernels.shared(a)}, ScalarType::Byte);
  if (a.dweight && lmk::element_size(a.dweight_dtype) == 2 && count > a.capacity) {
    low = new_tensor(like, {a.vocab, a.depth}, ScalarType::Byte);
    a.dweight_low = static_cast<uint8_t*>(low.mutable_data_ptr());
  }
  a.shared = shared.mutable_data_ptr();
  const int64_t scratch = kernels.scratch(a), blocks = (a.vocab + a.vocab_block - 1) / a.vocab_block;
  const int64_t col_blocks = (a.depth + a.hidden_cols_per_task - 1) / a.hidden_cols_per_task;
  for (int64_t token = 0; token < count; token += a.capacity) {
    a.tokens = tokens.data() + token;
    a.count = std::min(a.capacity, count - token);
    a.first = token == 0;
    a.last = token + a.capacity >= count;
    const int64_t panels = (a.count + kernels.panel - 1) / kernels.panel;
    const double product = 2.0 * a.count * a.vocab * a.depth;
    const auto run = [&](auto kernel, int64_t tasks, double flops) {
      run_tasks(tasks, scratch, flops, [&](int64_t task, void* memory) { kernel(a, task, memory); });
    };
    run(kernels.pack, panels, 8.0 * a.count * a.depth);
    run(kernels.logits, blocks, product);
    run(kernels.loss, panels, 20.0 * a.count * blocks);
    if (!a.keep_logits) continue;
    run(kernels.dweight, blocks, a.dweight ? product : 20.0 * a.count * a.vocab);
    if (!a.dhidden) continue;
    run(kernels.dhidden, a.splits * col_blocks, product);
    run(kernels.dhidden_sum, panels, 2.0 * a.count * a.splits * a.depth);
  }
}

lmk::LossArgs loss_args(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& labels,
                        double softcap, double z_loss, double label_smoothing, int64_t parts) {
  check_weight(hidden, weight, bias);
  STD_TORCH_CHECK(labels.is_cpu() && labels.dim() == 1 && labels.size(0) == hidden.size(0) &&
                      labels.scalar_type() == ScalarType::Long && labels.is_contiguous(),
                  "labels must be (tokens,), contiguous, of int64");
  lmk::LossArgs a{};
  a.vocab = weight.size(0), a.depth = weight.size(1);
  a.compute = dtype_of(hidden), a.parts = parts;
  a.hidden = hidden.const_data_ptr(), a.hidden_row = hidden.stride(0);
  a.weight = lines_of(weight, 0);
  if (bias) a.bias = bias->const_data_ptr(), a.bias_dtype = dtype_of(*bias);
  a.labels = labels.const_data_ptr<int64_t>();
  a.softcap = softcap, a.z_loss = z_loss, a.label_smoothing = label_smoothing;
  return a;
}

// The loss of each token; 0 where it is ignored.
Tensor linear_cross_entropy_fwd(const Tensor& hidden_, const Tensor& weight_, const OptionalTensor& bias,
                                const Tensor& labels, int64_t ignore_index, double softcap, double z_loss,
                                double label_smoothing, int64_t parts) {
  const Tensor hidden = dense_rows(hidden_), weight = dense_matrix(weight_);
  lmk::LossArgs a = loss_args(hidden, weight, bias, labels, softcap, z_loss, label_smoothing, parts);
  const std::vector<int64_t> tokens = counted_tokens(labels, a.vocab, ignore_index);
  Tensor loss = torch::stable::new_zeros(hidden, {hidden.size(0)}, accumulator(hidden));
  a.loss = loss.mutable_data_ptr();
  if (!tokens.empty()) run_loss(a, hidden, tokens);
  return loss;
}

// The loss of each token, and the gradients of sum(scale * loss): loss, dhidden, dweight, dbias. dhidden and dbias are
// float32 (float64 for float64); gradients not needed are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_bwd(const Tensor& scale, const Tensor& hidden_,
                                                                    const Tensor& weight_, const OptionalTensor& bias,
                                                                    const Tensor& labels, int64_t ignore_index,
                                                                    double softcap, double z_loss,
                                                                    double label_smoothing, bool need_dhidden,
                                                                    bool need_dweight, bool need_dbias, int64_t parts) {
  const Tensor hidden = dense_rows(hidden_), weight = dense_matrix(weight_);
  lmk::LossArgs a = loss_args(hidden, weight, bias, labels, softcap, z_loss, label_smoothing, parts);
  const ScalarType acc = accumulator(hidden);
  STD_TORCH_CHECK(scale.is_cpu() && scale.dim() == 1 && scale.size(0) == hidden.size(0) && scale.scalar_type() == acc,
                  "scale must be (tokens,), float32 (float64 for float64)");
  const std::vector<int64_t> tokens = counted_tokens(labels, a.vocab, ignore_index);
  const int64_t rows = hidden.size(0);
  Tensor loss = torch::stable::new_zeros(hidden, {rows}, acc);
  Tensor dhidden = new_tensor(hidden, {need_dhidden ? rows : 0, need_dhidden ? a.depth : 0}, acc);
  Tensor dweight = new_tensor(weight, {need_dweight ? a.vocab : 0, need_dweight ? a.depth : 0});
  Tensor dbias = torch::stable::new_zeros(hidden, {need_dbias ? a.vocab : 0}, ScalarType::Double);
  if (int64_t(tokens.size()) < rows) torch::stable::zero_(dhidden);
  if (tokens.empty()) {
    torch::stable::zero_(dweight);
  } else {
    a.keep_logits = true;
    a.loss = loss.mutable_data_ptr();
    a.scale = scale.const_data_ptr(), a.scale_stride = scale.stride(0);
    if (need_dhidden) a.dhidden = dhidden.mutable_data_ptr();
    if (need_dweight) a.dweight = dweight.mutable_data_ptr(), a.dweight_dtype = dtype_of(dweight);
    if (need_dbias) a.dbias = static_cast<double*>(dbias.mutable_data_ptr());
    run_loss(a, hidden, tokens);
  }
  return {loss, dhidden, dweight, torch::stable::to(dbias, acc)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&linear_cross_entropy_bwd));
}
