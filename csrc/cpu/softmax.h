// Softmax of rows on the CPU, forward and backward over ranges of rows, free of torch.
#pragma once

#include <cstdint>

#include "row_view.h"

namespace lmk {

struct SoftmaxArgs {
  int64_t cols;
  RowView x;      // forward; may be 16 bits wide where y is float32
  RowView dy, y;  // backward
  void* out;      // (rows, cols), contiguous: y of the forward, dx of the backward
};

// Everything for one dtype (of y, dy and dx) and instruction set. Rows in [begin, end).
struct SoftmaxKernels {
  int64_t scratch_per_column;  // bytes of scratch of a thread, aligned to 64, for each column
  void (*fwd)(const SoftmaxArgs&, int64_t begin, int64_t end, void* scratch);
  void (*bwd)(const SoftmaxArgs&, int64_t begin, int64_t end, void* scratch);
};

const SoftmaxKernels& softmax_kernels(DType dtype);

}  // namespace lmk
