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
  const std::array<int64_t, 3> by_token{tokens, heads, width / heads};
  const std::array<int64_t, 4> by_sequence{batch, tokens / std::max<int64_t>(1, batch), heads, width / heads};
  Tensor x = torch::stable::view(torch::stable::contiguous(x_), {packed.data(), packed.size()});
  LayerReader reader{parameters};
  while (reader.used < parameters.size()) {
    const std::array<Dense, 3> in{Dense::read(reader), Dense::read(reader), Dense::read(reader)};
    const std::array<Tensor, 3> qkv = project_thrice(x, in, parts);
    const auto by_head = [&](const Tensor& y) {
      return cu_seqlens ? torch::stable::view(y, {by_token.data(), by_token.size()})
                        : torch::stable::view(y, {by_sequence.data(), by_sequence.size()});
    };
    const Tensor q = by_head(qkv[0]), k = by_head(qkv[1]), v = by_head(qkv[2]);
    const Tensor heads_out =
        cu_seqlens ? std::get<0>(attention_varlen_fwd(q, k, v, {}, {}, {}, {}, {}, {}, *cu_seqlens, *cu_seqlens,
                                                      max_seqlen, max_seqlen, -1, -1, scale, 0, 0, parts))
                   : std::get<0>(attention_fwd_plain(q, k, v, -1, 0, scale, parts));
    const Tensor attended = torch::stable::view(heads_out, {packed.data(), packed.size()});
    const auto norm = [&](const Tensor& y) {
      const Tensor &weight = reader.next(), &bias = reader.next();
      return norm_fwd(y, {}, weight, bias, eps, true, false)[0];
    };
    const Tensor after_attention = Dense::read(reader)(attended, x, kNone, parts);
    x = norm(after_attention);
    const Tensor hidden = Dense::read(reader)(x, {}, activation, parts);
    const Tensor after_mlp = Dense::read(reader)(hidden, x, kNone, parts);
    x = norm(after_mlp);
  }
  return torch::stable::view(x, x_.sizes());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) { m.impl("encoder_layers", TORCH_BOX(&encoder_layers)); }
