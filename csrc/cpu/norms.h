// Layer norm and RMS norm on the CPU, with the addition of a residual: forward and backward over ranges of rows, free
// of torch.
#pragma once

#include <cstdint>

#include "row_view.h"

namespace lmk {

struct NormVector {
  const void* data;  // (cols,) or null
  DType dtype;
};

struct NormArgs {
  DType dtype;  // of s, y and their gradients; x and residual may be 16 bits wide where it is float32
  int64_t rows, cols;
  NormVector weight, bias;

  // forward: s = x + residual (s = x without one), y = norm(s)
  RowView x, residual;
  double eps;
  void *s, *y;        // (rows, cols), contiguous; s is null without a residual
  void *mean, *rstd;  // (rows,), float (double for f64), or null; RMS norm has no mean

  // backward: dx = rstd (g - mean(g) - h mean(g h)) + ds for g = dy weight and h = norm(s) before weight and bias
  RowView dy, ds, sum;  // sum is s; ds may be absent
  void* dx;             // (rows, cols), contiguous
  int64_t chunk_rows;   // a chunk of rows sums dweight and dbias in one row of partial
  void* partial;        // (chunks, 2, cols) of the accumulator, or null where neither is wanted
  int64_t chunks;
  void *dweight, *dbias;  // (cols,) in the dtype of weight and bias, or null
};

// Everything for one dtype and instruction set. Scratch is aligned to 64 bytes, one per thread.
struct NormKernels {
  int64_t (*scratch)(const NormArgs&);                                      // bytes, for fwd and bwd
  void (*fwd)(const NormArgs&, int64_t begin, int64_t end, void* scratch);  // rows
  void (*bwd)(const NormArgs&, int64_t chunk, void* scratch);
  void (*bwd_finish)(const NormArgs&, int64_t begin, int64_t end);  // columns of dweight and dbias
};

const NormKernels& layer_norm_kernels(DType dtype);
const NormKernels& rms_norm_kernels(DType dtype);

}  // namespace lmk
