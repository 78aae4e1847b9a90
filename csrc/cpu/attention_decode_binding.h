// torch's side of attention over a cache: checks, plans the shares, runs the kernels. Included by bindings.cpp.

#include <vector>

#include "attention_decode.h"

namespace {

// data: of a tensor that the kernels write, else of one that they only read
lmk::TokenRows token_rows(const Tensor& x, void* data) {
  const int64_t size = x.element_size();
  return {static_cast<char*>(data), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size};
}
lmk::TokenRows token_rows(const Tensor& x) { return token_rows(x, const_cast<void*>(x.const_data_ptr())); }

lmk::CacheType cache_type(const Tensor& cache) {
  return cache.scalar_type() == ScalarType::Char ? lmk::CacheType::int8
                                                 : static_cast<lmk::CacheType>(static_cast<int>(dtype_of(cache)));
}

// Everything that decides where kernels read and write. Lengths and the block table are data: kernels clamp them.
lmk::DecodeArgs decode_args(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_lengths,
                            const OptionalTensor& k_new, const OptionalTensor& v_new, const OptionalTensor& cos,
                            const OptionalTensor& sin, const OptionalTensor& block_table,
                            const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                            const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  lmk::DecodeArgs a{};
  a.dtype = dtype_of(q);
  a.batch = q.size(0), a.seq_q = q.size(1), a.heads = q.size(2), a.head_dim = q.size(3);
  a.heads_kv = k_cache.size(2), a.head_dim_v = v_cache.size(3);
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 256 && a.head_dim_v >= 1 && a.head_dim_v <= 256,
                  "head sizes must be between 1 and 256");
  STD_TORCH_CHECK(a.heads == 0 || (a.heads_kv > 0 && a.heads % a.heads_kv == 0), "h must be a multiple of h_kv");
  const bool int8 = k_cache.scalar_type() == ScalarType::Char;
  for (const Tensor* cache : {&k_cache, &v_cache})
    STD_TORCH_CHECK(cache->is_cpu() && cache->dim() == 4 && cache->scalar_type() == k_cache.scalar_type() &&
                        (int8 ? a.dtype != lmk::DType::f64 : cache->scalar_type() == q.scalar_type()) &&
                        cache->size(0) == k_cache.size(0) && cache->size(1) == k_cache.size(1) &&
                        cache->size(2) == a.heads_kv && (cache->stride(3) == 1 || cache->size(3) <= 1),
                    "the caches must fit together, in q's dtype or int8, with a contiguous last axis");
  STD_TORCH_CHECK(k_cache.size(3) == a.head_dim, "k_cache must have q's head size");
  STD_TORCH_CHECK(k_new.has_value() == v_new.has_value() && cos.has_value() == sin.has_value() &&
                      k_scale.has_value() == int8 && v_scale.has_value() == int8,
                  "k_new and v_new, cos and sin, an int8 cache and its scales come together");
  if (k_new) {
    a.seq_new = k_new->size(1);
    for (const Tensor* x : {&*k_new, &*v_new})
      STD_TORCH_CHECK(x->is_cpu() && x->dim() == 4 && x->scalar_type() == q.scalar_type() && x->size(0) == a.batch &&
                          x->size(1) == a.seq_new && x->size(2) == a.heads_kv &&
                          x->size(3) == (x == &*k_new ? a.head_dim : a.head_dim_v) &&
                          (x->stride(3) == 1 || x->size(3) <= 1),
                      "k_new and v_new must be (b, s_new, h_kv, d or d_v) in q's dtype, contiguous in the last axis");
    a.k_new = token_rows(*k_new), a.v_new = token_rows(*v_new);
  }
  a.q = token_rows(q);
  // without k_new nothing is written
  a.k = k_new ? token_rows(k_cache, k_cache.mutable_data_ptr()) : token_rows(k_cache);
  a.v = k_new ? token_rows(v_cache, v_cache.mutable_data_ptr()) : token_rows(v_cache);
  if (int8) {
    for (const Tensor* x : {&*k_scale, &*v_scale})
      STD_TORCH_CHECK(x->is_cpu() && x->dim() == 3 && x->scalar_type() == ScalarType::Float &&
                          x->size(0) == k_cache.size(0) && x->size(1) == k_cache.size(1) && x->size(2) == a.heads_kv,
                      "k_scale and v_scale must be float32 with one element per row of the cache");
    a.k_scale = k_new ? token_rows(*k_scale, k_scale->mutable_data_ptr()) : token_rows(*k_scale);
    a.v_scale = k_new ? token_rows(*v_scale, v_scale->mutable_data_ptr()) : token_rows(*v_scale);
  }
  if (block_table) {
    STD_TORCH_CHECK(block_table->is_cpu() && block_table->dim() == 2 && block_table->scalar_type() == ScalarType::Int &&
                        block_table->size(0) == a.batch && (block_table->stride(1) == 1 || block_table->size(1) <= 1),
                    "block_table must be (b, max_blocks) int32, contiguous in the last axis");
    a.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
    a.table_stride = block_table->stride(0);
    a.block_size = k_cache.size(1), a.num_blocks = k_cache.size(0);
  } else {
    STD_TORCH_CHECK(k_cache.size(0) == a.batch, "the caches must have q's batch size");
  }
  if (cos) {
    a.half_rotary = cos->size(1), a.max_position = cos->size(0);
    for (const Tensor* x : {&*cos, &*sin})
      STD_TORCH_CHECK(x->is_cpu() && x->dim() == 2 && x->scalar_type() == cos->scalar_type() &&
                          (x->scalar_type() == q.scalar_type() || x->scalar_type() == ScalarType::Float) &&
                          x->size(0) == a.max_position && x->size(1) == a.half_rotary &&
                          (x->stride(1) == 1 || x->size(1) <= 1),
                      "cos and sin must be (max_pos, d_rot / 2), float32 or in q's dtype, contiguous in the last axis");
    STD_TORCH_CHECK(2 * a.half_rotary <= a.head_dim, "cos and sin cover more columns than a head has");
    STD_TORCH_CHECK(a.max_position > 0, "cos and sin must have at least one row");
    a.table_dtype = dtype_of(*cos);
    STD_TORCH_CHECK((a.table_dtype == lmk::DType::f64) == (a.dtype == lmk::DType::f64), "float64 comes alone");
    a.cos = cos->const_data_ptr(), a.sin = sin->const_data_ptr();
    a.cos_stride = cos->stride(0) * cos->element_size(), a.sin_stride = sin->stride(0) * sin->element_size();
  }
  const bool per_batch = alibi_slopes && alibi_slopes->dim() == 2;
  a.slopes = accumulator_data(alibi_slopes, q, per_batch ? a.batch * a.heads : a.heads);
  a.slopes_batch = per_batch ? a.heads : 0;
  a.sink = accumulator_data(sink, q, a.heads);
  STD_TORCH_CHECK(kv_lengths.is_cpu() && kv_lengths.dim() == 1 && kv_lengths.numel() == a.batch &&
                      (kv_lengths.scalar_type() == ScalarType::Int || kv_lengths.scalar_type() == ScalarType::Long),
                  "kv_lengths must be (b,) int32 or int64");
  return a;
}

