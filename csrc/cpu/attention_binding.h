// torch's side of attention: checks, allocates, runs the kernels. Included by bindings.cpp.

#include "attention.h"

namespace {

// x itself where its last axis is contiguous, which is all that the kernels ask for, else a copy.
Tensor dense(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "q, k, v, out and dout must be CPU tensors of 4 axes");
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
}

lmk::Heads heads_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

lmk::ScoreMap score_map(const OptionalTensor& x, const lmk::AttentionArgs& a) {
  if (!x) return {};
  STD_TORCH_CHECK(x->is_cpu() && x->dim() == 4, "mask and bias must have 4 axes");
  const int64_t full[] = {a.batch, a.heads, a.seq_q, a.seq_k};
  int64_t strides[4];
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x->size(i) == full[i] || x->size(i) == 1, "mask and bias must broadcast to (b, h, s_q, s_k)");
    strides[i] = x->size(i) == 1 ? 0 : x->stride(i);
  }
  lmk::ScoreMap m{x->const_data_ptr(), strides[0], strides[1], strides[2], strides[3], a.dtype};
  if (x->scalar_type() != ScalarType::Bool) m.dtype = dtype_of(*x);
  return m;
}

// A contiguous tensor of the accumulator's dtype, or null.
const float* accumulator_data(const OptionalTensor& x, const Tensor& q, int64_t numel) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == accumulator(q) && x->is_contiguous() && x->numel() == numel,
                  "alibi_slopes, sink, lse and dlse must be contiguous, of the accumulator's dtype and of their size");
  return static_cast<const float*>(x->const_data_ptr());
}

lmk::AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                  const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
                                  const OptionalTensor& sink, const OptionalTensor& kv_lengths,
                                  const OptionalTensor& seed, int64_t left, int64_t right, int64_t offset, double scale,
                                  double softcap, double dropout_p) {
  for (const Tensor* x : {&q, &k, &v})
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
  lmk::AttentionArgs a{};
  a.dtype = dtype_of(q);
  a.batch = q.size(0), a.seq_q = q.size(1), a.heads = q.size(2), a.head_dim = q.size(3);
  a.seq_k = k.size(1), a.heads_kv = k.size(2), a.head_dim_v = v.size(3);
  STD_TORCH_CHECK(k.size(0) == a.batch && v.size(0) == a.batch && v.size(1) == a.seq_k && v.size(2) == a.heads_kv &&
                      k.size(3) == a.head_dim,
                  "q, k and v do not fit together");
  STD_TORCH_CHECK(a.heads == 0 || (a.heads_kv > 0 && a.heads % a.heads_kv == 0), "h must be a multiple of h_kv");
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 256 && a.head_dim_v >= 1 && a.head_dim_v <= 256,
                  "head sizes must be between 1 and 256");
  a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v);
  if (mask) STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  a.mask = score_map(mask, a);
  a.bias = score_map(bias, a);
  const bool per_batch = alibi_slopes && alibi_slopes->dim() == 2;
  a.slopes = accumulator_data(alibi_slopes, q, per_batch ? a.batch * a.heads : a.heads);
  a.slopes_batch = per_batch ? a.heads : 0;
  a.sink = accumulator_data(sink, q, a.heads);
  if (kv_lengths) {
    STD_TORCH_CHECK(kv_lengths->is_cpu() && kv_lengths->scalar_type() == ScalarType::Int &&
                        kv_lengths->is_contiguous() && kv_lengths->numel() == a.batch,
                    "kv_lengths must be (b,) int32");
    a.kv_lengths = static_cast<const int32_t*>(kv_lengths->const_data_ptr());
  }
  a.left = left, a.right = right, a.offset = offset;
  a.scale = scale, a.softcap = softcap, a.dropout_p = dropout_p;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                    "dropout needs a seed: one int64");
    a.seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
  }
  return a;
}

