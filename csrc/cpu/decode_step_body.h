// A step of decoding for one instruction set; included by decode_step.cpp through foreach_isa.h. The products and the
// attention are those of skinny.h, quantize_weight.h and attention_decode.h; what stands between them is here.

#include "vec.h"
#include "vecmath.h"
#include "activation_body.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "passes.h"
#include "rotate.h"

namespace lmk {
namespace LMK_NS {
namespace {

using F = Vec<float>;
constexpr int64_t kSlack = 16;  // floats behind a row that whole vectors may touch

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline bool is_whole_row(const StepWeight& w) { return w.chunks == 1; }

inline int64_t packed_row(const SkinnyKernels& kernels, int64_t depth) {
  // an odd number of cache lines: rows a multiple of 4096 bytes apart would share the sets of the L1 cache
  const int64_t line = 64 / kernels.packed_size;
  return (round_up(round_up(depth, kernels.packed_unit), line) / line | 1) * line;
}

inline QuantizedArgs quantized_args(const StepWeight& w) {
  QuantizedArgs q{};
  q.dtype = DType::f32;
  q.bits = w.bits;
  q.rows = q.rows_per_task = w.rows, q.depth = w.depth, q.cols = w.cols;
  q.data = static_cast<const uint8_t*>(w.data), q.scales = w.scales;
  q.padded = round_up(w.depth, kWeightGroup), q.levels_row = levels_row(w.depth);
  q.groups = (q.padded + (w.bits == 4 ? kWeightGroup : kByteGroup) - 1) / (w.bits == 4 ? kWeightGroup : kByteGroup);
  q.panels_per_task = w.task_cols / kPanelCols;
  q.streams = prefers_streams();
  return q;
}

inline SkinnyArgs skinny_args(const DecodeStepArgs& a, const StepWeight& w) {
  SkinnyArgs s{};
  s.dtype = a.dtype;
  s.rows = w.rows, s.depth = is_whole_row(w) ? w.depth : w.sum_depth, s.cols = w.cols;
  s.transposed = w.transposed, s.weight_row = w.row, s.sum_depth = w.sum_depth;
  s.streams = prefers_streams();
  return s;
}

// sum_depth comes from the weight's shape alone, as it decides the order of the sums. For one row a task then takes one
// sum, as memory is read best in order; more rows would leave too much to be added up.
void share_out(const DecodeStepArgs& a, StepWeight& w) {
  constexpr int64_t kBytes = 128 * 1024, kRowsBytes = 512 * 1024, kRun = 4096, kDepth = 32;
  const int64_t element = element_size(a.dtype);
  w.sum_depth = w.depth, w.task_cols = w.cols;
  if (w.cols == 0) {
    w.chunks = w.blocks = 0;
    return;
  }
  if (w.bits) {
    const int64_t panel_bytes = kPanelCols * round_up(w.depth, kWeightGroup) * w.bits / 8;
    const int64_t unit = prefers_streams() && w.bits == 8 && w.rows == 1 ? kStreams : 2;
    w.task_cols = round_up((kBytes / 4 + panel_bytes - 1) / panel_bytes, unit) * kPanelCols;
  } else if (!w.transposed) {
    w.task_cols = round_up((kRowsBytes + w.depth * element - 1) / (w.depth * element), 32);
  } else {
    // parts of the weight's rows that fill pages
    const int64_t runs = most(1, w.cols * element / kRun);
    w.task_cols = least(round_up((w.cols + runs - 1) / runs, 64), w.cols);
    w.sum_depth = least(round_up((kBytes + w.task_cols * element - 1) / (w.task_cols * element), kDepth), w.depth);
    if (w.rows > 1) w.task_cols = least(round_up((w.cols + a.column_tasks - 1) / a.column_tasks, 64), w.cols);
  }
  w.chunks = w.rows > 1 ? 1 : (w.depth + w.sum_depth - 1) / w.sum_depth;
  w.blocks = (w.cols + w.task_cols - 1) / w.task_cols;
}

inline CacheType cache_type(DType dtype) { return static_cast<CacheType>(static_cast<int>(dtype)); }

// What the attention of one row has in common with that of the others. `staged`: q, k and v of the row, in dtype.
DecodeArgs attention_args(const DecodeStepArgs& a, const StepLayer& layer, const StepRow& row, void* staged) {
  const int64_t size = element_size(a.dtype), head = a.head_dim * size, r = &row - a.row;
  const int64_t cached = row.pages ? 0 : row.sequence * a.cache_row + row.start * a.cache_token;
  char* q = static_cast<char*>(staged);
  DecodeArgs d{};
  d.dtype = a.dtype;
  d.batch = d.seq_q = d.seq_new = 1;  // none is new where keys.before counts it already
  d.heads = a.heads, d.heads_kv = a.heads_kv, d.head_dim = d.head_dim_v = a.head_dim;
  d.sequences = &row.keys;
  d.most_shares = row.keys.shares;
  d.q = {q, 0, 0, head};
  d.k_new = {q + a.heads * head, 0, 0, head};
  d.v_new = {q + (a.heads + a.heads_kv) * head, 0, 0, head};
  d.k = {layer.k + cached, a.cache_row, a.cache_token, a.cache_head};
  d.v = {layer.v + cached, a.cache_row, a.cache_token, a.cache_head};
  d.block_table = row.pages, d.block_size = a.page_size, d.num_blocks = a.num_pages;
  d.scale = layer.scale;
  d.left = -1;
  d.out = static_cast<char*>(a.attended) + r * a.heads * head;
  d.lse = a.lse + r * a.heads;
  return d;
}

inline const StepRow& row_of_task(const DecodeStepArgs& a, int64_t task) {
  int64_t r = a.rows - 1;
  while (a.row[r].first_task > task) --r;
  return a.row[r];
}

// The memory of one thread; with a null base it only counts.
struct StepScratch {
  float *normed, *values;  // (rows, d_model), and one row of any length
  void* packed;            // the input of a stage as the products read it
  int8_t* levels;          // the same in integers
  int32_t* sums;
  float* x_scales;
  void* staged;  // q, k and v of one row
  void* kernel;  // of the products, of the norm and of the attention
  int64_t bytes;

