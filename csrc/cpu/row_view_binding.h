// Tensors as rows, for the kernels that work along the last axis. Included by bindings.cpp.

#include "row_view.h"

namespace {

// x in place where its last axis is contiguous and one stride leads through all leading axes, else the copy that is
// kept in `copy`.
lmk::RowView row_view(const Tensor& x, OptionalTensor& copy) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "expected CPU tensors of at least one axis");
  const int64_t last = x.dim() - 1, cols = x.size(last);
  int64_t stride = cols, rows = 1;
  bool direct = cols <= 1 || x.stride(last) == 1;
  for (int64_t axis = last - 1; axis >= 0 && direct; --axis) {
    if (x.size(axis) == 1) continue;
    if (rows == 1) stride = x.stride(axis);
    direct = x.stride(axis) == stride * rows;
    rows *= x.size(axis);
  }
  if (direct) return {x.const_data_ptr(), stride, dtype_of(x)};
  copy = torch::stable::contiguous(x);
  return {copy->const_data_ptr(), cols, dtype_of(x)};
}

bool same_shape(const Tensor& x, const Tensor& y) {
  if (x.dim() != y.dim()) return false;
  for (int64_t i = 0; i < x.dim(); ++i)
    if (x.size(i) != y.size(i)) return false;
  return true;
}

int64_t last_size(const Tensor& x) { return x.size(x.dim() - 1); }

// Rows of one task: enough to be worth its start, few enough for every thread to get several.
int64_t rows_per_task(int64_t rows, int64_t cols) {
  constexpr int64_t kElements = 32 * 1024, kTasksPerThread = 8;
  return std::clamp<int64_t>(rows / (kTasksPerThread * torch::stable::get_num_threads()), 1,
                             std::max<int64_t>(1, kElements / cols));
}

}  // namespace
