// torch's side of a step of decoding: checks, plans the tasks, runs them in one parallel region. Included by
// bindings.cpp.

#include <thread>

#include "decode_step.h"
#include "quantize_weight.h"

namespace {

inline void pause_core() {
#if LMK_X86
  __builtin_ia32_pause();
#endif
}

// Runs stages of tasks: run(stage, task, next_stage, next_task, thread) with the task that the thread runs after this
// one, or a stage of -1. A task starts when all tasks of the stages before are done.
//
// Threads take tasks in their order, each one ahead. So the first task that is not done is always in the hands of a
// thread that works on it, however many threads there are and whenever they come: one that comes late, or never, holds
// nobody up.
template <class Prepare, class Run>
void run_stages(const std::vector<int64_t>& first_tasks, int64_t threads, const Prepare& prepare, const Run& run) {
  const int64_t total = first_tasks.back();
  std::atomic<int64_t> taken{0}, done{0};
  const auto work = [&](int64_t, int64_t) {
    constexpr int kSpins = 4000;  // some 100 us; then others may have the core
    auto thread = prepare();
    int64_t task = taken++, stage = 0;
    while (task < total) {
      const int64_t next = taken++;
      while (task >= first_tasks[stage + 1]) ++stage;
      int64_t next_stage = stage;
      while (next < total && next >= first_tasks[next_stage + 1]) ++next_stage;
      for (int spins = 0; done.load(std::memory_order_acquire) < first_tasks[stage]; ++spins)
        spins < kSpins ? pause_core() : std::this_thread::yield();
      run(stage, task - first_tasks[stage], next < total ? next_stage : -1, next - first_tasks[next_stage], thread);
      done.fetch_add(1, std::memory_order_release);
      task = next;
    }
  };
  if (threads <= 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, work);
}

// Reads what the schema packs into lists, in its order.
struct StepReader {
  const lmk::DecodeStepArgs& a;
  const std::vector<Tensor>& weights;
  const float* vectors;
  int64_t vectors_left;
  size_t used = 0;

  const Tensor& tensor() {
    STD_TORCH_CHECK(used < weights.size(), "weights must hold more tensors");
    return weights[used++];
  }
  const float* vector(int64_t n) {
    STD_TORCH_CHECK(n <= vectors_left, "vectors must hold more elements");
    vectors_left -= n;
    vectors += n;
    return vectors - n;
  }
  // (cols, depth) in the step's dtype and dense along an axis, or bytes and, next in the list, their scales
  lmk::StepWeight weight(int64_t cols, int64_t depth) {
    lmk::StepWeight w{};
    w.depth = depth, w.cols = cols;
    const Tensor& x = tensor();
    w.data = x.const_data_ptr();
    if (x.scalar_type() == ScalarType::Byte) {
      const Tensor& scales = tensor();
      const auto blocks = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit; };
      const int64_t panels = blocks(cols, lmk::kPanelCols), groups = blocks(depth, lmk::kWeightGroup);
      w.bits = scales.scalar_type() == ScalarType::BFloat16 ? 4 : 8;
      STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && scales.is_cpu() && scales.is_contiguous() &&
                          x.numel() == panels * lmk::kPanelCols * groups * lmk::kWeightGroup * w.bits / 8 &&
                          scales.numel() == panels * lmk::kPanelCols * (w.bits == 4 ? groups : 1) &&
                          (w.bits == 4 || scales.scalar_type() == ScalarType::Float),
                      "a quantised weight must be bytes of its size and scales, bfloat16 or float32");
      w.scales = scales.const_data_ptr();
    } else {
      STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(0) == cols && x.size(1) == depth && dtype_of(x) == a.dtype,
                      "a weight must be (out, in) in the dtype of the step");
      w.transposed = x.stride(1) != 1;
      w.row = x.stride(w.transposed ? 1 : 0);
      STD_TORCH_CHECK(x.stride(w.transposed ? 0 : 1) == 1 && w.row >= (w.transposed ? cols : depth),
                      "a weight must be dense along an axis, without overlap");
    }
    return w;
  }
};

