// Linear layers whose weights have 8 or 4 bits: out = activation(x weight^T + bias) + residual. Free of torch.
//
// Weights stand in panels of 16 columns of the result, so that a register holds 4 neighbours along the depth for each
// of 16 columns, and sums need no reduction. They are stored unsigned, with their zero at 128 (8 bits) or 8 (4 bits):
//   8 bits  data (panels, depth / 4, 16, 4) bytes; scales (panels, 16) float
//   4 bits  data (panels, depth / 32, 4, 16, 4) bytes, of which byte (i, column, j) holds depth 4 i + j of the group in
//           its low half and 16 + 4 i + j in its high half; scales (panels, depth / 32, 16) bfloat16
// The depth is padded to a multiple of 32, and the columns to one of 16, by weights of zero.
//
// Each row of x becomes integers of 8 bits, in proportion to its largest element; sums of products are exact integers
// within a group of the depth (32 for 4 bits, 65536 for 8), and float across groups. A row with an infinity or a NaN
// gives NaN.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "epilogue.h"
#include "fetch.h"

namespace lmk {

constexpr int64_t kPanelCols = 16, kWeightGroup = 32, kByteGroup = 65536;

struct QuantizedArgs {
  DType dtype;  // of x
  int bits;     // 8 or 4
  int64_t rows, depth, cols;
  const void* x;  // (rows, depth), depth contiguous
  int64_t x_row;  // stride in elements
  const uint8_t* data;
  const void* scales;
  Epilogue epilogue;

  int64_t padded;      // depth, rounded up to a multiple of kWeightGroup
  int64_t groups;      // over which integers are summed
  int8_t* levels;      // (rows, levels_row): x in integers, zero from depth on
  int64_t levels_row;  // of levels_row(depth)
  int32_t* sums;       // (rows, groups): of the levels
  float* x_scales;     // (rows,)
  int64_t panels_per_task, rows_per_task;
  Ahead next;  // is fetched at the end of a task
  // whether one row reads 8 bits from kStreams panels in turn, where a task has so many; else few rows read in order
  bool streams;
};

// For one instruction set. No function allocates, throws or starts threads. Neither the other rows nor the columns of a
// task change the bits of a result.
struct QuantizedKernels {
  int64_t tile_panels;                            // a task should have a multiple of these
  int64_t most_rows, wide_panels;                 // of a task, and what it should have where many rows share it
  int64_t (*pack_scratch)(const QuantizedArgs&);  // bytes
  void (*pack_x)(const QuantizedArgs&, int64_t row, void* scratch);
  int64_t (*scratch)(const QuantizedArgs&);
  void (*run)(const QuantizedArgs&, int64_t task, void* scratch);  // row blocks times panel blocks, rows first
};

const QuantizedKernels& quantized_kernels();

// Bytes from one row of levels to the next: whole tiles, and an odd number of cache lines, so that rows keep out of
// each other's sets of the L1 cache.
constexpr int64_t levels_row(int64_t depth) { return ((depth + 63) / 64 | 1) * 64; }

}  // namespace lmk
