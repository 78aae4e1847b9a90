// Dropout of hidden states on the CPU, over ranges of elements, free of torch.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace lmk {

// out = residual + scale * x where an element is kept, else residual. Element e draws half e % 2 (the lower one first)
// of word e / 2 % 4 of Philox's counter e / 8, and is dropped where these 16 bits are below `dropped`.
struct DropoutArgs {
  DType x_dtype, dtype;      // of x; of residual and out. Where they differ, one has 16 bits and the other is f32
  const void *x, *residual;  // (n,); residual may be null
  void* out;                 // (n,)
  uint64_t seed;
  int32_t dropped;  // of kDropoutSteps elements, on average
};

constexpr int64_t kDropoutSteps = 1 << 16;
constexpr int64_t kDropoutUnit = 128;  // of what a range begins with

// Elements [begin, end).
using DropoutFn = void (*)(const DropoutArgs&, int64_t begin, int64_t end);

DropoutFn dropout_kernel();

}  // namespace lmk
