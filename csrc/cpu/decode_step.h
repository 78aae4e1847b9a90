// A decoder-only transformer, from token ids to logits, for a few new tokens of some sequences. Free of torch.
//
// A layer is x += project(attend(qkv(norm1(x)))), x += down(f(up(norm2(x)))), where f is an activation or, with a gate,
// activation(gate(norm2(x))) times its argument. A step goes through six stages per layer and one for the head. A
// stage is a number of tasks that may run in any order on any threads; a task may run when all tasks of the stages
// before are done. What a stage needs of x as a whole (a norm, the range of a row) every thread computes for itself: it
// costs less than to wait for another.
#pragma once

#include <cstdint>

#include "activation.h"
#include "attention_decode.h"
#include "dtypes.h"
#include "fetch.h"
#include "indices.h"

namespace lmk {

constexpr int64_t kStepParts = 6;       // stages of a layer: qkv, append, attend, project, up, down
constexpr int64_t kStepShare = 256;     // keys of a task; from the sequence alone, as results depend on it
constexpr int64_t kStepMostGroup = 64;  // query heads per key head

// A matrix that x is multiplied with, and how its product is shared out.
struct StepWeight {
  int bits;         // 8 or 4 as in quantize_weight.h, 0 for the dtype of the step
  bool transposed;  // (depth, cols) with contiguous columns, else (cols, depth)
  const void *data, *scales;
  int64_t depth, cols, row;  // row: stride in elements
  int64_t rows;              // of x
  const float* bias;         // (cols,)

  int64_t sum_depth;       // sums over so much of the depth are added up in their order
  int64_t chunks, blocks;  // tasks along the depth, of one such sum each or of all, and along the columns
  int64_t task_cols;
  float* product;  // (chunks, rows, product_row), which the next stage adds up, or the logits (rows, cols)
  int64_t product_row;

  int64_t tasks() const { return chunks * blocks; }
};

struct StepLayer {
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;  // (d_model,)
  StepWeight qkv, project, up, gate, down;                             // gate has no columns where there is none
  double scale;                                                        // of the scores
  char *k, *v;                                                         // the cache
};

// A new token of a sequence.
struct StepRow {
  int64_t token, position;
  int64_t sequence;  // the row of the cache, where sequences have no pages
  int64_t start;     // the first slot of the cache that it sees; it goes to slot `length`
  int64_t length;
  DecodeSequence keys;   // of the slots from `start` on
  const int32_t* pages;  // slot j is slot j % page_size of page pages[j / page_size]; null: of row `sequence`
  int64_t first_task;    // of its attention
};

struct DecodeStepArgs {
  DType dtype;  // of the cache, and of weights and tables that are not quantised
  int64_t rows, layers, d_model, d_ff, heads, heads_kv, head_dim, vocab;
  bool rms;  // norms are RMS norms
  double eps;
  Activation activation;
  StepWeight tokens;      // the table (vocab, d_model)
  const void* positions;  // the table (:, d_model) in dtype, or null
  int64_t positions_row;
  const float *cos, *sin;  // (:, half_rotary), contiguous, or null
  int64_t half_rotary;
  bool interleaved;
  int64_t cache_row, cache_head, cache_token;  // strides of every k and v, in bytes; cache_row is that of a page
  int64_t page_size, num_pages;                // where sequences have pages
  // Whether a sequence may have several tokens, which see those before them. Then all are appended before any attends;
  // else each by its own attention, without a stage more.
  bool appends;
  const StepRow* row;      // (rows,)
  const StepLayer* layer;  // (layers,)
  const float *norm_weight, *norm_bias;
  StepWeight head;
  const int64_t* logits_of;  // (head.rows,) the rows whose logits are wanted, or null: all
  int64_t column_tasks;      // that share a weight whose columns are neighbours, where it meets several rows

  // what the tasks of a step hand on
  float* x[2];       // (rows, d_model): the residual stream, before the norms of even and of odd number
  void* attended;    // (rows, heads * head_dim) in dtype
  float* lse;        // (rows, heads)
  char* partial;     // a state per task of attention
  int32_t* arrived;  // (rows, heads_kv), 0 at first: shares that are done, of all layers

  int64_t stages() const { return layers * kStepParts + 1; }
  int64_t attention_tasks() const { return row[rows - 1].first_task + row[rows - 1].keys.shares * heads_kv; }
};

enum class StepPart : int { qkv, append, attend, project, up, down, head };

inline StepPart step_part(const DecodeStepArgs& a, int64_t stage) {
  return stage == a.layers * kStepParts ? StepPart::head : static_cast<StepPart>(stage % kStepParts);
}

inline int64_t step_tasks(const DecodeStepArgs& a, int64_t stage) {
  const StepPart part = step_part(a, stage);
  if (part == StepPart::head) return a.head.tasks();
  const StepLayer& layer = a.layer[stage / kStepParts];
  switch (part) {
    case StepPart::qkv:
      return layer.qkv.tasks();
    case StepPart::append:
      return a.appends ? a.rows : 0;
    case StepPart::attend:
      return a.attention_tasks();
    case StepPart::project:
      return layer.project.tasks();
    case StepPart::up:
      return layer.up.tasks() + layer.gate.tasks();
    default:
      return layer.down.tasks();
  }
}

// What a thread keeps from one task to the next.
struct StepThread {
  void* scratch;
  int64_t prepared = -1;  // the stage whose input is in the scratch
};

// For one instruction set. No function allocates, throws or starts threads. Neither the threads nor the other rows
// change the bits of a result.
struct DecodeStepKernels {
  void (*share_out)(const DecodeStepArgs&, StepWeight&);  // sum_depth, task_cols, chunks, blocks
  int64_t (*scratch)(const DecodeStepArgs&);              // bytes of a thread
  // a stage and a task of it, and those that the thread will run next: a stage of -1 if none
  void (*run)(const DecodeStepArgs&, int64_t stage, int64_t task, int64_t next_stage, int64_t next_task, StepThread&);
};

const DecodeStepKernels& decode_step_kernels();

}  // namespace lmk
