// A matrix in memory as matmul.h reads it.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace lmk {

// Element (line, p) lies at data + line * line_stride + p * depth_stride, in elements of dtype. For C = A B with the
// sum over p, a line is a row of A or a column of B. One of the strides is 1.
struct Matrix {
  const void* data;
  int64_t line_stride, depth_stride;
  DType dtype;
};

}  // namespace lmk
