// torch's side of attention: checks, allocates, runs the kernels. Included by bindings.cpp.

#include <cmath>
#include <limits>
#include <vector>

#include "attention.h"

namespace {

// Everything of an attention op but q, k, v and what says where the sequences lie.
struct AttentionOptions {
  const OptionalTensor &mask, &bias, &alibi_slopes, &sink, &kv_lengths, &seed;
  int64_t left, right;
  double scale, softcap, dropout_p;
};

using Sequences = std::vector<lmk::Sequence>;
using AttentionTasks = std::vector<lmk::AttentionTask>;
using AttentionGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// x itself where its last axis is contiguous, which is all that the kernels ask for, else a copy.
Tensor dense(const Tensor& x, int64_t axes) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == axes, "q, k, v, out and dout must be CPU tensors of 4 axes, 3 when packed");
  return x.stride(axes - 1) == 1 || x.size(axes - 1) <= 1 ? x : torch::stable::contiguous(x);
}

// (b, s, h, d), or (s, h, d) as a batch of one entry.
lmk::Heads heads_of(const Tensor& x) {
  const int64_t seq = x.dim() - 3;
  return {x.const_data_ptr(), seq ? x.stride(0) : 0, x.stride(seq), x.stride(seq + 1)};
}

// Whether a bias is (1, h, 1, most_q + most_k), by distance from -most_k to most_q - 1: one that broadcasts has 1 or
// most_k elements on its last axis.
bool by_distance(const OptionalTensor& bias, int64_t most_k) {
  return bias && bias->dim() == 4 && bias->size(3) != 1 && bias->size(3) != most_k;
}

lmk::ScoreMap distance_map(const Tensor& x, const Tensor& q, const lmk::AttentionArgs& a) {
  STD_TORCH_CHECK(
      x.is_cpu() && x.is_contiguous() && x.scalar_type() == accumulator(q) && x.size(0) == 1 && x.size(1) == a.heads &&
          x.size(2) == 1 && x.size(3) == a.distances,
      "bias must broadcast to (b, h, s_q, s_k), or go by distance: (1, h, 1, s_q + s_k), contiguous, of the "
      "accumulator's dtype");
  const lmk::DType dtype = dtype_of(x);
  const char* zero = static_cast<const char*>(x.const_data_ptr()) + a.most_k * lmk::element_size(dtype);
  return {zero, 0, a.distances, -1, 1, dtype, -1};
}

// Distances lie in the tensor where the diagonal ends at the last query and the last key.
void check_distances(const lmk::AttentionArgs& a, const Sequences& sequences) {
  for (const lmk::Sequence& s : sequences)
    STD_TORCH_CHECK(a.distances == 0 || s.offset == s.seq_k - s.seq_q, "a bias by distance needs offset = s_k - s_q");
}

// most_q, most_k: the score axes of a mask or bias.
lmk::ScoreMap score_map(const OptionalTensor& x, const lmk::AttentionArgs& a, int64_t most_q, int64_t most_k) {
  if (!x) return {};
  STD_TORCH_CHECK(x->is_cpu() && x->dim() == 4, "mask and bias must have 4 axes");
  const int64_t full[] = {a.sequences, a.heads, most_q, most_k};
  int64_t strides[4];
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x->size(i) == full[i] || x->size(i) == 1, "mask and bias must broadcast to (b, h, s_q, s_k)");
    strides[i] = x->size(i) == 1 ? 0 : x->stride(i);
  }
  lmk::ScoreMap m{x->const_data_ptr(), strides[0], strides[1], strides[2], strides[3], a.dtype, 0};
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

const int32_t* int32_data(const OptionalTensor& x, int64_t numel) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == ScalarType::Int && x->is_contiguous() && x->numel() == numel,
                  "kv_lengths and cu_seqlens must be contiguous int32 tensors of one size");
  return static_cast<const int32_t*>(x->const_data_ptr());
}

