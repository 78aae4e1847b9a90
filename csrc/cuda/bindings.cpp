// The only file that knows torch: checks, allocates, and runs the kernels in torch's current stream. Schemas and fakes
// are in Python, beside each op.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "attention_decode.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef USE_CUDA
void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}
#else  // the kernels emulated on a CPU
void* current_stream(const Tensor&) { return nullptr; }
#endif

bool beside(const Tensor& x, const Tensor& q) {
  return x.is_cuda() == q.is_cuda() && x.get_device_index() == q.get_device_index();
}

Tensor dense(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "q, k_new and v_new must have 4 axes");
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
}

lmk::Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return lmk::Element::f32;
    case ScalarType::BFloat16:
      return lmk::Element::bf16;
    case ScalarType::Half:
      return lmk::Element::f16;
    case ScalarType::Char:
      return lmk::Element::int8;
    default:
      break;
  }
  STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or, for a cache, int8");
  return lmk::Element::f32;
}

// `writes`: whether the kernels write to x, or only read it.
lmk::TokenRows token_rows(const Tensor& x, bool writes) {
  const int64_t size = x.element_size();
  void* data = writes ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr());
  return {static_cast<char*>(data), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size};
}

const float* floats(const OptionalTensor& x, const Tensor& q, int64_t numel) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(beside(*x, q) && x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->numel() == numel,
                  "alibi_slopes and sink must be contiguous, float32 and of their size");
  return static_cast<const float*>(x->const_data_ptr());
}

int32_t as_int32(int64_t x) {
  STD_TORCH_CHECK(x >= 0 && x <= (int64_t(1) << 30), "sizes go up to 2^30");
  return int32_t(x);
}

