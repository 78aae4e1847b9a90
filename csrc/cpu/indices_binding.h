// Positions and token ids from torch: checked to lie inside the table that they index. Included by bindings.cpp.

#include <stdexcept>

#include "indices.h"

namespace {

// The indices of (batch, seq) tokens from a tensor (seq,), (batch, seq), or (1, seq); s itself where x is absent.
// Throws what becomes a ValueError where one is not in [0, size): kernels read without looking.
lmk::Indices checked_indices(const OptionalTensor& x, int64_t batch, int64_t seq, const char* name, int64_t size) {
  lmk::Indices indices;
  if (!x) {
    STD_TORCH_CHECK(seq <= size || batch == 0, "the table is shorter than the sequence");
    return indices;
  }
  STD_TORCH_CHECK(x->is_cpu() && (x->scalar_type() == ScalarType::Int || x->scalar_type() == ScalarType::Long), name,
                  " must be int32 or int64 on the CPU");
  STD_TORCH_CHECK(
      (x->dim() == 1 || (x->dim() == 2 && (x->size(0) == batch || x->size(0) == 1))) && x->size(x->dim() - 1) == seq,
      name, " must be (s,) or (b, s)");
  indices.data = x->const_data_ptr();
  indices.wide = x->scalar_type() == ScalarType::Long;
  indices.seq = x->stride(x->dim() - 1);
  indices.batch = x->dim() == 2 && x->size(0) > 1 ? x->stride(0) : 0;
  int64_t low = INT64_MAX, high = INT64_MIN;
  for (int64_t b = 0; b < (indices.batch ? batch : std::min<int64_t>(batch, 1)); ++b)
    for (int64_t s = 0; s < seq; ++s) {
      const int64_t i = indices.at(b, s);
      low = std::min(low, i), high = std::max(high, i);
    }
  if (low <= high && (low < 0 || high >= size))
    throw std::invalid_argument(std::string(name) + " must lie between 0 and " + std::to_string(size - 1) +
                                ", got values from " + std::to_string(low) + " to " + std::to_string(high));
  return indices;
}

}  // namespace
