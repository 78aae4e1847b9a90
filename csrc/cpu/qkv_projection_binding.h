// torch's side of the projection to queries, keys and values. Its kernels are linear's. Included by bindings.cpp, after
// linear_binding.h.

namespace {

lmk::HeadSplit head_split(const Tensor& like, int64_t rows, int64_t seq, int64_t heads, int64_t heads_kv,
                          int64_t head_dim, const OptionalTensor& cos, const OptionalTensor& sin,
                          const OptionalTensor& positions, bool interleaved) {
  lmk::HeadSplit s{};
  s.head_dim = head_dim, s.heads = heads, s.heads_kv = heads_kv, s.seq = std::max<int64_t>(1, seq);
  s.interleaved = interleaved;
  if (!cos) return s;
  STD_TORCH_CHECK(sin.has_value(), "cos and sin come together");
  for (const Tensor* x : {&*cos, &*sin})
    STD_TORCH_CHECK(x->is_cpu() && x->is_contiguous() && x->dim() == 2 && x->scalar_type() == accumulator(like) &&
                        x->size(0) == cos->size(0) && x->size(0) > 0 && x->size(1) == cos->size(1) &&
                        2 * x->size(1) <= head_dim,
                    "cos and sin must be (positions, rotated / 2), contiguous, in the accumulator's dtype");
  s.cos = static_cast<const float*>(cos->const_data_ptr());
  s.sin = static_cast<const float*>(sin->const_data_ptr());
  s.rotated = 2 * cos->size(1);
  s.table = cos->size(0);
  if (positions) {
    STD_TORCH_CHECK(positions->is_cpu() && positions->is_contiguous() && positions->numel() == rows &&
                        positions->scalar_type() == ScalarType::Long,
                    "positions must be (rows,) int64");
    s.positions = static_cast<const int64_t*>(positions->const_data_ptr());
  }
  return s;
}

void run_rows(const lmk::JoinArgs& j, void (*move)(const lmk::JoinArgs&, int64_t)) {
  constexpr int64_t kRows = 16;
  const int64_t cols = (j.split.heads + 2 * j.split.heads_kv) * j.split.head_dim;
  run_tasks((j.rows + kRows - 1) / kRows, 0, 4.0 * j.rows * cols, [&](int64_t task, void*) {
    for (int64_t row = task * kRows; row < std::min(j.rows, (task + 1) * kRows); ++row) move(j, row);
  });
}

// q (rows, heads, d), k and v (rows, heads_kv, d), q and k rotated where cos and sin are given.
std::tuple<Tensor, Tensor, Tensor> qkv_projection_fwd(const Tensor& x_, const Tensor& weight_,
                                                      const OptionalTensor& bias, const OptionalTensor& cos,
                                                      const OptionalTensor& sin, const OptionalTensor& positions,
                                                      int64_t seq, int64_t heads, int64_t heads_kv, bool interleaved,
                                                      int64_t parts) {
  check_weight(x_, weight_, bias);
  const Tensor x = dense_matrix(x_), weight = dense_matrix(weight_);
  lmk::LinearArgs a = product_args(x, weight, parts);
  const int64_t all = heads + 2 * heads_kv;
  STD_TORCH_CHECK(heads > 0 && heads_kv > 0 && a.cols % all == 0, "weight must have (h + 2 h_kv) d rows");
  const int64_t d = a.cols / all;
  Tensor q = new_tensor(x, {a.rows, heads, d});
  Tensor k = new_tensor(x, {a.rows, heads_kv, d}), v = new_tensor(x, {a.rows, heads_kv, d});
  if (q.numel() == 0) return {q, k, v};
  a.end.dtype = a.compute;
  if (bias) a.end.bias = bias->const_data_ptr(), a.end.bias_dtype = dtype_of(*bias);
  a.split = head_split(x, a.rows, seq, heads, heads_kv, d, cos, sin, positions, interleaved);
  a.split.q = q.mutable_data_ptr(), a.split.k = k.mutable_data_ptr(), a.split.v = v.mutable_data_ptr();
  if (is_skinny(x, weight)) {
    Tensor product = new_tensor(x, {a.rows, a.cols});
    a.end.out = product.mutable_data_ptr(), a.end.out_row = a.cols;
    run_skinny(dense_rows(x), weight, a.end);
    const lmk::JoinArgs j{a.compute, a.rows, a.split, a.end.out};
    STD_TORCH_CHECK(d <= 1024, "heads have up to 1024 elements");
    run_rows(j, lmk::linear_kernels(a.compute).split);
    return {q, k, v};
  }
  // what is rotated must not be torn apart: whole heads, and whole vectors too where heads are powers of two
  run_matmul(a, !cos ? 64 : 64 % d == 0 ? 64 : d);
  return {q, k, v};
}

// dx, dweight, dbias; those not needed are empty.
std::tuple<Tensor, Tensor, Tensor> qkv_projection_bwd(const Tensor& dq_, const Tensor& dk_, const Tensor& dv_,
                                                      const Tensor& x_, const Tensor& weight_,
                                                      const OptionalTensor& cos, const OptionalTensor& sin,
                                                      const OptionalTensor& positions, int64_t seq, int64_t heads,
                                                      int64_t heads_kv, bool interleaved, bool need_dx,
                                                      bool need_dweight, bool need_dbias, int64_t parts) {
  check_weight(x_, weight_, {});
  const Tensor x = dense_matrix(x_), weight = dense_matrix(weight_);
  const Tensor dq = torch::stable::contiguous(dq_), dk = torch::stable::contiguous(dk_),
               dv = torch::stable::contiguous(dv_);
  lmk::JoinArgs j{};
  j.dtype = dtype_of(x);
  j.rows = x.size(0);
  const int64_t cols = weight.size(0), all = heads + 2 * heads_kv;
  STD_TORCH_CHECK(heads > 0 && heads_kv > 0 && cols % all == 0, "weight must have (h + 2 h_kv) d rows");
  const int64_t d = cols / all;
  STD_TORCH_CHECK(d <= 1024, "heads have up to 1024 elements");
  STD_TORCH_CHECK(dq.numel() == j.rows * heads * d && dk.numel() == j.rows * heads_kv * d && dv.numel() == dk.numel() &&
                      dq.scalar_type() == x.scalar_type() && dk.scalar_type() == x.scalar_type() &&
                      dv.scalar_type() == x.scalar_type(),
                  "dq must be (rows, h, d), dk and dv (rows, h_kv, d), in the dtype of x");
  Tensor dout = new_tensor(x, {j.rows, cols});
  j.split = head_split(x, j.rows, seq, heads, heads_kv, d, cos, sin, positions, interleaved);
  j.split.q = const_cast<void*>(dq.const_data_ptr());
  j.split.k = const_cast<void*>(dk.const_data_ptr());
  j.split.v = const_cast<void*>(dv.const_data_ptr());
  j.product = dout.mutable_data_ptr();
  run_rows(j, lmk::linear_kernels(j.dtype).join);
  Tensor dbias = bias_gradient(x, cols, need_dbias);
  if (need_dbias) {
    lmk::ActivationArgs p{};
    p.dtype = j.dtype, p.rows = j.rows, p.cols = cols;
    p.dout = dout.const_data_ptr(), p.dout_row = cols, p.dout_dtype = j.dtype;
    run_activation(p, dbias);
  }
  const auto [dx, dweight] = product_gradients(dout, x, weight, need_dx, need_dweight, parts);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("qkv_projection_fwd", TORCH_BOX(&qkv_projection_fwd));
  m.impl("qkv_projection_bwd", TORCH_BOX(&qkv_projection_bwd));
}