  StepScratch(const DecodeStepArgs& a, void* base) {
    const SkinnyKernels& skinny = skinny_kernels(a.dtype);
    const int64_t attended = a.heads * a.head_dim, qkv = attended + 2 * a.heads_kv * a.head_dim;
    const int64_t depth = most(most(a.d_model, a.d_ff), attended);
    Arena arena(base);
    normed = arena.take<float>(a.rows * a.d_model + kSlack);
    values = arena.take<float>(2 * (most(depth, qkv) + kSlack));
    packed = arena.take<char>(a.rows * packed_row(skinny, depth) * skinny.packed_size);
    levels = arena.take<int8_t>(a.rows * levels_row(depth));
    sums = arena.take<int32_t>(a.rows * round_up(depth, kWeightGroup) / kWeightGroup);
    x_scales = arena.take<float>(a.rows);
    staged = arena.take<char>(qkv * element_size(a.dtype));

    kernel = arena.take<char>(0);
    bytes = arena.used();
  }
};

// Of any product, of the norm and of attention, which never run at once.
int64_t kernel_scratch(const DecodeStepArgs& a) {
  const SkinnyKernels& skinny = skinny_kernels(a.dtype);
  const QuantizedKernels& quantized = quantized_kernels();
  NormArgs norm{};
  norm.dtype = DType::f32, norm.rows = 1, norm.cols = a.d_model;
  int64_t bytes = layer_norm_kernels(DType::f32).scratch(norm);
  bytes = most(bytes, decode_kernels(cache_type(a.dtype)).scratch(attention_args(a, a.layer[0], a.row[0], nullptr)));
  const auto product = [&](const StepWeight& w) {
    if (w.cols == 0) return;
    if (w.bits) {
      const QuantizedArgs q = quantized_args(w);
      bytes = most(bytes, most(quantized.pack_scratch(q), quantized.scratch(q)));
    } else {
      bytes = most(bytes, skinny.scratch(skinny_args(a, w), w.task_cols));
    }
  };
  product(a.head);
  for (int64_t l = 0; l < a.layers; ++l) {
    const StepLayer& layer = a.layer[l];
    for (const StepWeight* w : {&layer.qkv, &layer.project, &layer.up, &layer.gate, &layer.down}) product(*w);
  }
  return bytes;
}

int64_t step_scratch(const DecodeStepArgs& a) { return StepScratch(a, nullptr).bytes + kernel_scratch(a); }

// dst (n,) = columns [first, first + n) of a row of the product; whole vectors are written.
void add_chunks(const StepWeight& w, int64_t row, int64_t first, int64_t n, float* dst) {
  const float* src = w.product + row * w.product_row + first;
  const int64_t chunk = w.rows * w.product_row;
  for (int64_t i = 0; i < n; i += F::kLanes) {
    F sum = F::load(src + i);
    for (int64_t c = 1; c < w.chunks; ++c) sum = sum + F::load(src + c * chunk + i);
    sum.store(dst + i);
  }
}

// Whether a product ends in the activation: it must be known as a whole, and not wait for a gate.
inline bool is_activated(const StepLayer& layer) {
  return layer.gate.cols == 0 && layer.up.sum_depth == layer.up.depth;
}

// dst (n,) = columns [first, first + n) of the hidden layer
void gather_hidden(const DecodeStepArgs& a, const StepLayer& layer, int64_t row, int64_t first, int64_t n, float* dst,
                   float* gate) {
  add_chunks(layer.up, row, first, n, dst);
  if (layer.gate.cols) {
    add_chunks(layer.gate, row, first, n, gate);
    for (int64_t i = 0; i < n; i += F::kLanes)
      (activate<float>(a.activation, F::load(gate + i)) * F::load(dst + i)).store(dst + i);
  } else if (!is_activated(layer)) {
    for (int64_t i = 0; i < n; i += F::kLanes) activate<float>(a.activation, F::load(dst + i)).store(dst + i);
  }
}

// The part [first, first + n) of a row of the input of a product, as the product reads it.
void pack_part(const DecodeStepArgs& a, const StepWeight& w, const StepScratch& s, int64_t row, int64_t first,
               int64_t n, const float* x) {
  if (w.bits) {
    QuantizedArgs q = quantized_args(w);
    q.x = x;
    q.levels = s.levels, q.sums = s.sums, q.x_scales = s.x_scales;
    quantized_kernels().pack_x(q, row, s.kernel);
    return;
  }
  const SkinnyKernels& skinny = skinny_kernels(a.dtype);
  const int64_t ld = packed_row(skinny, w.depth), end = first + n == w.depth ? ld : first + n;
  if (skinny.packed_size == 4) {
    float* dst = static_cast<float*>(s.packed) + row * ld;
    copy_row(x, n, dst + first);
    for (int64_t i = first + n; i < end; ++i) dst[i] = 0;
  } else {
    Bf16* dst = static_cast<Bf16*>(s.packed) + row * ld;
    for (int64_t i = 0; i < n; i += F::kLanes) store_up_to(load_up_to(x + i, n - i), n - i, dst + first + i);
    for (int64_t i = first + n; i < end; ++i) dst[i] = {0};
  }
}

// x (d_in,) = a row of a quantised weight
void load_quantized(const StepWeight& w, int64_t index, float* x) {
  const int64_t panel = index / kPanelCols, column = index % kPanelCols, groups = round_up(w.depth, kWeightGroup);
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * groups * kPanelCols * w.bits / 8;
  for (int64_t k = 0; k < w.depth; ++k) {
    const int64_t group = k / kWeightGroup, in = k % kWeightGroup;
    if (w.bits == 8) {
      const int level = data[(k / 4 * kPanelCols + column) * 4 + k % 4];
      x[k] = float(level - 128) * static_cast<const float*>(w.scales)[index];
    } else {
      const int both = data[((group * 4 + in % 16 / 4) * kPanelCols + column) * 4 + k % 4];
      const uint16_t* scales = static_cast<const uint16_t*>(w.scales) + panel * groups / kWeightGroup * kPanelCols;
      const float scale = from_bits(uint32_t(scales[group * kPanelCols + column]) << 16);
      x[k] = float((in < 16 ? both & 15 : both >> 4) - 8) * scale;
    }
  }
}

void embed_row(const DecodeStepArgs& a, const StepRow& row, float* x, float* position) {
  const int64_t size = element_size(a.dtype);
  if (a.tokens.bits)
    load_quantized(a.tokens, row.token, x);
  else
    load_row(a.dtype, static_cast<const char*>(a.tokens.data) + row.token * a.tokens.row * size, a.d_model, x);
  if (!a.positions) return;
  load_row(a.dtype, static_cast<const char*>(a.positions) + row.position * a.positions_row * size, a.d_model, position);
  for (int64_t i = 0; i < a.d_model; ++i) x[i] += position[i];
}

// The residual stream before the norm of a stage, normed and packed for `w`. The thread that `keeps` it hands it on.
void prepare_normed(const DecodeStepArgs& a, int64_t stage, const StepWeight& w, bool keeps, const StepScratch& s) {
  const StepPart part = step_part(a, stage);
  const int64_t l = stage / kStepParts, d = a.d_model, number = 2 * l + (part == StepPart::up);
  const float *before = a.x[(number + 1) % 2], *weight = a.norm_weight, *bias = a.norm_bias;
  if (part == StepPart::qkv) weight = a.layer[l].norm1_weight, bias = a.layer[l].norm1_bias;
  if (part == StepPart::up) weight = a.layer[l].norm2_weight, bias = a.layer[l].norm2_bias;
  NormArgs norm{};
  norm.dtype = DType::f32;
  norm.rows = 1, norm.cols = d;
  norm.weight = {weight, DType::f32}, norm.bias = {bias, DType::f32};
  norm.eps = a.eps;
  for (int64_t i = 0; i < w.rows; ++i) {
    const int64_t r = part == StepPart::head && a.logits_of ? a.logits_of[i] : i;
    float *x = s.values, *y = s.normed + i * d;
    if (number == 0) {
      embed_row(a, a.row[r], x, y);
    } else {
      add_chunks(part == StepPart::up ? a.layer[l].project : a.layer[l - 1].down, r, 0, d, x);
      for (int64_t c = 0; c < d; ++c) x[c] += before[r * d + c];
    }
    if (keeps) memcpy(a.x[number % 2] + r * d, x, size_t(d) * sizeof(float));
    norm.x = {x, d, DType::f32};
    norm.y = y;
    (a.rms ? rms_norm_kernels : layer_norm_kernels)(DType::f32).fwd(norm, 0, 1, s.kernel);
    pack_part(a, w, s, i, 0, d, y);
  }
}

// Makes the input of a task of the projections that follow attention and the activation: of the part of the depth that
// the task reads, or, once per stage, of all.
void prepare_part(const DecodeStepArgs& a, int64_t stage, const StepWeight& w, int64_t task, const StepScratch& s) {
  const StepLayer& layer = a.layer[stage / kStepParts];
  const int64_t first = is_whole_row(w) ? 0 : task / w.blocks * w.sum_depth;
  const int64_t n = is_whole_row(w) ? w.depth : least(w.sum_depth, w.depth - first);
  for (int64_t r = 0; r < a.rows; ++r) {
    if (step_part(a, stage) == StepPart::project)
      load_row(a.dtype, static_cast<const char*>(a.attended) + (r * w.depth + first) * element_size(a.dtype), n,
               s.values);
    else
      gather_hidden(a, layer, r, first, n, s.values, s.values + round_up(n, kSlack));
    pack_part(a, w, s, r, first, n, s.values);
  }
}

// The memory that a task reads first.
Ahead memory_of(const DecodeStepArgs& a, int64_t stage, int64_t task);

Ahead memory_of(const DecodeStepArgs& a, const StepWeight& w, int64_t task) {
  const int64_t block = task % w.blocks, chunk = task / w.blocks;
  const char* data = static_cast<const char*>(w.data);
  if (w.bits) {
    const int64_t run = round_up(w.depth, kWeightGroup) * w.task_cols * w.bits / 8;
    return {data + block * run, run, run};
  }
  const int64_t size = element_size(a.dtype);
  if (w.transposed)
    return {data + (chunk * w.sum_depth * w.row + block * w.task_cols) * size, w.task_cols * size, w.row * size};
  return {data + block * w.task_cols * w.row * size, w.depth * size, w.row * size};
}

// One task of a product; activation: what it ends in.
void multiply(const DecodeStepArgs& a, const StepWeight& w, int64_t task, Activation activation, Ahead next,
              const StepScratch& s) {
  const int64_t block = task % w.blocks, chunk = task / w.blocks;
  Epilogue e{};
  e.dtype = e.bias_dtype = DType::f32;
  e.out = w.product + chunk * w.rows * w.product_row, e.out_row = w.product_row;
  e.activation = activation;
  if (w.bits) {
    QuantizedArgs q = quantized_args(w);
    q.levels = s.levels, q.sums = s.sums, q.x_scales = s.x_scales;
    q.epilogue = e, q.epilogue.bias = w.bias;
    q.next = next;
    quantized_kernels().run(q, block, s.kernel);
    return;
  }
  const SkinnyKernels& skinny = skinny_kernels(a.dtype);
  const int64_t col = block * w.task_cols, cols = least(w.task_cols, w.cols - col);
  const int64_t depth = chunk * w.sum_depth;
  SkinnyArgs k = skinny_args(a, w);
  k.depth = is_whole_row(w) ? w.depth : least(w.sum_depth, w.depth - depth), k.sum_depth = w.sum_depth;
  k.weight = static_cast<const char*>(w.data) + (w.transposed ? depth * w.row : 0) * element_size(a.dtype);
  k.packed = static_cast<const char*>(s.packed) + depth * skinny.packed_size;
  k.packed_row = packed_row(skinny, w.depth);
  k.epilogue = e;
  if (chunk == 0) k.epilogue.bias = w.bias;
  k.next = next;
  skinny.run(k, col, cols, s.kernel);
}

// One head of q or k, rotated, in dtype.
void stage_head(const DecodeStepArgs& a, const StepRow& row, const float* x, float* rotated, char* dst) {
  if (a.cos) {
    const int64_t pairs = a.half_rotary;
    const float *cos = a.cos + row.position * pairs, *sin = a.sin + row.position * pairs;
    if (a.interleaved) {
      float c[256], s[256];
      copy_row(cos, pairs, c), copy_row(sin, pairs, s);
      repeat_angles(pairs, c, s);
      rotate_pairs(x, c, s, 2 * pairs, rotated);
    } else {
      rotate_halves(x, cos, sin, pairs, rotated);
    }
    copy_row(x + 2 * pairs, a.head_dim - 2 * pairs, rotated + 2 * pairs);
    x = rotated;
  }
  store_row(a.dtype, x, a.head_dim, dst);
}

// The key and the value of one head, rotated, in dtype.
void stage_new(const DecodeStepArgs& a, const StepLayer& layer, const StepRow& row, int64_t hk, const StepScratch& s) {
  const int64_t d = a.head_dim, size = element_size(a.dtype), r = &row - a.row;
  const int64_t key = (a.heads + hk) * d, value = key + a.heads_kv * d;
  char* staged = static_cast<char*>(s.staged);
  add_chunks(layer.qkv, r, key, d, s.values);
  stage_head(a, row, s.values, s.values + round_up(d, kSlack), staged + key * size);
  add_chunks(layer.qkv, r, value, d, s.values);
  store_row(a.dtype, s.values, d, staged + value * size);
}

void append(const DecodeStepArgs& a, const StepLayer& layer, const StepRow& row, const StepScratch& s) {
  DecodeArgs args = attention_args(a, layer, row, s.staged);
  DecodeSequence keys = row.keys;
  keys.before = keys.total - 1;
  args.sequences = &keys;
  for (int64_t hk = 0; hk < a.heads_kv; ++hk) {
    stage_new(a, layer, row, hk, s);
    decode_kernels(cache_type(a.dtype)).append(args, hk, s.kernel);
  }
}

void attend(const DecodeStepArgs& a, const StepLayer& layer, int64_t task, const StepScratch& s) {
  const StepRow& row = row_of_task(a, task);
  const int64_t r = &row - a.row, index = task - row.first_task, hk = index % a.heads_kv, share = index / a.heads_kv;
  const int64_t d = a.head_dim, group = a.heads / a.heads_kv, size = element_size(a.dtype);
  char* staged = static_cast<char*>(s.staged);
  float* rotated = s.values + round_up(group * d, kSlack);
  add_chunks(layer.qkv, r, hk * group * d, group * d, s.values);
  for (int64_t h = 0; h < group; ++h)
    stage_head(a, row, s.values + h * d, rotated, staged + (hk * group + h) * d * size);
  if (!a.appends && share == row.keys.shares - 1) stage_new(a, layer, row, hk, s);  // it is appended with its share
  const DecodeKernels& kernels = decode_kernels(cache_type(a.dtype));
  DecodeArgs args = attention_args(a, layer, row, staged);
  args.partial = a.partial + row.first_task * kernels.state(args);
  kernels.attend(args, index, s.kernel);
  if (row.keys.shares > 1) {
    // the last share of a head to be done joins them
    const int32_t arrived = __atomic_add_fetch(&a.arrived[r * a.heads_kv + hk], 1, __ATOMIC_ACQ_REL);
    if (arrived % row.keys.shares == 0) kernels.finish(args, hk);
  }
}

Ahead memory_of(const DecodeStepArgs& a, int64_t stage, int64_t task) {
  if (stage < 0) return {};
  const StepPart part = step_part(a, stage);
  if (part == StepPart::head) return memory_of(a, a.head, task);
  const StepLayer& layer = a.layer[stage / kStepParts];
  switch (part) {
    case StepPart::qkv:
      return memory_of(a, layer.qkv, task);
    case StepPart::attend: {
      const StepRow& row = row_of_task(a, task);
      const int64_t index = task - row.first_task;
      const int64_t at = row.start + index / a.heads_kv * row.keys.share;
      const int64_t outer = row.pages ? row.pages[at / a.page_size] : row.sequence,
                    slot = row.pages ? at % a.page_size : at;
      return {layer.k + outer * a.cache_row + index % a.heads_kv * a.cache_head + slot * a.cache_token,
              a.head_dim * element_size(a.dtype), a.cache_token};
    }
    case StepPart::append:
      return {};
    case StepPart::project:
      return memory_of(a, layer.project, task);
    case StepPart::up:
      return task < layer.up.tasks() ? memory_of(a, layer.up, task) : memory_of(a, layer.gate, task - layer.up.tasks());
    default:
      return memory_of(a, layer.down, task);
  }
}

void run_step(const DecodeStepArgs& a, int64_t stage, int64_t task, int64_t next_stage, int64_t next_task,
              StepThread& thread) {
  const StepScratch s(a, thread.scratch);
  const StepPart part = step_part(a, stage);
  const Ahead next = memory_of(a, next_stage, next_task);
  const StepLayer& layer = a.layer[part == StepPart::head ? 0 : stage / kStepParts];
  if (part == StepPart::append) return append(a, layer, a.row[task], s);
  if (part == StepPart::attend) return attend(a, layer, task, s);
  const bool gate = part == StepPart::up && task >= layer.up.tasks();
  const StepWeight& w = part == StepPart::head      ? a.head
                        : part == StepPart::qkv     ? layer.qkv
                        : part == StepPart::project ? layer.project
                        : part == StepPart::down    ? layer.down
                        : gate                      ? layer.gate
                                                    : layer.up;
  const bool normed = part != StepPart::project && part != StepPart::down;
  if (normed) {
    // up and gate read the same
    if (thread.prepared != stage) prepare_normed(a, stage, w, task == 0, s);
  } else if (thread.prepared != stage || !is_whole_row(w)) {
    prepare_part(a, stage, w, task, s);
  }
  thread.prepared = stage;
  const bool activated = part == StepPart::up && is_activated(layer);
  multiply(a, w, gate ? task - layer.up.tasks() : task, activated ? a.activation : Activation::none, next, s);
}

constexpr DecodeStepKernels kDecodeStep[] = {{share_out, step_scratch, run_step}};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
