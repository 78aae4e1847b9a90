// Rotary position embedding on the CPU: rotates pairs of columns by the angle of each token's position. Free of torch.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "indices.h"

namespace lmk {

// Rows of cosines or sines, indexed (batch, row, :) with a contiguous last axis; strides in elements.
struct AngleTable {
  const void* data;
  int64_t batch, row;
};

struct RotaryArgs {
  DType dtype;        // of x and out
  DType table_dtype;  // of cos and sin: f32 (f64 for f64) or dtype
  int64_t batch, seq, heads, head_dim;
  int64_t pairs;                   // columns of the tables; columns 2 * pairs and up of x are copied
  const void* x;                   // (batch, seq, heads, head_dim), last axis contiguous
  int64_t x_batch, x_seq, x_head;  // strides in elements
  void* out;                       // the same, contiguous
  AngleTable cos, sin;
  Indices positions;  // row of the tables of each token
  bool interleaved;   // pairs are (2 i, 2 i + 1), else (i, pairs + i)
  bool inverse;       // rotate by minus the angle
};

// Rotates tokens [first, first + n) of batch * seq; scratch: 4 * pairs floats (doubles for f64), aligned to 64 bytes.
using RotaryFn = void (*)(const RotaryArgs&, int64_t first, int64_t n, void* scratch);

RotaryFn rotary_kernel(DType dtype);

}  // namespace lmk