// most_q, most_k: the longest sequences.
lmk::AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& o,
                                  int64_t sequences, int64_t most_q, int64_t most_k) {
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(k.scalar_type() == type && v.scalar_type() == type, "q, k and v must have one dtype");
  const int64_t seq = q.dim() - 3, head = seq + 1, last = seq + 2;  // axes
  lmk::AttentionArgs a{};
  a.dtype = dtype_of(q);
  a.sequences = sequences;
  a.seq_q = q.size(seq), a.heads = q.size(head), a.head_dim = q.size(last);
  a.seq_k = k.size(seq), a.heads_kv = k.size(head), a.head_dim_v = v.size(last);
  STD_TORCH_CHECK(k.size(0) == (seq ? q.size(0) : a.seq_k) && v.size(0) == k.size(0) && v.size(seq) == a.seq_k &&
                      v.size(head) == a.heads_kv && k.size(last) == a.head_dim,
                  "q, k and v do not fit together");
  STD_TORCH_CHECK(a.heads == 0 || (a.heads_kv > 0 && a.heads % a.heads_kv == 0), "h must be a multiple of h_kv");
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 256 && a.head_dim_v >= 1 && a.head_dim_v <= 256,
                  "head sizes must be between 1 and 256");
  a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v);
  if (o.mask) STD_TORCH_CHECK(o.mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  a.mask = score_map(o.mask, a, most_q, most_k);
  if (by_distance(o.bias, most_k)) {
    a.distances = most_q + most_k, a.most_k = most_k;
    a.bias = distance_map(*o.bias, q, a);
  } else {
    a.bias = score_map(o.bias, a, most_q, most_k);
  }
  const bool per_sequence = o.alibi_slopes && o.alibi_slopes->dim() == 2;
  a.slopes = accumulator_data(o.alibi_slopes, q, per_sequence ? sequences * a.heads : a.heads);
  a.slopes_batch = per_sequence ? a.heads : 0;
  a.sink = accumulator_data(o.sink, q, a.heads);
  a.left = o.left, a.right = o.right;
  a.scale = o.scale, a.softcap = o.softcap, a.dropout_p = o.dropout_p;
  if (o.dropout_p > 0) {
    STD_TORCH_CHECK(o.seed && o.seed->is_cpu() && o.seed->scalar_type() == ScalarType::Long && o.seed->numel() == 1,
                    "dropout needs a seed: one int64");
    a.seed = *static_cast<const uint64_t*>(o.seed->const_data_ptr());
  }
  return a;
}

// How many of seq_k keys sequence b sees.
int64_t visible_length(const int32_t* kv_lengths, int64_t b, int64_t seq_k) {
  return kv_lengths ? std::clamp<int64_t>(kv_lengths[b], 0, seq_k) : seq_k;
}

// One sequence per batch entry.
Sequences batch_sequences(const Tensor& q, const Tensor& k, const OptionalTensor& kv_lengths, int64_t offset) {
  const int64_t batch = q.size(0), seq_k = k.size(1);
  const int32_t* lengths = int32_data(kv_lengths, batch);
  Sequences sequences(size_t(batch), lmk::Sequence{});
  for (int64_t b = 0; b < batch; ++b) {
    lmk::Sequence& s = sequences[b];
    s.entry = b;
    s.seq_q = q.size(1), s.seq_k = seq_k;
    s.keys = visible_length(lengths, b, seq_k);
    s.offset = offset;
  }
  return sequences;
}

double attention_flops(const lmk::AttentionArgs& a, const lmk::Sequence& s) {
  return 2.0 * a.heads * s.seq_q * s.keys * (a.head_dim + a.head_dim_v);
}

// The order in which sequences are worked on: a long one that came last would keep one thread busy alone.
std::vector<int64_t> longest_first(const Sequences& sequences) {
  std::vector<int64_t> order(sequences.size());
  for (size_t b = 0; b < order.size(); ++b) order[b] = int64_t(b);
  const auto work = [&](int64_t b) { return sequences[b].seq_q * sequences[b].keys; };
  std::sort(order.begin(), order.end(),
            [&](int64_t x, int64_t y) { return work(x) != work(y) ? work(x) > work(y) : x < y; });
  return order;
}

// The tasks of a sequence; of each key head the last part first, which a causal triangle makes the longest.
void add_tasks(int64_t sequence, int64_t heads_kv, int64_t parts, AttentionTasks& tasks) {
  if (tasks.empty()) tasks.reserve(size_t(heads_kv * parts));
  for (int64_t hk = 0; hk < heads_kv; ++hk)
    for (int64_t part = parts; part-- > 0;) tasks.push_back({sequence, hk, part});
}

// The task that the thread of task i will probably run after it, or null: the threads take turns.
const lmk::AttentionTask* next_task(const AttentionTasks& tasks, int64_t i) {
  const size_t next = size_t(i) + size_t(torch::stable::get_num_threads());
  return next < tasks.size() ? &tasks[next] : nullptr;
}

