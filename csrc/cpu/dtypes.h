// Element types of tensors, and how one 16-bit element becomes a float and back.
#pragma once

#include <cstdint>
#include <cstring>

namespace lmk {

enum class DType : int { f32, bf16, f16, f64 };

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

}  // namespace lmk
