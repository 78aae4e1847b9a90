// Linear layers on the CPU, and the passes around their gradients: over ranges of tasks, free of torch.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtypes.h"
#include "epilogue.h"
#include "matrix.h"

namespace lmk {

// Heads of a projection to queries, keys and values, which get their own tensors and may be rotated on the way.
struct HeadSplit {
  int64_t head_dim, heads, heads_kv, seq;  // row r of the product is position r % seq of a sequence
  void *q, *k, *v;                         // (rows, heads or heads_kv, head_dim), contiguous
  const float *cos, *sin;                  // (positions, rotated / 2) or null; doubles for DType::f64
  int64_t rotated;                         // leading elements of a head that are rotated
  const int64_t* positions;                // (rows,), or null: r % seq
  int64_t table;                           // positions of the tables; those beyond are taken for the last
  bool interleaved;                        // pairs (2 i, 2 i + 1), else (i, i + rotated / 2)
};

struct LinearArgs {
  int64_t rows, cols, depth;
  Matrix a, b;  // (rows, depth) and (depth, cols)
  DType compute;
  int64_t parts = 3;  // of linear_kernels
  Epilogue end;
  HeadSplit split;  // in place of end.out where split.q is not null; then without activation and residual
  int64_t rows_per_task, cols_per_task;
  int64_t tasks_apart;  // from a task to the one that its thread will probably do next
};

// Gradients through out = activation(pre), or out = activation(gate) * pre, or out = pre. All are (rows, cols).
struct ActivationArgs {
  DType dtype;  // of all but dout
  int64_t rows, cols;
  Activation activation;
  const void* dout;
  int64_t dout_row;
  DType dout_dtype;
  const void *pre, *gate;    // rows of cols; gate may be null, and pre where there is no activation
  void *dpre, *dgate, *out;  // rows of cols; null where not wanted
  void* dbias;               // (cols,) float or double: the sum of dpre over the rows, or null
  void* partial;             // (ceil(rows / kActivationRows), cols), as dbias: its sums over blocks of rows, or null
};

// Rows of the product that become the heads of HeadSplit's tensors, or gradients of these, rotated back, that become
// rows.
struct JoinArgs {
  DType dtype;
  int64_t rows;
  HeadSplit split;
  void* product;  // (rows, (heads + 2 heads_kv) head_dim)
};

// What a task should be: tasks that pack rows of A, too, want to be wide, since each packs its own.
struct TaskShare {
  int64_t most_cols, tasks_per_thread;
};

struct LinearKernels {
  int64_t accumulator_size;
  int64_t row_unit, most_rows, least_cols;  // of a task
  TaskShare share, share_packing_a;
  int64_t most_depth;                                              // that a task packs at once
  int64_t packed_bytes;                                            // of an element of B
  int64_t (*scratch)(const LinearArgs&);                           // bytes
  void (*matmul)(const LinearArgs&, int64_t task, void* scratch);  // row blocks times column blocks, columns first
  void (*activation)(const ActivationArgs&, int64_t task);         // row blocks times strips of columns, columns first
  void (*sum_blocks)(const ActivationArgs&, int64_t task);         // ceil(cols / kActivationCols): dbias from partial
  void (*split)(const JoinArgs&, int64_t task);                    // rows
  void (*join)(const JoinArgs&, int64_t task);                     // rows
};

constexpr int64_t kActivationRows = 64, kActivationCols = 1024;

// parts: the bfloat16 whose sum a factor in float32 may be rounded to, 1 to 3; 3 round nothing. Kernels that do not
// multiply it in parts take it as it is.
const LinearKernels& linear_kernels(DType compute, int64_t parts = 3);

}  // namespace lmk