// How many queries and keys the sequences hold; packed tensors may have more.
int64_t queries_of(const Sequences& sequences) {
  int64_t n = 0;
  for (const lmk::Sequence& s : sequences) n += s.seq_q;
  return n;
}
int64_t keys_of(const Sequences& sequences) {
  int64_t n = 0;
  for (const lmk::Sequence& s : sequences) n += s.seq_k;
  return n;
}

// Writes all of out and lse.
void run_attention_fwd(lmk::AttentionArgs& a, Sequences& sequences, Tensor& out, Tensor& lse, int64_t parts) {
  check_distances(a, sequences);
  if (lse.numel() == 0) return;
  if (queries_of(sequences) * a.heads < lse.numel()) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  a.out = out.mutable_data_ptr(), a.lse = lse.mutable_data_ptr();
  constexpr int64_t kTasksPerThread = 4, kMostRows = 512, kLeastRows = 48, kCacheBytes = 256 * 1024;
  constexpr int64_t kSplitShares = 128, kSplitUnit = 64, kLeastSplit = 256;
  const lmk::AttentionKernels& kernels = lmk::attention_kernels(a.dtype, parts);
  const int64_t group = a.heads / a.heads_kv;
  const auto takes_split = [&](const lmk::Sequence& s) { return group * s.seq_q <= lmk::kFewRows; };
  int64_t all_rows = 0;
  for (const lmk::Sequence& s : sequences)
    if (!takes_split(s)) all_rows += a.heads * s.seq_q;
  // Keys are packed once per task: many rows share the cost, as long as their queries and sums stay in the L2 cache.
  const int64_t cached = kCacheBytes / ((a.head_dim + a.head_dim_v) * kernels.accumulator_size);
  const int64_t wanted = kTasksPerThread * torch::stable::get_num_threads();
  const int64_t most_share =
      std::clamp((all_rows + wanted - 1) / wanted, kLeastRows, std::min(kMostRows, std::max(kLeastRows, cached)));
  AttentionTasks tasks, splits, finishes;
  int64_t split_rows = 0;
  double flops = 0, split_work = 0;
  for (const int64_t b : longest_first(sequences)) {
    lmk::Sequence& s = sequences[b];
    const int64_t rows = group * s.seq_q;
    if (rows == 0) continue;
    if (!takes_split(s)) {
      s.parts = (rows + most_share - 1) / most_share;
      s.share = (rows + s.parts - 1) / s.parts;
      flops += attention_flops(a, s);
      add_tasks(b, a.heads_kv, s.parts, tasks);
      continue;
    }
    // shares of the keys, and with them the results, depend on the shape of one sequence alone
    s.share = std::max(kLeastSplit, (s.seq_k * a.heads_kv / kSplitShares + kSplitUnit - 1) / kSplitUnit * kSplitUnit);
    s.parts = std::max<int64_t>(1, (s.seq_k + s.share - 1) / s.share);
    s.rows_before = split_rows;
    split_work += 16 * attention_flops(a, s) / rows;  // a key costs its bytes here, not its flops
    // key heads innermost: the rows of a token are neighbours in memory
    for (int64_t part = 0; part < s.parts; ++part)
      for (int64_t hk = 0; hk < a.heads_kv; ++hk) splits.push_back({b, hk, part});
    if (s.parts == 1) continue;
    split_rows += a.heads_kv * s.parts * rows;
    add_tasks(b, a.heads_kv, 1, finishes);
  }
  a.sequence = sequences.data();
  a.most_rows = most_share;
  run_tasks(int64_t(tasks.size()), kernels.fwd_scratch(a), flops,
            [&](int64_t i, void* scratch) { kernels.fwd(a, tasks[i], next_task(tasks, i), scratch); });
  if (splits.empty()) return;
  OptionalTensor partial;
  if (split_rows > 0) {
    partial = new_tensor(lse, {split_rows * kernels.split_state(a)});
    a.partial = partial->mutable_data_ptr();
  }
  run_tasks(int64_t(splits.size()), kernels.split_scratch(a), split_work,
            [&](int64_t i, void* scratch) { kernels.split(a, splits[i], scratch); });
  run_tasks(int64_t(finishes.size()), 0, 0, [&](int64_t i, void*) { kernels.split_finish(a, finishes[i]); });
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                         const OptionalTensor& mask, const OptionalTensor& bias,
                                         const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                                         const OptionalTensor& kv_lengths, const OptionalTensor& seed, int64_t left,
                                         int64_t right, int64_t offset, double scale, double softcap, double dropout_p,
                                         int64_t parts) {
  const Tensor q = dense(q_, 4), k = dense(k_, 4), v = dense(v_, 4);
  lmk::AttentionArgs a = attention_args(
      q, k, v, {mask, bias, alibi_slopes, sink, kv_lengths, seed, left, right, scale, softcap, dropout_p}, q.size(0),
      q.size(1), k.size(1));
  Tensor out = new_tensor(q, {q.size(0), a.seq_q, a.heads, a.head_dim_v});
  Tensor lse = new_tensor(q, {q.size(0), a.heads, a.seq_q}, accumulator(q));
  Sequences sequences = batch_sequences(q, k, kv_lengths, offset);
  run_attention_fwd(a, sequences, out, lse, parts);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_fwd_plain(const Tensor& q, const Tensor& k, const Tensor& v, int64_t right,
                                               int64_t offset, double scale, int64_t parts) {
  return attention_fwd(q, k, v, {}, {}, {}, {}, {}, {}, -1, right, offset, scale, 0, 0, parts);
}

// Sets the tasks per key head of the backward, which each hold a gradient of their own for q; these are added in order.
void divide_backward(const lmk::AttentionArgs& a, const lmk::AttentionKernels& kernels, bool deterministic,
                     Sequences& sequences) {
  constexpr int64_t kMost = 16, kTasksPerThread = 4, kDeterministicTasks = 16;
  const int64_t threads = torch::stable::get_num_threads();
  double all_work = 0, most_work = 0;  // of one key head per sequence
  for (const lmk::Sequence& s : sequences) {
    const double work = double(s.seq_q) * double(s.keys);
    all_work += work, most_work = std::max(most_work, work);
  }
  const bool alike = most_work * double(sequences.size()) == all_work;
  const bool even = alike && int64_t(sequences.size()) * a.heads_kv % threads == 0;
  int64_t parts = 0, rows = 0;
  for (lmk::Sequence& s : sequences) {
    int64_t wanted = 1;
    if (deterministic)  // from the shape of one sequence alone
      wanted = (kDeterministicTasks + a.heads_kv - 1) / a.heads_kv;
    else if (!even && all_work > 0)
      wanted = int64_t(
          std::ceil(kTasksPerThread * threads * double(s.seq_q) * double(s.keys) / (all_work * double(a.heads_kv))));
    const int64_t blocks = (s.seq_k + kernels.key_block - 1) / kernels.key_block;
    s.parts = std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(blocks, 1, kMost));
    s.parts_before = parts, s.rows_before = rows;
    parts += a.heads_kv * s.parts;
    if (s.parts > 1) rows += a.heads_kv * s.parts * (a.heads / a.heads_kv * s.seq_q);
  }
}

// (n,) or (sequences, n) doubles in the accumulator's dtype
void store_sums(const std::vector<double>& sums, Tensor& x) {
  if (x.scalar_type() == ScalarType::Double)
    std::copy(sums.begin(), sums.end(), static_cast<double*>(x.mutable_data_ptr()));
  else
    std::copy(sums.begin(), sums.end(), static_cast<float*>(x.mutable_data_ptr()));
}

// With an empty tensor for each gradient that was not wanted.
AttentionGradients filled(AttentionGradients gradients, const Tensor& q) {
  for (Tensor* x : {&std::get<3>(gradients), &std::get<4>(gradients), &std::get<5>(gradients)})
    if (!x->defined()) *x = new_tensor(q, {0});
  return gradients;
}

// a holds everything but the gradients, which arrive and are written here; those that are not needed are undefined.
// q, k: as they were given, dense or packed.
AttentionGradients run_attention_bwd(lmk::AttentionArgs& a, Sequences& sequences, const OptionalTensor& dout_,
                                     const OptionalTensor& dlse_, const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& out, const Tensor& lse, const AttentionOptions& o, bool need_dbias,
                                     bool need_dslopes, bool need_dsink, bool deterministic, int64_t parts) {
  check_distances(a, sequences);
  const OptionalTensor dlse = dlse_ ? OptionalTensor(torch::stable::contiguous(*dlse_)) : dlse_;
  const Tensor dout = dout_ ? dense(*dout_, q.dim()) : torch::stable::new_zeros(out, out.sizes());
  for (const Tensor* x : {&out, &dout}) {
    bool fits = x->is_cpu() && x->dim() == q.dim() && x->scalar_type() == q.scalar_type();
    for (int64_t i = 0; fits && i < q.dim(); ++i) fits = x->size(i) == (i == q.dim() - 1 ? a.head_dim_v : q.size(i));
    STD_TORCH_CHECK(fits, "out and dout must be (b, s_q, h, d_v), or (t_q, h, d_v) when packed, in q's dtype");
  }
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  const int64_t numel = q.numel() / a.head_dim;
  a.dout = heads_of(dout);
  a.out = const_cast<void*>(out.const_data_ptr());
  a.lse = const_cast<float*>(accumulator_data(lse, q, numel));
  a.dlse = accumulator_data(dlse, q, numel);

  need_dbias &= o.bias.has_value(), need_dslopes &= o.alibi_slopes.has_value(), need_dsink &= o.sink.has_value();
  const auto gradient_of = [&](const OptionalTensor& x, bool needed) {
    return needed ? new_tensor(*x, x->sizes()) : Tensor();
  };
  Tensor dq = new_tensor(q, q.sizes()), dk = new_tensor(k, k.sizes());
  Tensor dv = new_tensor(v, v.sizes());
  Tensor dbias = gradient_of(o.bias, need_dbias), dslopes = gradient_of(o.alibi_slopes, need_dslopes);
  Tensor dsink = gradient_of(o.sink, need_dsink);
  if (lse.numel() == 0 || k.numel() == 0) {
    for (Tensor* x : {&dq, &dk, &dv, &dbias, &dslopes, &dsink})
      if (x->defined()) torch::stable::zero_(*x);
    return {dq, dk, dv, dbias, dslopes, dsink};
  }
  if (queries_of(sequences) * a.heads < lse.numel()) torch::stable::zero_(dq);
  if (keys_of(sequences) * a.heads_kv * a.head_dim < k.numel())
    for (Tensor* x : {&dk, &dv}) torch::stable::zero_(*x);
  a.dq = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();

  const lmk::AttentionKernels& kernels = lmk::attention_kernels(a.dtype, parts);
  const int64_t group = a.heads / a.heads_kv, wide = (a.head_dim + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  divide_backward(a, kernels, deterministic, sequences);
  AttentionTasks tasks, finishes;
  int64_t partial_rows = 0;
  double flops = 0;
  for (const int64_t b : longest_first(sequences)) {
    const lmk::Sequence& s = sequences[b];
    const int64_t rows = group * s.seq_q;
    a.most_rows = std::max(a.most_rows, rows);
    flops += 2.5 * attention_flops(a, s);
    add_tasks(b, a.heads_kv, s.parts, tasks);
    if (s.parts == 1) continue;
    partial_rows += a.heads_kv * s.parts * rows;
    add_tasks(b, a.heads_kv, 1, finishes);
  }
  a.sequence = sequences.data();
  Tensor dq_partial = new_tensor(q, {partial_rows * wide}, accumulator(q));
  a.dq_partial = dq_partial.mutable_data_ptr();
  std::vector<double> dslopes_partial(need_dslopes ? tasks.size() * size_t(group) : 0);
  std::vector<double> dsink_partial(need_dsink ? size_t(a.sequences * a.heads) : 0);
  a.dslopes_partial = need_dslopes ? dslopes_partial.data() : nullptr;
  a.dsink_partial = need_dsink ? dsink_partial.data() : nullptr;
  const bool need_ddistance = need_dbias && a.distances > 0;
  std::vector<double> ddistance_partial(need_ddistance ? tasks.size() * size_t(group * a.distances) : 0);
  a.ddistance_partial = need_ddistance ? ddistance_partial.data() : nullptr;
  run_tasks(int64_t(tasks.size()), kernels.bwd_scratch(a), flops,
            [&](int64_t i, void* scratch) { kernels.bwd(a, tasks[i], next_task(tasks, i), scratch); });
  run_tasks(int64_t(finishes.size()), 0, 8.0 * double(partial_rows * wide),
            [&](int64_t i, void*) { kernels.bwd_finish(a, finishes[i]); });
  if (need_dslopes) {
    std::vector<double> sums(size_t(a.slopes_batch ? a.sequences * a.heads : a.heads));
    for (int64_t b = 0; b < a.sequences; ++b)
      for (int64_t part = 0; part < a.heads_kv * sequences[b].parts; ++part)
        for (int64_t g = 0; g < group; ++g)
          sums[b * a.slopes_batch + part / sequences[b].parts * group + g] +=
              dslopes_partial[(sequences[b].parts_before + part) * group + g];
    store_sums(sums, dslopes);
  }
  if (need_dsink) {
    std::vector<double> sums(size_t(a.heads));
    for (int64_t i = 0; i < a.sequences * a.heads; ++i) sums[i % a.heads] += dsink_partial[i];
    store_sums(sums, dsink);
  }
  if (need_ddistance) {
    const int64_t n = group * a.distances;
    std::vector<double> sums(size_t(a.heads * a.distances));
    for (int64_t b = 0; b < a.sequences; ++b)
      for (int64_t part = 0; part < a.heads_kv * sequences[b].parts; ++part)
        for (int64_t i = 0; i < n; ++i)
          sums[part / sequences[b].parts * n + i] += ddistance_partial[(sequences[b].parts_before + part) * n + i];
    store_sums(sums, dbias);
  } else if (need_dbias) {
    a.dbias = dbias.mutable_data_ptr();
    a.dbias_batch = dbias.size(0), a.dbias_heads = dbias.size(1), a.dbias_q = dbias.size(2), a.dbias_k = dbias.size(3);
    const int64_t row_tasks = (a.dbias_q + kernels.dbias_rows - 1) / kernels.dbias_rows;
    const int64_t key_tasks = (a.dbias_k + kernels.dbias_keys - 1) / kernels.dbias_keys;
    run_tasks(a.dbias_batch * a.dbias_heads * row_tasks * key_tasks, kernels.dbias_scratch(a), flops,
              [&](int64_t task, void* scratch) { kernels.dbias(a, task, scratch); });
  }
  return {dq, dk, dv, dbias, dslopes, dsink};
}

AttentionGradients attention_bwd(const OptionalTensor& dout, const OptionalTensor& dlse, const Tensor& q_,
                                 const Tensor& k_, const Tensor& v_, const Tensor& out, const Tensor& lse,
                                 const OptionalTensor& mask, const OptionalTensor& bias,
                                 const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                                 const OptionalTensor& kv_lengths, const OptionalTensor& seed, int64_t left,
                                 int64_t right, int64_t offset, double scale, double softcap, double dropout_p,
                                 bool need_dbias, bool need_dslopes, bool need_dsink, bool deterministic,
                                 int64_t parts) {
  const Tensor q = dense(q_, 4), k = dense(k_, 4), v = dense(v_, 4);
  const AttentionOptions options{mask, bias,  alibi_slopes, sink,    kv_lengths, seed,
                                 left, right, scale,        softcap, dropout_p};
  lmk::AttentionArgs a = attention_args(q, k, v, options, q.size(0), q.size(1), k.size(1));
  Sequences sequences = batch_sequences(q, k, kv_lengths, offset);
  return filled(run_attention_bwd(a, sequences, dout, dlse, q, k, v, out, lse, options, need_dbias, need_dslopes,
                                  need_dsink, deterministic, parts),
                q);
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd_plain(const OptionalTensor& dout, const OptionalTensor& dlse,
                                                       const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                                       const Tensor& out, const Tensor& lse, int64_t right,
                                                       int64_t offset, double scale, bool deterministic,
                                                       int64_t parts) {
  const Tensor q = dense(q_, 4), k = dense(k_, 4), v = dense(v_, 4);
  const OptionalTensor none;
  const AttentionOptions options{none, none, none, none, none, none, -1, right, scale, 0, 0};
  lmk::AttentionArgs a = attention_args(q, k, v, options, q.size(0), q.size(1), k.size(1));
  Sequences sequences = batch_sequences(q, k, none, offset);
  const auto [dq, dk, dv, dbias, dslopes, dsink] = run_attention_bwd(
      a, sequences, dout, dlse, q, k, v, out, lse, options, false, false, false, deterministic, parts);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  m.impl("attention_fwd.plain", TORCH_BOX(&attention_fwd_plain));
  m.impl("attention_bwd.plain", TORCH_BOX(&attention_bwd_plain));
}
