// Cross entropy of a linear layer's logits on the CPU, chunk by chunk of tokens: free of torch.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "matrix.h"

namespace lmk {

// One chunk of tokens. T is float, or double for DType::f64. Ignored tokens are in no chunk.
struct LossArgs {
  int64_t vocab, depth;
  DType compute;       // of hidden
  int64_t parts;       // of loss_kernels
  const void* hidden;  // rows of depth elements
  int64_t hidden_row;  // stride in elements
  Matrix weight;       // (vocab, depth); a line is a row
  const void* bias;    // (vocab,) or null
  DType bias_dtype;
  const int64_t* labels;  // one per token, in [0, vocab)
  double softcap, z_loss, label_smoothing;

  const int64_t* tokens;         // (count,): the rows of hidden, labels, loss, scale and dhidden
  int64_t count, capacity;       // capacity: of the largest chunk
  bool first, last;              // of the chunks
  void* shared;                  // memory of all tasks
  int64_t vocab_block;           // rows of the weight per task of logits and dweight
  int64_t splits, split_rows;    // of the vocabulary in dhidden's sum
  int64_t hidden_cols_per_task;  // of dhidden

  void* loss;  // T

  // Gradients of the sum of scale[token] * loss[token]
  bool keep_logits;
  const void* scale;  // T
  int64_t scale_stride;
  void* dhidden;  // (tokens, depth) T, or null
  void* dweight;  // (vocab, depth) in dweight_dtype, or null
  DType dweight_dtype;
  uint8_t* dweight_low;  // (vocab, depth): where dweight has 16 bits and there are several chunks, their sums have 24,
                         // the upper 16 in dweight and the rest here
  double* dbias;         // (vocab,) sums, or null
};

struct LossKernels {
  int64_t accumulator_size;
  int64_t panel;                                               // tokens side by side in a product: chunks are multiples
  int64_t row_unit;                                            // vocab_block is a multiple
  int64_t split_unit;                                          // split_rows is a multiple
  int64_t hidden_cols;                                         // of dhidden in a task, at most
  int64_t (*shared)(const LossArgs&);                          // bytes
  int64_t (*scratch)(const LossArgs&);                         // bytes
  void (*pack)(const LossArgs&, int64_t task, void* scratch);  // panels of tokens
  void (*logits)(const LossArgs&, int64_t task, void* scratch);       // blocks of the vocabulary
  void (*loss)(const LossArgs&, int64_t task, void* scratch);         // panels
  void (*dweight)(const LossArgs&, int64_t task, void* scratch);      // blocks; also dbias and what dhidden reads
  void (*dhidden)(const LossArgs&, int64_t task, void* scratch);      // splits times column blocks, columns first
  void (*dhidden_sum)(const LossArgs&, int64_t task, void* scratch);  // panels
};

constexpr int kLossOfFew =
    4;  // the row, after those of DType, for so few tokens that the weight is not worth splitting

// parts: as linear_kernels takes them
const LossKernels& loss_kernels(DType compute, int64_t parts, int64_t tokens);

}  // namespace lmk
