// torch's side of attention over packed sequences, on attention's kernels. Included by bindings.cpp, after
// attention_binding.h.

namespace {

struct Range {
  int64_t first, count;
};

// Where cu_seqlens (n + 1,) puts the sequences on an axis of `size`: whatever its values, no range leaves the axis, is
// longer than `most` or overlaps another.
std::vector<Range> packed_ranges(const Tensor& cu_seqlens, int64_t n, int64_t size, int64_t most) {
  const int32_t* bounds = int32_data(cu_seqlens, n + 1);
  std::vector<Range> ranges(size_t(n), Range{});
  int64_t at = 0;
  for (int64_t b = 0; b < n; ++b) {
    const int64_t first = std::clamp<int64_t>(bounds[b], at, size);
    at = std::clamp<int64_t>(bounds[b + 1], first, size);
    ranges[b] = {first, std::clamp<int64_t>(at - first, 0, std::max<int64_t>(most, 0))};
  }
  return ranges;
}

Sequences packed_sequences(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                           const OptionalTensor& kv_lengths, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  STD_TORCH_CHECK(cu_seqlens_q.numel() >= 1, "cu_seqlens must have n + 1 elements");
  const int64_t n = cu_seqlens_q.numel() - 1;
  const std::vector<Range> queries = packed_ranges(cu_seqlens_q, n, q.size(0), max_seqlen_q);
  const std::vector<Range> keys = packed_ranges(cu_seqlens_k, n, k.size(0), max_seqlen_k);
  const int32_t* lengths = int32_data(kv_lengths, n);
  Sequences sequences(size_t(n), lmk::Sequence{});
  for (int64_t b = 0; b < n; ++b) {
    lmk::Sequence& s = sequences[b];
    s.first_q = queries[b].first, s.seq_q = queries[b].count;
    s.first_k = keys[b].first, s.seq_k = keys[b].count;
    s.keys = visible_length(lengths, b, s.seq_k);
    s.offset = s.seq_k - s.seq_q;
  }
  return sequences;
}

std::tuple<Tensor, Tensor> attention_varlen_fwd(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                                const OptionalTensor& mask, const OptionalTensor& bias,
                                                const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                                                const OptionalTensor& kv_lengths, const OptionalTensor& seed,
                                                const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t left, int64_t right,
                                                double scale, double softcap, double dropout_p, int64_t parts) {
  const Tensor q = dense(q_, 3), k = dense(k_, 3), v = dense(v_, 3);
  Sequences sequences = packed_sequences(q, k, cu_seqlens_q, cu_seqlens_k, kv_lengths, max_seqlen_q, max_seqlen_k);
  lmk::AttentionArgs a = attention_args(
      q, k, v, {mask, bias, alibi_slopes, sink, kv_lengths, seed, left, right, scale, softcap, dropout_p},
      int64_t(sequences.size()), max_seqlen_q, max_seqlen_k);
  Tensor out = new_tensor(q, {a.seq_q, a.heads, a.head_dim_v});
  Tensor lse = new_tensor(q, {a.heads, a.seq_q}, accumulator(q));
  run_attention_fwd(a, sequences, out, lse, parts);
  return {out, lse};
}

AttentionGradients attention_varlen_bwd(const OptionalTensor& dout, const OptionalTensor& dlse, const Tensor& q_,
                                        const Tensor& k_, const Tensor& v_, const Tensor& out, const Tensor& lse,
                                        const OptionalTensor& mask, const OptionalTensor& bias,
                                        const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                                        const OptionalTensor& kv_lengths, const OptionalTensor& seed,
                                        const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                        int64_t max_seqlen_k, int64_t left, int64_t right, double scale, double softcap,
                                        double dropout_p, bool need_dbias, bool need_dslopes, bool need_dsink,
                                        bool deterministic, int64_t parts) {
  const Tensor q = dense(q_, 3), k = dense(k_, 3), v = dense(v_, 3);
  Sequences sequences = packed_sequences(q, k, cu_seqlens_q, cu_seqlens_k, kv_lengths, max_seqlen_q, max_seqlen_k);
  const AttentionOptions options{mask, bias,  alibi_slopes, sink,    kv_lengths, seed,
                                 left, right, scale,        softcap, dropout_p};
  lmk::AttentionArgs a = attention_args(q, k, v, options, int64_t(sequences.size()), max_seqlen_q, max_seqlen_k);
  return filled(run_attention_bwd(a, sequences, dout, dlse, q, k, v, out, lse, options, need_dbias, need_dslopes,
                                  need_dsink, deterministic, parts),
                q);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("attention_varlen_fwd", TORCH_BOX(&attention_varlen_fwd));
  m.impl("attention_varlen_bwd", TORCH_BOX(&attention_varlen_bwd));
}
