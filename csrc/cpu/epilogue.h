// What follows the product in a linear layer: pre = product + bias, then out = activation(pre) + residual or,
// with a gate, out = activation(gate) * pre + residual.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtypes.h"

namespace lmk {

struct Epilogue {
  const void* bias;  // (cols,) or null
  DType bias_dtype;
  Activation activation;
  void* pre;             // (rows, cols), contiguous, or null
  const void* gate;      // (rows, cols), contiguous, or null
  DType pre_dtype;       // of pre and gate
  const void* residual;  // (rows, cols) in the dtype of out, last axis contiguous, or null
  int64_t residual_row;  // stride in elements
  void* out;             // (rows, cols), last axis contiguous
  int64_t out_row;       // stride in elements
  DType dtype;           // of residual and out
};

}  // namespace lmk
