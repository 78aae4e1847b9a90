// Softmax attention on the CPU: forward and backward over ranges of tasks, free of torch.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace lmk {

constexpr int64_t kFewRows = 8;  // the split path takes up to this many rows per key head

// One tensor indexed (batch, seq, head, :) with a contiguous last axis; strides in elements.
struct Heads {
  const void* data;
  int64_t batch, seq, head;
};

// One tensor that broadcasts to the scores (batch, heads, seq_q, seq_k) by strides of 0; data is null where absent.
struct ScoreMap {
  const void* data;
  int64_t batch, head, q, k;
  DType dtype;  // of a bias; a mask holds bytes
};

struct AttentionArgs {
  DType dtype;  // of q, k, v, out, dout, dq, dk, dv
  int64_t batch, heads, heads_kv, seq_q, seq_k, head_dim, head_dim_v;
  Heads q, k, v;
  ScoreMap mask, bias;
  const float* slopes;               // ALiBi, (batch or 1, heads); doubles for DType::f64, as are sink and lse
  int64_t slopes_batch;              // 0 or heads
  const float* sink;                 // (heads,)
  const int32_t* kv_lengths;         // (batch,)
  int64_t left, right, offset;       // query i sees i + offset - left <= j <= i + offset + right; -1 is unbounded
  double scale, softcap, dropout_p;  // softcap 0 and dropout_p 0 are off
  uint64_t seed;

  // forward
  void* out;               // (batch, seq_q, heads, head_dim_v), contiguous
  void* lse;               // (batch, heads, seq_q), float or double
  int64_t rows_per_task;   // query rows of one task; results do not depend on it
  int64_t keys_per_split;  // keys of one task of the split path
  void* partial;           // split path: per task, the maximum, sum and accumulator of each row

  // backward
  Heads dout;
  const void* dlse;         // (batch, heads, seq_q), contiguous, or null
  void *dq, *dk, *dv;       // contiguous, in dtype
  int64_t chunks;           // tasks per key head; each owns every chunks-th block of keys
  void* dq_partial;         // (batch, heads_kv, chunks, heads / heads_kv * seq_q, padded head_dim)
  double* dslopes_partial;  // (batch, heads_kv, chunks, heads / heads_kv) or null
  double* dsink_partial;    // (batch, heads) or null

  // gradient of the bias: (batch or 1, heads or 1, seq_q or 1, seq_k or 1), contiguous, in dtype of the bias
  void* dbias;
  int64_t dbias_batch, dbias_heads, dbias_q, dbias_k;
};

// Everything for one dtype and instruction set. Tasks are numbered from 0; scratch is aligned to 64 bytes, one per
// thread. No function allocates, throws or starts threads.
struct AttentionKernels {
  int lanes;                       // of the accumulator type
  int64_t accumulator_size;        // bytes
  int64_t key_block;               // keys of one block of the backward
  int64_t dbias_rows, dbias_keys;  // of one task of the bias' gradient

  int64_t (*fwd_scratch)(const AttentionArgs&);                    // bytes
  void (*fwd)(const AttentionArgs&, int64_t task, void* scratch);  // batch * heads_kv * ceil(rows / rows_per_task)

  // Few rows and many keys: tasks are (batch, key head, split of the keys); finish takes batch * heads_kv tasks.
  int64_t (*split_scratch)(const AttentionArgs&);
  void (*split)(const AttentionArgs&, int64_t task, void* scratch);
  void (*split_finish)(const AttentionArgs&, int64_t task);

  int64_t (*bwd_scratch)(const AttentionArgs&);
  void (*bwd)(const AttentionArgs&, int64_t task, void* scratch);  // batch * heads_kv * chunks
  void (*bwd_finish)(const AttentionArgs&, int64_t task);          // batch * heads_kv

  int64_t (*dbias_scratch)(const AttentionArgs&);
  void (*dbias)(const AttentionArgs&, int64_t task, void* scratch);  // blocks of the bias
};

const AttentionKernels& attention_kernels(DType dtype);

}  // namespace lmk