// The plan of each sequence, from its length, which is clamped to what the cache holds.
std::vector<lmk::DecodeSequence> decode_sequences(const lmk::DecodeArgs& a, const Tensor& kv_lengths,
                                                  int64_t capacity) {
  std::vector<lmk::DecodeSequence> sequences(size_t(a.batch));
  const bool wide = kv_lengths.scalar_type() == ScalarType::Long;
  const void* lengths = kv_lengths.const_data_ptr();
  const int64_t stride = kv_lengths.stride(0);
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length =
        wide ? static_cast<const int64_t*>(lengths)[b * stride] : static_cast<const int32_t*>(lengths)[b * stride];
    sequences[size_t(b)] = lmk::decode_sequence(a, std::clamp<int64_t>(length, 0, capacity - a.seq_new));
  }
  return sequences;
}

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q_, Tensor k_cache, Tensor v_cache, const Tensor& kv_lengths,
                                            const OptionalTensor& k_new_, const OptionalTensor& v_new_,
                                            const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved,
                                            const OptionalTensor& block_table, double scale, double softcap,
                                            int64_t left, const OptionalTensor& alibi_slopes,
                                            const OptionalTensor& sink, OptionalTensor k_scale,
                                            OptionalTensor v_scale) {
  const Tensor q = dense(q_, 4);
  const OptionalTensor k_new = k_new_ ? OptionalTensor(dense(*k_new_, 4)) : k_new_;
  const OptionalTensor v_new = v_new_ ? OptionalTensor(dense(*v_new_, 4)) : v_new_;
  lmk::DecodeArgs a = decode_args(q, k_cache, v_cache, kv_lengths, k_new, v_new, cos, sin, block_table, alibi_slopes,
                                  sink, k_scale, v_scale);
  a.interleaved = interleaved;
  a.scale = scale, a.softcap = softcap, a.left = left;
  int64_t capacity = block_table ? block_table->size(1) * a.block_size : k_cache.size(1);
  if (block_table && a.num_blocks == 0) capacity = 0;
  STD_TORCH_CHECK(a.seq_new <= capacity || a.batch == 0, "k_new does not fit into the cache");
  const std::vector<lmk::DecodeSequence> sequences = decode_sequences(a, kv_lengths, capacity);
  a.sequences = sequences.data();

  Tensor out = new_tensor(q, {a.batch, a.seq_q, a.heads, a.head_dim_v});
  Tensor lse = new_tensor(q, {a.batch, a.heads, a.seq_q}, accumulator(q));
  a.out = out.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr();
  const lmk::DecodeKernels& kernels = lmk::decode_kernels(cache_type(k_cache));
  const int64_t chunks = a.row_chunks();
  if (k_new && chunks != 1)
    run_tasks(a.batch * a.heads_kv, 0, double(k_new->numel()),
              [&](int64_t task, void* scratch) { kernels.append(a, task, scratch); });
  if (lse.numel() == 0) return {out, lse};

  int64_t keys = 0;
  for (const lmk::DecodeSequence& s : sequences) {
    a.most_shares = std::max(a.most_shares, s.shares);
    keys += s.total - s.first;
  }
  OptionalTensor partial;
  if (a.most_shares > 1) {
    partial = new_tensor(q, {a.tasks() * kernels.state(a)}, ScalarType::Byte);
    a.partial = partial->mutable_data_ptr();
  }
  // a key costs its bytes and, beyond a few rows, its flops
  const double work =
      double(keys) * a.heads_kv * (a.head_dim + a.head_dim_v) * double(std::max<int64_t>(16, 2 * a.rows()));
  run_tasks(a.tasks(), kernels.scratch(a), work,
            [&](int64_t task, void* scratch) { kernels.attend(a, task, scratch); });
  if (a.most_shares > 1)
    run_tasks(a.batch * chunks * a.heads_kv, 0, 4.0 * a.tasks() * a.chunk_rows() * a.head_dim_v,
              [&](int64_t task, void*) { kernels.finish(a, task); });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) { m.impl("attention_decode", TORCH_BOX(&attention_decode)); }
