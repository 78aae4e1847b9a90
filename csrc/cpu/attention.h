// Softmax attention on the CPU: forward and backward over ranges of tasks, free of torch.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace lmk {

constexpr int64_t kFewRows = 8;  // the split path takes up to this many rows per key head

// One sequence: where it lies in the tensors, and the tasks that its key heads are divided into.
struct Sequence {
  int64_t entry;             // of the batch axis: its own number; 0 where the tensors hold all sequences end to end
  int64_t first_q, first_k;  // positions of its first query and key on the seq axis
  int64_t seq_q, seq_k;
  int64_t keys;          // the keys after so many of seq_k are hidden
  int64_t offset;        // query i sees i + offset - left <= j <= i + offset + right; -1 is unbounded
  int64_t parts, share;  // tasks per key head; what one takes: query rows (forward), keys (split)
  int64_t parts_before;  // tasks of earlier sequences
  int64_t rows_before;   // rows of partial results of earlier sequences
};

struct AttentionTask {
  int64_t sequence, head_kv, part;
};

// One tensor indexed (batch, seq, head, :) with a contiguous last axis; strides in elements.
struct Heads {
  const void* data;
  int64_t batch, seq, head;
};

// One tensor that broadcasts to the scores (sequence, heads, seq_q, seq_k) by strides of 0; data is null where absent.
struct ScoreMap {
  const void* data;
  int64_t batch, head, q, k;
  DType dtype;     // of a bias; a mask holds bytes
  int64_t offset;  // stride of the sequence's offset: a bias by distance depends on j - i - offset alone
};

struct AttentionArgs {
  DType dtype;  // of q, k, v, out, dout, dq, dk, dv
  int64_t sequences, heads, heads_kv, head_dim, head_dim_v;
  int64_t seq_q, seq_k;      // the tensors' seq axes: of all sequences together where they lie end to end
  const Sequence* sequence;  // (sequences,)
  int64_t most_rows;         // of one task; scratch is made for it
  Heads q, k, v;
  ScoreMap mask, bias;
  const float* slopes;               // ALiBi, (sequences or 1, heads); doubles for DType::f64, as are sink and lse
  int64_t slopes_batch;              // 0 or heads
  const float* sink;                 // (heads,)
  int64_t left, right;               // window around the diagonal
  double scale, softcap, dropout_p;  // softcap 0 and dropout_p 0 are off
  uint64_t seed;

  // forward
  void* out;      // (batch, seq_q, heads, head_dim_v), contiguous
  void* lse;      // (batch, heads, seq_q), float or double
  void* partial;  // split path: the state of each row of every task of a key head with several

  // backward
  Heads dout;
  const void* dlse;         // (batch, heads, seq_q), contiguous, or null
  void *dq, *dk, *dv;       // contiguous, in dtype
  void* dq_partial;         // (rows of every task of a key head with several, padded head_dim)
  double* dslopes_partial;  // (tasks, heads / heads_kv) or null
  double* dsink_partial;    // (sequences, heads) or null

  // gradient of a bias by distance j - i - offset, from -most_k to most_q - 1: (tasks, heads / heads_kv, distances)
  double* ddistance_partial;  // or null
  int64_t distances, most_k;

  // gradient of the bias: (sequences or 1, heads or 1, seq_q or 1, seq_k or 1), contiguous, in dtype of the bias
  void* dbias;
  int64_t dbias_batch, dbias_heads, dbias_q, dbias_k;
};

// Everything for one dtype and instruction set. Scratch is aligned to 64 bytes, one per thread. No function allocates,
// throws or starts threads.
struct AttentionKernels {
  int lanes;                       // of the accumulator type
  int64_t accumulator_size;        // bytes
  int64_t key_block;               // keys of one block of the backward
  int64_t dbias_rows, dbias_keys;  // of one task of the bias' gradient

  // A task is a share of a key head's query rows. Results do not depend on the share. next, or null, is what this
  // thread will probably run then: its rows are fetched meanwhile.
  int64_t (*fwd_scratch)(const AttentionArgs&);  // bytes
  void (*fwd)(const AttentionArgs&, const AttentionTask&, const AttentionTask* next, void* scratch);

  // Few rows and many keys: a task is a share of the keys. Finish is called, with part 0, once per key head that has
  // several tasks.
  int64_t (*split_scratch)(const AttentionArgs&);
  int64_t (*split_state)(const AttentionArgs&);  // elements of a row in partial
  void (*split)(const AttentionArgs&, const AttentionTask&, void* scratch);
  void (*split_finish)(const AttentionArgs&, const AttentionTask&);

  // A task is every parts-th block of keys. Finish is called, with part 0, once per key head that has several tasks.
  int64_t (*bwd_scratch)(const AttentionArgs&);
  void (*bwd)(const AttentionArgs&, const AttentionTask&, const AttentionTask* next, void* scratch);
  void (*bwd_finish)(const AttentionArgs&, const AttentionTask&);

  int64_t (*dbias_scratch)(const AttentionArgs&);
  void (*dbias)(const AttentionArgs&, int64_t task, void* scratch);  // blocks of the bias
};

// parts: the bfloat16 whose sum a factor in float32 may be rounded to; 3 round nothing, fewer are taken for 2. Kernels
// that do not multiply it in parts take it as it is.
const AttentionKernels& attention_kernels(DType dtype, int64_t parts);

}  // namespace lmk