// The logits (rows or logits_of, vocab), float32, after tokens of sequences, whose keys and values go to caches.
Tensor decode_step(const Tensor& token_ids, const Tensor& position_ids, const Tensor& starts, const Tensor& lengths,
                   std::vector<Tensor> caches, const OptionalTensor& block_table, const OptionalTensor& sequences,
                   const OptionalTensor& logits_of, std::vector<Tensor> weights, const Tensor& vectors,
                   const OptionalTensor& cos, const OptionalTensor& sin, int64_t vocab, int64_t d_model, int64_t d_ff,
                   int64_t heads, double eps, bool rms, int64_t activation, bool gated, double scale,
                   bool scale_by_layer, bool interleaved) {
  lmk::DecodeStepArgs a{};
  STD_TORCH_CHECK(!caches.empty() && weights.size() > 2, "caches and weights must not be empty");
  for (const Tensor* x : {&token_ids, &position_ids, &starts, &lengths})
    STD_TORCH_CHECK(x->is_cpu() && x->dim() == 1 && x->size(0) == token_ids.size(0) && x->is_contiguous() &&
                        x->scalar_type() == ScalarType::Long,
                    "token_ids, position_ids, starts and lengths must be contiguous int64 (rows,)");
  for (const OptionalTensor* x : {&sequences, &logits_of})
    STD_TORCH_CHECK(
        !*x || ((*x)->is_cpu() && (*x)->dim() == 1 && (*x)->is_contiguous() &&
                (*x)->scalar_type() == ScalarType::Long && (x == &logits_of || (*x)->size(0) == token_ids.size(0))),
        "sequences (rows,) and logits_of must be contiguous int64");
  const Tensor& cache = caches[0];
  a.dtype = dtype_of(cache);
  STD_TORCH_CHECK(a.dtype != lmk::DType::f64, "weights and caches must be float32, bfloat16 or float16");
  a.rows = token_ids.size(0), a.layers = int64_t(caches.size());
  a.vocab = vocab, a.d_model = d_model, a.d_ff = d_ff, a.heads = heads;
  a.rms = rms, a.eps = eps, a.interleaved = interleaved;
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(lmk::Activation::tanh), "no such activation");
  a.activation = static_cast<lmk::Activation>(activation);
  STD_TORCH_CHECK(
      vectors.is_cpu() && vectors.dim() == 1 && vectors.is_contiguous() && vectors.scalar_type() == ScalarType::Float,
      "vectors must be contiguous float32");
  StepReader read{a, weights, static_cast<const float*>(vectors.const_data_ptr()), vectors.numel()};
  a.tokens = read.weight(a.vocab, a.d_model);
  STD_TORCH_CHECK(!a.tokens.transposed, "the table of tokens must have a contiguous last axis");
  const Tensor& positions = read.tensor();
  int64_t most_positions = INT64_MAX;
  if (positions.numel()) {
    STD_TORCH_CHECK(positions.is_cpu() && positions.dim() == 2 && positions.size(1) == a.d_model &&
                        (positions.stride(1) == 1 || a.d_model == 1) && dtype_of(positions) == a.dtype,
                    "the table of positions must be (n_positions, d_model) in the dtype of the caches");
    a.positions = positions.const_data_ptr(), a.positions_row = positions.stride(0);
    most_positions = positions.size(0);
  }

  for (const Tensor& x : caches)
    STD_TORCH_CHECK(
        x.is_cpu() && x.dim() == 5 && x.size(0) == 2 && (block_table || sequences || x.size(1) >= a.rows) &&
            x.size(4) == cache.size(4) && x.size(2) == cache.size(2) && x.size(3) == cache.size(3) &&
            dtype_of(x) == a.dtype && (x.stride(4) == 1 || x.size(4) == 1) && x.stride(1) == cache.stride(1) &&
            x.stride(2) == cache.stride(2) && x.stride(3) == cache.stride(3),
        "caches must be (2, rows, h_kv, capacity, d), or with a block_table (2, num_blocks, h_kv, block_size, d), "
        "alike");
  const int64_t size = lmk::element_size(a.dtype);
  int64_t capacity = cache.size(3);
  if (block_table) {
    STD_TORCH_CHECK(block_table->is_cpu() && block_table->dim() == 2 && block_table->scalar_type() == ScalarType::Int &&
                        (sequences || block_table->size(0) == a.rows) && block_table->is_contiguous(),
                    "block_table must be contiguous int32 (rows or sequences, max_blocks)");
    a.page_size = cache.size(3), a.num_pages = cache.size(1);
    capacity = a.page_size * block_table->size(1);
  }
  a.heads_kv = cache.size(2), a.head_dim = cache.size(4);
  a.cache_row = cache.stride(1) * size, a.cache_head = cache.stride(2) * size, a.cache_token = cache.stride(3) * size;
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 256 && a.heads_kv >= 1 && heads % a.heads_kv == 0 && heads >= 1 &&
                      heads / a.heads_kv <= lmk::kStepMostGroup && d_ff >= 1 && a.d_model >= 1 && a.vocab >= 1,
                  "heads must be a multiple of h_kv, at most 64 times as many, of 1 to 256 columns");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos must be given with sin");
  if (cos) {
    for (const Tensor* x : {&*cos, &*sin})
      STD_TORCH_CHECK(x->is_cpu() && x->dim() == 2 && x->is_contiguous() && x->scalar_type() == ScalarType::Float &&
                          x->size(0) == cos->size(0) && x->size(1) == cos->size(1) && 2 * x->size(1) <= a.head_dim,
                      "cos and sin must be contiguous float32 (positions, d_rot / 2)");
    a.cos = static_cast<const float*>(cos->const_data_ptr()), a.sin = static_cast<const float*>(sin->const_data_ptr());
    a.half_rotary = cos->size(1);
    most_positions = std::min(most_positions, cos->size(0));
  }
  checked_indices(token_ids, 1, a.rows, "token_ids", a.vocab);
  checked_indices(position_ids, 1, a.rows, "position_ids", most_positions);
  checked_indices(lengths, 1, a.rows, "lengths", capacity);
  checked_indices(starts, 1, a.rows, "starts", capacity);
  if (sequences)
    checked_indices(*sequences, 1, a.rows, "sequences", block_table ? block_table->size(0) : cache.size(1));
  if (logits_of) checked_indices(*logits_of, 1, logits_of->size(0), "logits_of", a.rows);
  STD_TORCH_CHECK(!logits_of || logits_of->size(0) > 0 || a.rows == 0, "logits_of must name a row or more");
  a.appends = sequences.has_value();
  a.column_tasks = column_tasks();

  const int64_t wanted = logits_of ? logits_of->size(0) : a.rows;
  Tensor logits = new_tensor(vectors, {wanted, a.vocab}, ScalarType::Float);
  if (a.rows == 0) return logits;

  const auto data = [](const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); };
  std::vector<lmk::StepRow> rows(size_t(a.rows), lmk::StepRow{});
  int64_t keys = 0, attention_tasks = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    lmk::StepRow& row = rows[size_t(r)];
    row.token = data(token_ids)[r], row.position = data(position_ids)[r];
    row.start = data(starts)[r], row.length = data(lengths)[r];
    row.sequence = sequences ? data(*sequences)[r] : r;
    if (row.start > row.length)
      throw std::invalid_argument("starts must not lie beyond lengths, got " + std::to_string(row.start) + " and " +
                                  std::to_string(row.length));
    row.keys.total = row.length - row.start + 1, row.keys.before = row.keys.total - (a.appends ? 0 : 1);
    row.keys.share = lmk::kStepShare;
    row.keys.shares = (row.keys.total + lmk::kStepShare - 1) / lmk::kStepShare;
    row.first_task = attention_tasks;
    attention_tasks += row.keys.shares * a.heads_kv;
    keys += row.keys.total;
    if (!block_table) continue;
    if (row.start != 0) throw std::invalid_argument("starts must be 0 with a block_table");
    row.pages = static_cast<const int32_t*>(block_table->const_data_ptr()) + row.sequence * block_table->size(1);
    for (int64_t page = 0; page <= row.length / a.page_size; ++page)
      if (row.pages[page] < 0 || row.pages[page] >= a.num_pages)
        throw std::invalid_argument("block_table must lie between 0 and " + std::to_string(a.num_pages - 1) +
                                    ", got values from " + std::to_string(row.pages[page]));
  }
  a.row = rows.data();

  std::vector<lmk::StepLayer> layers(caches.size(), lmk::StepLayer{});
  const int64_t d = a.d_model, attended = heads * a.head_dim, qkv = attended + 2 * a.heads_kv * a.head_dim;
  for (size_t l = 0; l < layers.size(); ++l) {
    lmk::StepLayer& layer = layers[l];
    layer.qkv = read.weight(qkv, d);
    layer.project = read.weight(d, attended);
    layer.up = read.weight(d_ff, d);
    if (gated) layer.gate = read.weight(d_ff, d);
    layer.down = read.weight(d, d_ff);
    STD_TORCH_CHECK(!gated || (layer.gate.bits > 0) == (layer.up.bits > 0), "gate and up must be quantised alike");
    layer.norm1_weight = read.vector(d), layer.norm1_bias = read.vector(d);
    layer.qkv.bias = read.vector(qkv);
    layer.project.bias = read.vector(d);
    layer.norm2_weight = read.vector(d), layer.norm2_bias = read.vector(d);
    layer.up.bias = read.vector(d_ff);
    if (gated) layer.gate.bias = read.vector(d_ff);
    layer.down.bias = read.vector(d);
    layer.scale = scale_by_layer ? scale / double(l + 1) : scale;
    layer.k = static_cast<char*>(caches[l].mutable_data_ptr());
    layer.v = layer.k + caches[l].stride(0) * size;
  }
  a.norm_weight = read.vector(d), a.norm_bias = read.vector(d);
  a.head = read.weight(a.vocab, d);
  STD_TORCH_CHECK(!a.head.transposed || a.vocab == 1, "the head must have a contiguous last axis");
  STD_TORCH_CHECK(read.used == weights.size() && read.vectors_left == 0, "weights and vectors hold more than is read");
  a.layer = layers.data();

  // what tasks hand on, in one piece of memory
  const lmk::DecodeStepKernels& kernels = lmk::decode_step_kernels();
  std::vector<std::pair<float**, int64_t>> products;
  int64_t bytes = 0;
  const auto piece = [&](int64_t n) {
    const int64_t at = bytes;
    bytes += (n + 63) / 64 * 64;
    return at;
  };
  constexpr int64_t kFloat = sizeof(float), kSlack = 64;
  const int64_t x[] = {piece(a.rows * d * kFloat), piece(a.rows * d * kFloat)};
  const int64_t out = piece(a.rows * attended * size), lse = piece(a.rows * heads * kFloat);
  const int64_t arrived = piece(a.rows * a.heads_kv * int64_t(sizeof(int32_t)));
  int64_t partial = bytes;
  if (attention_tasks > a.rows * a.heads_kv) {
    lmk::DecodeArgs one{};
    one.heads = heads, one.heads_kv = a.heads_kv, one.seq_q = 1, one.head_dim = one.head_dim_v = a.head_dim;
    partial = piece(attention_tasks * lmk::decode_kernels(cache_type(cache)).state(one));
  }
  int64_t slots[5] = {};  // of the products of a layer, which the next layer uses again
  double work = 0;
  for (lmk::StepLayer& layer : layers) {
    lmk::StepWeight* const parts[] = {&layer.qkv, &layer.project, &layer.up, &layer.gate, &layer.down};
    for (int i = 0; i < 5; ++i) {
      lmk::StepWeight& w = *parts[i];
      w.rows = a.rows;
      kernels.share_out(a, w);
      w.product_row = (w.cols + 15) / 16 * 16;
      slots[i] = std::max(slots[i], w.chunks * a.rows * w.product_row * kFloat + kSlack);
      work += 2.0 * double(a.rows * w.depth * w.cols);
    }
  }
  a.logits_of = logits_of ? data(*logits_of) : nullptr;
  a.head.rows = wanted;
  kernels.share_out(a, a.head);
  for (int64_t& slot : slots) slot = piece(slot);
  Tensor memory = new_tensor(vectors, {bytes}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.mutable_data_ptr());
  for (lmk::StepLayer& layer : layers) {
    lmk::StepWeight* const parts[] = {&layer.qkv, &layer.project, &layer.up, &layer.gate, &layer.down};
    for (int i = 0; i < 5; ++i) parts[i]->product = reinterpret_cast<float*>(base + slots[i]);
  }
  a.head.product = static_cast<float*>(logits.mutable_data_ptr()), a.head.product_row = a.vocab;
  for (int i = 0; i < 2; ++i) a.x[i] = reinterpret_cast<float*>(base + x[i]);
  a.attended = base + out, a.lse = reinterpret_cast<float*>(base + lse), a.partial = base + partial;
  a.arrived = reinterpret_cast<int32_t*>(base + arrived);
  std::fill_n(a.arrived, a.rows * a.heads_kv, 0);

  std::vector<int64_t> first_tasks{0};
  for (int64_t stage = 0; stage < a.stages(); ++stage)
    first_tasks.push_back(first_tasks.back() + lmk::step_tasks(a, stage));
  work += 2.0 * double(wanted * d * a.vocab) + 4.0 * double(keys * a.layers * attended);
  constexpr double kWorthThreads = 1e6;  // by the measure of run_tasks, and more, as threads wait for each other
  const int64_t threads = work < kWorthThreads ? 1 : torch::stable::get_num_threads();
  const int64_t scratch_bytes = kernels.scratch(a);
  run_stages(
      first_tasks, threads, [&] { return lmk::StepThread{thread_scratch(scratch_bytes)}; },
      [&](int64_t stage, int64_t task, int64_t next_stage, int64_t next_task, lmk::StepThread& thread) {
        kernels.run(a, stage, task, next_stage, next_task, thread);
      });
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }
