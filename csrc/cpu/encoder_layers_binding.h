// torch's side of the layers of an encoder: the ops that they are made of, one after the other, without Python between
// them. Included by bindings.cpp after what it calls.

namespace {

// Reads the parameters of a layer in the order of the schema.
struct LayerReader {
  const std::vector<Tensor>& parameters;
  size_t used = 0;

  const Tensor& next() {
    STD_TORCH_CHECK(used < parameters.size(), "parameters must hold whole layers");
    return parameters[used++];
  }
};

// A weight, or the bytes and scales of one, and its bias.
struct Dense {
  const Tensor &weight, &scales, &bias;

  static Dense read(LayerReader& reader) {
    const Tensor& weight = reader.next();
    const Tensor& scales = weight.scalar_type() == ScalarType::Byte ? reader.next() : weight;
    return {weight, scales, reader.next()};
  }
  bool quantized() const { return &scales != &weight; }
  // activation(x weight^T + bias) + residual
  Tensor operator()(const Tensor& x, const OptionalTensor& residual, int64_t activation, int64_t parts) const {
    if (!quantized()) return std::get<0>(linear_fwd(x, weight, bias, residual, {}, activation, false, parts));
    const int64_t bits = scales.scalar_type() == ScalarType::BFloat16 ? 4 : 8;
    return quantized_linear_fwd(x, weight, scales, bias.numel(), bits, bias, residual, activation);
  }
};

// Products of one x, all of them in one parallel region.
std::array<Tensor, 3> project_thrice(const Tensor& x, const std::array<Dense, 3>& layers, int64_t parts) {
  constexpr int64_t kNone = int64_t(lmk::Activation::none);
  std::vector<lmk::LinearArgs> products;
  std::array<Tensor, 3> outs{x, x, x};
  for (size_t i = 0; i < 3; ++i) {
    const Dense& layer = layers[i];
    if (layer.quantized() || is_skinny(x, layer.weight) || !is_dense_matrix(layer.weight)) {
      outs[i] = layer(x, {}, kNone, parts);
      continue;
    }
    check_weight(x, layer.weight, layer.bias);
    lmk::LinearArgs a = product_args(x, layer.weight, parts);
    outs[i] = new_tensor(x, {a.rows, a.cols});
    a.end.dtype = a.end.pre_dtype = a.compute;
    a.end.out = outs[i].mutable_data_ptr(), a.end.out_row = a.cols;
    a.end.bias = layer.bias.const_data_ptr(), a.end.bias_dtype = dtype_of(layer.bias);
    products.push_back(a);
  }
  run_matmuls(products);
  return outs;
}

// (t, d_model) as attention takes it, packed or of `batch` sequences, and back.
Tensor split_heads(const Tensor& x, int64_t heads, bool packed, int64_t batch) {
  const int64_t tokens = x.size(0), d = x.size(1) / heads;
  const std::array<int64_t, 4> sizes{batch, tokens / std::max<int64_t>(1, batch), heads, d};
  const std::array<int64_t, 3> packed_sizes{tokens, heads, d};
  return packed ? torch::stable::view(x, {packed_sizes.data(), packed_sizes.size()})
                : torch::stable::view(x, {sizes.data(), sizes.size()});
}
Tensor join_heads(const Tensor& x, int64_t tokens) {
  const std::array<int64_t, 2> sizes{tokens, x.size(x.dim() - 2) * x.size(x.dim() - 1)};
  return torch::stable::view(x, {sizes.data(), sizes.size()});
}

// Whether a weight is better read where it lies, once for some rows of x at a time, than packed: up to linear's 32
// rows, a bound that decoding relies on, and for more where that was measured. AVX2 would convert 16 bits again for
// each few.
bool reads_in_place(const Tensor& x, const Tensor& weight) {
  constexpr int64_t kMostRows = 64;
  const bool is_wide = lmk::isa() == lmk::Isa::avx512 || lmk::isa() == lmk::Isa::avx512bf16;
  const bool takes_more = is_wide || (lmk::isa() == lmk::Isa::avx2 && x.scalar_type() == ScalarType::Float);
  return is_skinny(x, weight) || (takes_more && x.size(0) <= kMostRows && weight.scalar_type() == x.scalar_type());
}

// x (b, s, d_model), or (t, d_model) with cu_seqlens, through layers that normalise what they have added. parameters:
// of each layer those of query, key, value, output, norm, up, down and norm; a quantised weight is its bytes and
// scales.
Tensor encoder_layers(const Tensor& x_, std::vector<Tensor> parameters, const OptionalTensor& cu_seqlens,
                      int64_t max_seqlen, int64_t heads, double scale, int64_t activation, double eps, int64_t parts) {
  STD_TORCH_CHECK(x_.is_cpu() && x_.dim() == (cu_seqlens ? 2 : 3), "x must be (b, s, d), or (t, d) with cu_seqlens");
  const int64_t width = x_.size(x_.dim() - 1), batch = cu_seqlens ? 1 : x_.size(0);
  const int64_t tokens = cu_seqlens ? x_.size(0) : batch * x_.size(1);
  STD_TORCH_CHECK(heads > 0 && width % heads == 0, "d must be a multiple of heads");
  STD_TORCH_CHECK(!parameters.empty(), "parameters must hold a layer or more");
  constexpr int64_t kNone = int64_t(lmk::Activation::none);
  const std::array<int64_t, 2> packed{tokens, width};
  Tensor x = torch::stable::view(torch::stable::contiguous(x_), {packed.data(), packed.size()});
  LayerReader reader{parameters};
  const auto product = [&](const Dense& layer, const Tensor& y, const OptionalTensor& residual, int64_t activation) {
    return !layer.quantized() && reads_in_place(y, layer.weight)
               ? skinny_linear_fwd(y, layer.weight, layer.bias, residual, activation)
               : layer(y, residual, activation, parts);
  };
  while (reader.used < parameters.size()) {
    const std::array<Dense, 3> in{Dense::read(reader), Dense::read(reader), Dense::read(reader)};
    const bool in_place = !in[0].quantized() && reads_in_place(x, in[0].weight);
    const std::array<Tensor, 3> qkv =
        in_place ? std::array<Tensor, 3>{product(in[0], x, {}, kNone), product(in[1], x, {}, kNone),
                                         product(in[2], x, {}, kNone)}
                 : project_thrice(x, in, parts);
    const auto split = [&](const Tensor& y) { return split_heads(y, heads, cu_seqlens.has_value(), batch); };
    const Tensor q = split(qkv[0]), k = split(qkv[1]), v = split(qkv[2]);
    const Tensor out = cu_seqlens
                           ? std::get<0>(attention_varlen_fwd(q, k, v, {}, {}, {}, {}, {}, {}, *cu_seqlens, *cu_seqlens,
                                                              max_seqlen, max_seqlen, -1, -1, scale, 0, 0, parts))
                           : std::get<0>(attention_fwd_plain(q, k, v, -1, 0, scale, parts));
    const auto norm = [&](const Tensor& y) {
      const Tensor &weight = reader.next(), &bias = reader.next();
      return norm_fwd(y, {}, weight, bias, eps, true, false)[0];
    };
    const Tensor after_attention = product(Dense::read(reader), join_heads(out, tokens), x, kNone);
    x = norm(after_attention);
    const Tensor hidden = product(Dense::read(reader), x, {}, activation);
    const Tensor after_mlp = product(Dense::read(reader), hidden, x, kNone);
    x = norm(after_mlp);
  }
  return torch::stable::view(x, x_.sizes());
}

int64_t code_of(const Tensor& x) { return int64_t(dtype_of(x)); }

// norm(residual + dropout(x weight^T + bias)): what encoder_layer_bwd wants of it, the result first.
struct AddedAndNormed {
  Tensor y, s, rstd, mean;
};
AddedAndNormed add_and_norm(const Tensor& x, const Dense& dense, const Tensor& residual, const Tensor& weight,
                            const Tensor& bias, double eps, int64_t dropped, int64_t seed, int64_t parts) {
  constexpr int64_t kNone = int64_t(lmk::Activation::none);
  if (dropped == 0) {
    const Tensor s = dense(x, residual, kNone, parts);
    const std::vector<Tensor> normed = norm_fwd(s, {}, weight, bias, eps, true, true);
    return {normed[0], s, normed[1], normed[2]};
  }
  const Tensor product = dense(x, {}, kNone, parts);
  const std::vector<Tensor> normed =
      norm_fwd(dropout(product, {}, dropped, seed, code_of(product)), residual, weight, bias, eps, true, true);
  return {normed[0], normed[1], normed[2], normed[3]};
}

// One layer of encoder_layers on x (t, d_model), with dropout, and what its backward wants besides x and parameters: y,
// q, k, v, heads, lse, s1, rstd1, mean1, y1, pre, hidden, s2, rstd2, mean2; where `dtype`, in which it multiplies, is
// not x's, x and y1 in it.
std::vector<Tensor> encoder_layer_fwd(const Tensor& x, std::vector<Tensor> parameters, const OptionalTensor& cu_seqlens,
                                      int64_t batch, int64_t max_seqlen, int64_t heads, double scale,
                                      int64_t activation, double eps, const OptionalTensor& attention_seed,
                                      double attention_p, int64_t dropped, int64_t seed1, int64_t seed2, int64_t dtype,
                                      int64_t parts) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.is_contiguous(), "x must be (t, d), contiguous");
  LayerReader reader{parameters};
  const std::array<Dense, 3> in{Dense::read(reader), Dense::read(reader), Dense::read(reader)};
  const Dense output = Dense::read(reader);
  const Tensor &norm1 = reader.next(), &norm1_bias = reader.next();
  const Dense up = Dense::read(reader), down = Dense::read(reader);
  const Tensor &norm2 = reader.next(), &norm2_bias = reader.next();

  const bool narrows = dtype != code_of(x);
  const ScalarType narrow = kScalarTypes[dtype];
  const Tensor source = narrows ? torch::stable::to(x, narrow) : x;
  const std::array<Tensor, 3> qkv = project_thrice(source, in, parts);
  const auto split = [&](const Tensor& y) { return split_heads(y, heads, cu_seqlens.has_value(), batch); };
  const Tensor q = split(qkv[0]), k = split(qkv[1]), v = split(qkv[2]);
  const auto [attended, lse] =
      cu_seqlens ? attention_varlen_fwd(q, k, v, {}, {}, {}, {}, {}, attention_seed, *cu_seqlens, *cu_seqlens,
                                        max_seqlen, max_seqlen, -1, -1, scale, 0, attention_p, parts)
                 : attention_fwd(q, k, v, {}, {}, {}, {}, {}, attention_seed, -1, -1, 0, scale, 0, attention_p, parts);
  const AddedAndNormed first =
      add_and_norm(join_heads(attended, x.size(0)), output, x, norm1, norm1_bias, eps, dropped, seed1, parts);
  const Tensor middle = narrows ? torch::stable::to(first.y, narrow) : first.y;
  const auto [hidden, pre] = linear_fwd(middle, up.weight, up.bias, {}, {}, activation, true, parts);
  const AddedAndNormed second = add_and_norm(hidden, down, first.y, norm2, norm2_bias, eps, dropped, seed2, parts);
  std::vector<Tensor> results{second.y,   q,       k,   v,      attended, lse,         first.s,    first.rstd,
                              first.mean, first.y, pre, hidden, second.s, second.rstd, second.mean};
  if (narrows) results.insert(results.end(), {source, middle});
  return results;
}

// The gradients of x and, where they are needed, of the parameters, from that of y. saved: what encoder_layer_fwd has
// returned after y, x and y1 in `dtype` last, with or without narrowing.
std::vector<Tensor> encoder_layer_bwd(const Tensor& dy, std::vector<Tensor> saved, std::vector<Tensor> parameters,
                                      const OptionalTensor& cu_seqlens, int64_t batch, int64_t max_seqlen,
                                      int64_t heads, double scale, int64_t activation,
                                      const OptionalTensor& attention_seed, double attention_p, int64_t dropped,
                                      int64_t seed1, int64_t seed2, bool need_parameters, int64_t parts) {
  constexpr int64_t kNone = int64_t(lmk::Activation::none);
  STD_TORCH_CHECK(saved.size() == 15 && parameters.size() == 16, "saved and parameters must be those of a layer");
  const auto [q, k, v, attended, lse, s1, rstd1, mean1, pre, hidden, s2, rstd2, mean2, source, middle] =
      std::tie(saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7], saved[8], saved[9],
               saved[10], saved[11], saved[12], saved[13], saved[14]);
  const auto weight = [&](int64_t i) -> const Tensor& { return parameters[size_t(2 * i)]; };
  const auto bias = [&](int64_t i) -> const Tensor& { return parameters[size_t(2 * i + 1)]; };
  std::vector<Tensor> gradients(17, dy);  // of x, and where the parameters are
  const auto keep = [&](int64_t i, const Tensor& dweight, const Tensor& dbias) {
    gradients[size_t(2 * i + 1)] = dweight, gradients[size_t(2 * i + 2)] = dbias;
  };
  const auto keep_norm = [&](int64_t i, const std::vector<Tensor>& normed) {
    if (need_parameters) keep(i, normed[1], normed[2]);
  };
  // of what dropout was given, in the dtype that products have here
  const auto dropped_of = [&](const Tensor& dsum, int64_t seed) {
    if (dropped > 0) return dropout(dsum, {}, dropped, seed, code_of(source));
    return code_of(dsum) == code_of(source) ? dsum : torch::stable::to(dsum, source.scalar_type());
  };
  enum { kQuery, kKey, kValue, kOutput, kNorm1, kUp, kDown, kNorm2 };

  const std::vector<Tensor> normed2 =
      norm_bwd(dy, {}, s2, rstd2, mean2, weight(kNorm2), bias(kNorm2), need_parameters, need_parameters);
  keep_norm(kNorm2, normed2);
  const auto [dhidden, ddown, ddown_bias] = linear_gradients(dropped_of(normed2[0], seed2), hidden, weight(kDown), {},
                                                             kNone, true, need_parameters, need_parameters, parts);
  keep(kDown, ddown, ddown_bias);
  const auto [dmiddle, dup, dup_bias] = linear_gradients(dhidden, middle, weight(kUp), pre, activation, true,
                                                         need_parameters, need_parameters, parts, normed2[0]);
  keep(kUp, dup, dup_bias);
  const std::vector<Tensor> normed1 =
      norm_bwd(dmiddle, {}, s1, rstd1, mean1, weight(kNorm1), bias(kNorm1), need_parameters, need_parameters);
  keep_norm(kNorm1, normed1);
  const int64_t tokens = source.size(0);
  const auto [dattended, doutput, doutput_bias] =
      linear_gradients(dropped_of(normed1[0], seed1), join_heads(attended, tokens), weight(kOutput), {}, kNone, true,
                       need_parameters, need_parameters, parts);
  keep(kOutput, doutput, doutput_bias);
  const Tensor dheads = split_heads(dattended, heads, cu_seqlens.has_value(), batch);
  const AttentionGradients inner =
      cu_seqlens ? attention_varlen_bwd(dheads, {}, q, k, v, attended, lse, {}, {}, {}, {}, {}, attention_seed,
                                        *cu_seqlens, *cu_seqlens, max_seqlen, max_seqlen, -1, -1, scale, 0, attention_p,
                                        false, false, false, false, parts)
                 : attention_bwd(dheads, {}, q, k, v, attended, lse, {}, {}, {}, {}, {}, attention_seed, -1, -1, 0,
                                 scale, 0, attention_p, false, false, false, false, parts);
  Tensor dx = normed1[0];
  const std::array<Tensor, 3> dqkv{std::get<0>(inner), std::get<1>(inner), std::get<2>(inner)};
  for (int64_t i = kQuery; i <= kValue; ++i) {
    const auto [sum, dweight, dbias] = linear_gradients(join_heads(dqkv[size_t(i)], tokens), source, weight(i), {},
                                                        kNone, true, need_parameters, need_parameters, parts, dx);
    dx = sum;
    keep(i, dweight, dbias);
  }
  gradients[0] = dx;
  if (!need_parameters) gradients.resize(1, dx);
  for (size_t i = 1; i < gradients.size(); ++i)
    if (gradients[i].scalar_type() != parameters[i - 1].scalar_type())
      gradients[i] = torch::stable::to(gradients[i], parameters[i - 1].scalar_type());
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("encoder_layers", TORCH_BOX(&encoder_layers));
  m.impl("encoder_layer_fwd", TORCH_BOX(&encoder_layer_fwd));
  m.impl("encoder_layer_bwd", TORCH_BOX(&encoder_layer_bwd));
}