double attention_flops(const lmk::AttentionArgs& a) {
  return 2.0 * a.batch * a.heads * a.seq_q * a.seq_k * (a.head_dim + a.head_dim_v);
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                         const OptionalTensor& mask, const OptionalTensor& bias,
                                         const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                                         const OptionalTensor& kv_lengths, const OptionalTensor& seed, int64_t left,
                                         int64_t right, int64_t offset, double scale, double softcap,
                                         double dropout_p) {
  const Tensor q = dense(q_), k = dense(k_), v = dense(v_);
  lmk::AttentionArgs a = attention_args(q, k, v, mask, bias, alibi_slopes, sink, kv_lengths, seed, left, right, offset,
                                        scale, softcap, dropout_p);
  Tensor out = torch::stable::new_empty(q, {a.batch, a.seq_q, a.heads, a.head_dim_v});
  Tensor lse = torch::stable::new_empty(q, {a.batch, a.heads, a.seq_q}, accumulator(q));
  if (lse.numel() == 0) return {out, lse};
  a.out = out.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr();

  const lmk::AttentionKernels& kernels = lmk::attention_kernels(a.dtype);
  const int64_t rows = a.heads / a.heads_kv * a.seq_q, key_heads = a.batch * a.heads_kv;
  const double flops = attention_flops(a);
  if (rows <= lmk::kFewRows) {
    // shares of the keys, and with them the results, depend on the shape of one sequence alone
    constexpr int64_t kShares = 128, kUnit = 64, kAtLeast = 256;
    a.keys_per_split = std::max(kAtLeast, (a.seq_k * a.heads_kv / kShares + kUnit - 1) / kUnit * kUnit);
    const int64_t splits = std::max<int64_t>(1, (a.seq_k + a.keys_per_split - 1) / a.keys_per_split);
    const int64_t state = rows * (2 + (a.head_dim_v + kernels.lanes - 1) / kernels.lanes * kernels.lanes);
    Tensor partial = torch::stable::new_empty(q, {key_heads * splits * state}, accumulator(q));
    a.partial = partial.mutable_data_ptr();
    // a key costs its bytes here, not its flops
    const double work = 16 * flops / rows;
    run_tasks(key_heads * splits, kernels.split_scratch(a), work,
              [&](int64_t task, void* scratch) { kernels.split(a, task, scratch); });
    run_tasks(key_heads, 0, 0, [&](int64_t task, void*) { kernels.split_finish(a, task); });
    return {out, lse};
  }
  // Keys are packed once per task: many rows share the cost, as long as their queries and sums stay in the L2 cache.
  constexpr int64_t kTasksPerThread = 4, kMostRows = 512, kLeastRows = 48, kCacheBytes = 256 * 1024;
  const int64_t cached = kCacheBytes / ((a.head_dim + a.head_dim_v) * kernels.accumulator_size);
  const int64_t wanted = kTasksPerThread * torch::stable::get_num_threads();
  const int64_t per_head = std::max<int64_t>(1, (wanted + key_heads - 1) / key_heads);
  a.rows_per_task =
      std::clamp((rows + per_head - 1) / per_head, kLeastRows, std::min(kMostRows, std::max(kLeastRows, cached)));
  const int64_t tasks = key_heads * ((rows + a.rows_per_task - 1) / a.rows_per_task);
  run_tasks(tasks, kernels.fwd_scratch(a), flops,
            // the last rows of a causal triangle are the longest: they go first
            [&](int64_t task, void* scratch) { kernels.fwd(a, tasks - 1 - task, scratch); });
  return {out, lse};
}

