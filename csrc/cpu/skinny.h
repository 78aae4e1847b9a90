// Linear layers on few rows: out (rows, cols) = activation(x weight^T + bias) + residual, where reading the weight once
// is the cost. Free of torch.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "epilogue.h"
#include "fetch.h"

namespace lmk {

struct SkinnyArgs {
  DType dtype;  // of x and weight
  int64_t rows, depth, cols;
  const void* x;  // (rows, depth), depth contiguous
  int64_t x_row;  // strides in elements
  // (cols, depth) with contiguous depth, or its transpose (depth, cols) with contiguous columns
  const void* weight;
  int64_t weight_row;
  bool transposed;
  // Where it is less than depth, and not 0, sums over so much of the depth are added up in their order, the bias after
  // the first: what tasks that have one such sum each make together. A multiple of 32, for transposed weights only.
  int64_t sum_depth;
  Epilogue epilogue;

  const void* packed;  // what pack_x has made of x
  int64_t packed_row;
  Ahead next;    // is fetched at the end of a task
  bool streams;  // whether a weight is read, or fetched ahead, from kStreams places in turn
};

// For one dtype and instruction set. No function allocates, throws or starts threads. An element of the result is
// summed in an order that depends on the depth alone: neither the other rows nor the columns of a task change its bits.
struct SkinnyKernels {
  int64_t packed_size;                                           // bytes of an element of packed rows
  int64_t packed_unit;                                           // their length is a multiple of this
  int64_t column_unit;                                           // the first column of a task is a multiple of this
  int64_t (*scratch)(const SkinnyArgs&, int64_t cols);           // bytes for tasks of up to `cols` columns
  void (*pack_x)(const SkinnyArgs&, void* packed, int64_t row);  // one row, zero beyond depth
  void (*run)(const SkinnyArgs&, int64_t first, int64_t cols, void* scratch);  // columns [first, first + cols)
};

const SkinnyKernels& skinny_kernels(DType dtype);

}  // namespace lmk
