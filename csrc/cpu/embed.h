// Sums of rows of tables, one per token, and their gradient: rows added up by index. Free of torch.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "indices.h"

namespace lmk {

constexpr int kMostTables = 3;  // token, position, type

struct EmbedTable {
  const void* data;  // (rows, dim), last axis contiguous
  int64_t row;       // stride in elements
  DType dtype;
  Indices indices;  // row of each token
};

// out = scale * x + table[0][index] + table[1][index] + ..., where x may be absent.
struct EmbedArgs {
  DType dtype;  // of x and out
  int64_t batch, seq, dim;
  const void* x;           // (batch, seq, dim), last axis contiguous, or null
  int64_t x_batch, x_seq;  // strides in elements
  double scale;
  int n_tables;
  EmbedTable tables[kMostTables];
  void* out;  // (batch, seq, dim), contiguous
};

// Tokens [first, first + n) of batch * seq; scratch: 2 * dim floats (doubles for f64), aligned to 64 bytes.
using EmbedFn = void (*)(const EmbedArgs&, int64_t first, int64_t n, void* scratch);

EmbedFn embed_kernel(DType dtype);

// Rows of dout that belong to one row of the table, in their order: rows[i] for i in [begin, end).
struct EmbedGroup {
  int64_t target, begin, end;
};

// dtable[target] = the sum of the group's rows.
struct EmbedGradArgs {
  DType dtype;        // of dout
  DType table_dtype;  // of dtable: dtype or f32
  int64_t dim;
  const void* dout;  // (tokens, dim), contiguous
  void* dtable;      // (rows, dim), contiguous
  const int64_t* rows;
  const EmbedGroup* groups;
};

// Columns [column, column + n) of groups [first, last).
using EmbedGradFn = void (*)(const EmbedGradArgs&, int64_t first, int64_t last, int64_t column, int64_t n);

EmbedGradFn embed_grad_kernel(DType dtype);

}  // namespace lmk