// Everything that decides where kernels read and write. Lengths and the block table are data: kernels clamp them.
lmk::DecodeArgs decode_args(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_lengths,
                            const OptionalTensor& k_new, const OptionalTensor& v_new, const OptionalTensor& cos,
                            const OptionalTensor& sin, const OptionalTensor& block_table,
                            const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                            const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  lmk::DecodeArgs a{};
  STD_TORCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4, "the caches must have 4 axes");
  a.dtype = element_of(q), a.cache_dtype = element_of(k_cache);
  const bool int8 = a.cache_dtype == lmk::Element::int8;
  STD_TORCH_CHECK(a.dtype != lmk::Element::int8, "q must be float32, bfloat16 or float16");
  a.batch = as_int32(q.size(0)), a.seq_q = as_int32(q.size(1)), a.heads = as_int32(q.size(2));
  a.head_dim = as_int32(q.size(3)), a.head_dim_v = as_int32(v_cache.size(3)), a.heads_kv = as_int32(k_cache.size(2));
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 256 && a.head_dim_v >= 1 && a.head_dim_v <= 256,
                  "head sizes must be between 1 and 256");
  STD_TORCH_CHECK(a.heads == 0 || (a.heads_kv > 0 && a.heads % a.heads_kv == 0), "h must be a multiple of h_kv");
  // of grids, whose second and third axes end there
  STD_TORCH_CHECK(a.batch < 65536 && a.heads < 65536, "batches and heads go up to 65535");
  for (const Tensor* cache : {&k_cache, &v_cache})
    STD_TORCH_CHECK(beside(*cache, q) && cache->scalar_type() == k_cache.scalar_type() &&
                        (int8 || cache->scalar_type() == q.scalar_type()) && cache->size(0) == k_cache.size(0) &&
                        cache->size(1) == k_cache.size(1) && cache->size(2) == a.heads_kv &&
                        (cache->stride(3) == 1 || cache->size(3) <= 1),
                    "the caches must fit together, in q's dtype or int8, with a contiguous last axis");
  STD_TORCH_CHECK(k_cache.size(3) == a.head_dim, "k_cache must have q's head size");
  STD_TORCH_CHECK(k_new.has_value() == v_new.has_value() && cos.has_value() == sin.has_value() &&
                      k_scale.has_value() == int8 && v_scale.has_value() == int8,
                  "k_new and v_new, cos and sin, an int8 cache and its scales come together");
  const bool writes = k_new.has_value();
  if (writes) {
    a.seq_new = as_int32(k_new->size(1));
    for (const Tensor* x : {&*k_new, &*v_new})
      STD_TORCH_CHECK(beside(*x, q) && x->scalar_type() == q.scalar_type() && x->size(0) == a.batch &&
                          x->size(1) == a.seq_new && x->size(2) == a.heads_kv &&
                          x->size(3) == (x == &*k_new ? a.head_dim : a.head_dim_v),
                      "k_new and v_new must be (b, s_new, h_kv, d or d_v) in q's dtype");
    a.k_new = token_rows(*k_new, false), a.v_new = token_rows(*v_new, false);
  }
  a.q = token_rows(q, false);
  a.k = token_rows(k_cache, writes), a.v = token_rows(v_cache, writes);
  if (int8) {
    for (const Tensor* x : {&*k_scale, &*v_scale})
      STD_TORCH_CHECK(beside(*x, q) && x->dim() == 3 && x->scalar_type() == ScalarType::Float &&
                          x->size(0) == k_cache.size(0) && x->size(1) == k_cache.size(1) && x->size(2) == a.heads_kv,
                      "k_scale and v_scale must be float32 with one element per row of the cache");
    a.k_scale = token_rows(*k_scale, writes), a.v_scale = token_rows(*v_scale, writes);
  }
  a.capacity = as_int32(k_cache.size(1));
  if (block_table) {
    STD_TORCH_CHECK(beside(*block_table, q) && block_table->dim() == 2 &&
                        block_table->scalar_type() == ScalarType::Int && block_table->size(0) == a.batch &&
                        (block_table->stride(1) == 1 || block_table->size(1) <= 1),
                    "block_table must be (b, max_blocks) int32, contiguous in the last axis");
    a.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
    a.table_stride = block_table->stride(0);
    a.block_size = as_int32(k_cache.size(1)), a.num_blocks = as_int32(k_cache.size(0));
    a.capacity = a.num_blocks == 0 ? 0 : as_int32(block_table->size(1) * a.block_size);
  } else {
    STD_TORCH_CHECK(k_cache.size(0) == a.batch, "the caches must have q's batch size");
  }
  STD_TORCH_CHECK(a.seq_new <= a.capacity || a.batch == 0, "k_new does not fit into the cache");
  if (cos) {
    a.half_rotary = as_int32(cos->size(1)), a.max_position = as_int32(cos->size(0));
    for (const Tensor* x : {&*cos, &*sin})
      STD_TORCH_CHECK(beside(*x, q) && x->dim() == 2 && x->scalar_type() == cos->scalar_type() &&
                          (x->scalar_type() == q.scalar_type() || x->scalar_type() == ScalarType::Float) &&
                          x->size(0) == a.max_position && x->size(1) == a.half_rotary &&
                          (x->stride(1) == 1 || x->size(1) <= 1),
                      "cos and sin must be (max_pos, d_rot / 2), float32 or in q's dtype, contiguous in the last axis");
    STD_TORCH_CHECK(2 * a.half_rotary <= a.head_dim, "cos and sin cover more columns than a head has");
    STD_TORCH_CHECK(a.max_position > 0, "cos and sin must have at least one row");
    a.table_dtype = element_of(*cos);
    a.cos = cos->const_data_ptr(), a.sin = sin->const_data_ptr();
    a.cos_stride = cos->stride(0) * cos->element_size(), a.sin_stride = sin->stride(0) * sin->element_size();
  }
  const bool per_batch = alibi_slopes && alibi_slopes->dim() == 2;
  a.slopes = floats(alibi_slopes, q, int64_t(per_batch ? a.batch : 1) * a.heads);
  a.slopes_batch = per_batch ? a.heads : 0;
  a.sink = floats(sink, q, a.heads);
  STD_TORCH_CHECK(beside(kv_lengths, q) && kv_lengths.dim() == 1 && kv_lengths.numel() == a.batch &&
                      (kv_lengths.scalar_type() == ScalarType::Int || kv_lengths.scalar_type() == ScalarType::Long),
                  "kv_lengths must be (b,) int32 or int64");
  a.kv_lengths = kv_lengths.const_data_ptr();
  a.lengths_stride = kv_lengths.stride(0);
  a.long_lengths = kv_lengths.scalar_type() == ScalarType::Long;
  return a;
}

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q_, Tensor k_cache, Tensor v_cache, const Tensor& kv_lengths,
                                            const OptionalTensor& k_new_, const OptionalTensor& v_new_,
                                            const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved,
                                            const OptionalTensor& block_table, double scale, double softcap,
                                            int64_t left, const OptionalTensor& alibi_slopes,
                                            const OptionalTensor& sink, OptionalTensor k_scale,
                                            OptionalTensor v_scale) {
#ifdef USE_CUDA
  const torch::stable::accelerator::DeviceGuard guard(q_.get_device_index());
#endif
  const Tensor q = dense(q_);
  const OptionalTensor k_new = k_new_ ? OptionalTensor(dense(*k_new_)) : k_new_;
  const OptionalTensor v_new = v_new_ ? OptionalTensor(dense(*v_new_)) : v_new_;
  lmk::DecodeArgs a = decode_args(q, k_cache, v_cache, kv_lengths, k_new, v_new, cos, sin, block_table, alibi_slopes,
                                  sink, k_scale, v_scale);
  a.interleaved = interleaved;
  a.scale = float(scale), a.softcap = float(softcap);
  a.left = int32_t(std::clamp<int64_t>(left, -1, int64_t(1) << 30));  // farther than any key
  lmk::plan_decode(a);

  Tensor out = torch::stable::new_empty(q, {a.batch, a.seq_q, a.heads, a.head_dim_v});
  Tensor lse = torch::stable::new_empty(q, {a.batch, a.heads, a.seq_q}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  OptionalTensor partial;
  if (const int64_t bytes = lmk::decode_scratch(a)) {
    partial = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
    a.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  const char* error = lmk::attention_decode(a, current_stream(q));
  STD_TORCH_CHECK(error == nullptr, "attention_decode did not start: ", error ? error : "");
  return {out, lse};
}

}  // namespace

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(lmkernels, CUDA, m) { m.impl("attention_decode_cuda", TORCH_BOX(&attention_decode)); }
#else
STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) { m.impl("attention_decode_cuda", TORCH_BOX(&attention_decode)); }
#endif
