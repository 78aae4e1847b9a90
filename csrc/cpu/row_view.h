// A tensor as rows: what kernels take that work along the last axis.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace lmk {

// Rows of any stride (elements) with a contiguous last axis; data is null where absent.
struct RowView {
  const void* data;
  int64_t stride;
  DType dtype;
};

}  // namespace lmk
