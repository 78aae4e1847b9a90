// Positions and token ids: integers indexed (batch, seq), int32 or int64, at any stride.
#pragma once

#include <cstdint>

namespace lmk {

struct Indices {
  const void* data = nullptr;  // null: the index of (b, s) is s
  bool wide = false;           // int64
  int64_t batch = 0, seq = 0;  // strides in elements; batch is 0 where every sequence has the same

  int64_t at(int64_t b, int64_t s) const {
    if (!data) return s;
    const int64_t i = b * batch + s * seq;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace lmk