// Tasks of the backward per key head. Each holds a gradient of its own for q, which are then added in order.
int64_t backward_chunks(const lmk::AttentionArgs& a, const lmk::AttentionKernels& kernels, bool deterministic) {
  constexpr int64_t kMost = 16, kTasksPerThread = 4, kDeterministicTasks = 16;
  const int64_t key_heads = a.batch * a.heads_kv, threads = torch::stable::get_num_threads();
  const int64_t blocks = (a.seq_k + kernels.key_block - 1) / kernels.key_block;
  if (!deterministic && key_heads % threads == 0) return 1;
  // deterministic: from the shape of one sequence alone
  const int64_t share = deterministic ? a.heads_kv : key_heads;
  const int64_t tasks = deterministic ? kDeterministicTasks : kTasksPerThread * threads;
  return std::clamp<int64_t>((tasks + share - 1) / share, 1, std::min(kMost, blocks));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const OptionalTensor& dout_, const OptionalTensor& dlse_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
    const Tensor& out, const Tensor& lse, const OptionalTensor& mask, const OptionalTensor& bias,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sink, const OptionalTensor& kv_lengths,
    const OptionalTensor& seed, int64_t left, int64_t right, int64_t offset, double scale, double softcap,
    double dropout_p, bool need_dbias, bool need_dslopes, bool need_dsink, bool deterministic) {
  const Tensor q = dense(q_), k = dense(k_), v = dense(v_);
  const OptionalTensor dlse = dlse_ ? OptionalTensor(torch::stable::contiguous(*dlse_)) : dlse_;
  lmk::AttentionArgs a = attention_args(q, k, v, mask, bias, alibi_slopes, sink, kv_lengths, seed, left, right, offset,
                                        scale, softcap, dropout_p);
  const ScalarType acc = accumulator(q);
  const Tensor dout = dout_ ? dense(*dout_) : torch::stable::new_zeros(out, {a.batch, a.seq_q, a.heads, a.head_dim_v});
  for (const Tensor* x : {&out, &dout})
    STD_TORCH_CHECK(x->is_cpu() && x->dim() == 4 && x->scalar_type() == q.scalar_type() && x->size(0) == a.batch &&
                        x->size(1) == a.seq_q && x->size(2) == a.heads && x->size(3) == a.head_dim_v,
                    "out and dout must be (b, s_q, h, d_v) in q's dtype");
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  a.dout = heads_of(dout);
  a.out = const_cast<void*>(out.const_data_ptr());
  a.lse = const_cast<float*>(accumulator_data(lse, q, a.batch * a.heads * a.seq_q));
  a.dlse = accumulator_data(dlse, q, a.batch * a.heads * a.seq_q);

  Tensor dq = torch::stable::new_empty(q, {a.batch, a.seq_q, a.heads, a.head_dim});
  Tensor dk = torch::stable::new_empty(k, {a.batch, a.seq_k, a.heads_kv, a.head_dim});
  Tensor dv = torch::stable::new_empty(v, {a.batch, a.seq_k, a.heads_kv, a.head_dim_v});
  need_dbias &= bias.has_value(), need_dslopes &= alibi_slopes.has_value(), need_dsink &= sink.has_value();
  Tensor dbias = need_dbias
                     ? torch::stable::new_empty(*bias, {bias->size(0), bias->size(1), bias->size(2), bias->size(3)})
                     : torch::stable::new_empty(q, {0});
  const lmk::AttentionKernels& kernels = lmk::attention_kernels(a.dtype);
  const int64_t key_heads = a.batch * a.heads_kv, group = a.heads_kv ? a.heads / a.heads_kv : 0;
  if (lse.numel() == 0 || k.numel() == 0) {
    Tensor dslopes = need_dslopes ? torch::stable::empty_like(*alibi_slopes) : torch::stable::new_empty(q, {0});
    Tensor dsink = need_dsink ? torch::stable::empty_like(*sink) : torch::stable::new_empty(q, {0});
    for (Tensor* x : {&dq, &dk, &dv, &dbias, &dslopes, &dsink}) torch::stable::zero_(*x);
    return {dq, dk, dv, dbias, dslopes, dsink};
  }
  a.dq = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();
  a.chunks = backward_chunks(a, kernels, deterministic);
  const int64_t wide = (a.head_dim + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  Tensor dq_partial = torch::stable::new_empty(q, {key_heads * a.chunks * group * a.seq_q * wide}, acc);
  a.dq_partial = dq_partial.mutable_data_ptr();
  Tensor dslopes = need_dslopes
                       ? torch::stable::new_empty(q, {a.batch, a.heads_kv, a.chunks, group}, ScalarType::Double)
                       : torch::stable::new_empty(q, {0});
  Tensor dsink = need_dsink ? torch::stable::new_empty(q, {a.batch, a.heads}, ScalarType::Double)
                            : torch::stable::new_empty(q, {0});
  a.dslopes_partial = need_dslopes ? static_cast<double*>(dslopes.mutable_data_ptr()) : nullptr;
  a.dsink_partial = need_dsink ? static_cast<double*>(dsink.mutable_data_ptr()) : nullptr;
  const double flops = 2.5 * attention_flops(a);
  run_tasks(key_heads * a.chunks, kernels.bwd_scratch(a), flops,
            [&](int64_t task, void* scratch) { kernels.bwd(a, task, scratch); });
  run_tasks(key_heads, 0, 8.0 * a.chunks * double(dq.numel()),
            [&](int64_t task, void*) { kernels.bwd_finish(a, task); });
  if (need_dslopes) {
    const bool per_batch = a.slopes_batch > 0;
    const int64_t over_chunks[] = {2}, over_batch_too[] = {0, 2}, shape[] = {a.batch, a.heads}, flat[] = {a.heads};
    dslopes = per_batch ? torch::stable::reshape(torch::stable::sum(dslopes, over_chunks), shape)
                        : torch::stable::reshape(torch::stable::sum(dslopes, over_batch_too), flat);
    dslopes = torch::stable::to(dslopes, acc);
  }
  if (need_dsink) {
    const int64_t over_batch[] = {0};
    dsink = torch::stable::to(torch::stable::sum(dsink, over_batch), acc);
  }
  if (need_dbias) {
    a.dbias = dbias.mutable_data_ptr();
    a.dbias_batch = bias->size(0), a.dbias_heads = bias->size(1), a.dbias_q = bias->size(2), a.dbias_k = bias->size(3);
    const int64_t row_tasks = (a.dbias_q + kernels.dbias_rows - 1) / kernels.dbias_rows;
    const int64_t key_tasks = (a.dbias_k + kernels.dbias_keys - 1) / kernels.dbias_keys;
    run_tasks(a.dbias_batch * a.dbias_heads * row_tasks * key_tasks, kernels.dbias_scratch(a), flops,
              [&](int64_t task, void* scratch) { kernels.dbias(a, task, scratch); });
  }
  return {dq, dk, dv, dbias, dslopes, dsink};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}
