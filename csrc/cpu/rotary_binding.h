// torch's side of rotary: checks, allocates, runs the kernel. Included by bindings.cpp.

#include "rotary.h"

namespace {

lmk::AngleTable angle_table(const Tensor& x) {
  return {x.const_data_ptr(), x.dim() == 3 && x.size(0) > 1 ? x.stride(0) : 0, x.stride(x.dim() - 2)};
}

// x (b, s, h, d) or (t, h, d); cos, sin (n, pairs) or (b or 1, s, pairs)
Tensor rotary(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, const OptionalTensor& positions,
              bool interleaved, bool inverse) {
  const int64_t axes = x_.dim();
  STD_TORCH_CHECK(x_.is_cpu() && (axes == 3 || axes == 4), "x must be a CPU tensor (b, s, h, d) or (t, h, d)");
  for (const Tensor* table : {&cos_, &sin_})
    STD_TORCH_CHECK(table->is_cpu() && (table->dim() == 2 || (table->dim() == 3 && axes == 4)) &&
                        table->scalar_type() == cos_.scalar_type() && table->dim() == cos_.dim(),
                    "cos and sin must be CPU tensors of 2 or 3 axes and of one dtype");
  const Tensor x = x_.stride(axes - 1) == 1 || x_.size(axes - 1) <= 1 ? x_ : torch::stable::contiguous(x_);
  const Tensor cos = cos_.stride(cos_.dim() - 1) == 1 ? cos_ : torch::stable::contiguous(cos_);
  const Tensor sin = sin_.stride(sin_.dim() - 1) == 1 ? sin_ : torch::stable::contiguous(sin_);
  lmk::RotaryArgs a{};
  a.dtype = dtype_of(x), a.table_dtype = dtype_of(cos);
  STD_TORCH_CHECK(a.table_dtype == a.dtype || (a.table_dtype == lmk::DType::f32 && a.dtype != lmk::DType::f64),
                  "cos and sin must have x's dtype or be float32");
  a.batch = axes == 4 ? x.size(0) : 1, a.seq = x.size(axes - 3), a.heads = x.size(axes - 2),
  a.head_dim = x.size(axes - 1);
  a.pairs = cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(2 * a.pairs <= a.head_dim, "cos and sin must have at most d / 2 columns");
  for (int64_t axis = 0; axis < cos.dim(); ++axis)
    STD_TORCH_CHECK(sin.size(axis) == cos.size(axis), "cos and sin must have one shape");
  const int64_t rows = cos.size(cos.dim() - 2);
  if (cos.dim() == 3)
    STD_TORCH_CHECK(!positions && rows == a.seq && (cos.size(0) == a.batch || cos.size(0) == 1),
                    "cos and sin of 3 axes must be (b, s, pairs), without positions");
  a.x = x.const_data_ptr();
  a.x_batch = axes == 4 ? x.stride(0) : 0, a.x_seq = x.stride(axes - 3), a.x_head = x.stride(axes - 2);
  a.cos = angle_table(cos), a.sin = angle_table(sin);
  a.positions = checked_indices(positions, a.batch, a.seq, "positions", rows);
  a.interleaved = interleaved, a.inverse = inverse;
  Tensor out =
      axes == 4 ? new_tensor(x, {a.batch, a.seq, a.heads, a.head_dim}) : new_tensor(x, {a.seq, a.heads, a.head_dim});
  if (out.numel() == 0) return out;
  a.out = out.mutable_data_ptr();

  const lmk::RotaryFn kernel = lmk::rotary_kernel(a.dtype);
  constexpr int64_t kTaskBytes = 64 * 1024;
  const int64_t token_bytes = 2 * a.heads * a.head_dim * lmk::element_size(a.dtype), tokens = a.batch * a.seq;
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / token_bytes);
  // a byte moved is counted as a flop
  run_tasks((tokens + per_task - 1) / per_task, 4 * a.pairs * int64_t(sizeof(double)), double(tokens * token_bytes),
            [&](int64_t task, void* scratch) {
              const int64_t first = task * per_task;
              kernel(a, first, std::min(per_task, tokens - first), scratch);
            });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) { m.impl("rotary", TORCH_BOX(&rotary)); }
