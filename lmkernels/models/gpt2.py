"""GPT-2 (Radford et al. 2019) on lmkernels' attention, with Hugging Face's names for weights and arguments."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..generation import KVCache, generate
from ..ops.attention import attention
from ..ops.embed import embed
from ..ops.linear import linear
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.mlp import mlp
from ..ops.norms import layer_norm
from ..ops.output_projection import output_projection
from ..ops.qkv_projection import qkv_projection
from .outputs import CausalLMOutput
from .pretrained import PretrainedConfig, PretrainedModel

# Hugging Face's names, and those of `mlp`
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}

SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


@dataclass
class GPT2Config(PretrainedConfig):
    """The shape and constants of a GPT-2; names and defaults are Hugging Face's.

    n_inner: width of the feed-forward layer, 4 * n_embd when None.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    model_type = "gpt2"

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head = {self.n_head}, got {self.n_embd}")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}, got {self.activation_function!r}"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @property
    def residual_std(self) -> float:
        """Standard deviation of the fresh projections back into the residual stream."""
        return self.initializer_range / math.sqrt(2 * self.n_layer)

    @classmethod
    def from_name(cls, name: str, **overrides) -> "GPT2Config":
        """The configuration of a released size: gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
        if name not in SIZES:
            raise ValueError(f"name must be one of {', '.join(SIZES)}, got {name!r}")
        return cls(**(SIZES[name] | overrides))

    @classmethod
    def from_dict(cls, entries: dict, **overrides) -> "GPT2Config":
        if entries.get("add_cross_attention"):
            raise NotImplementedError("add_cross_attention must be false: cross attention is not supported")
        return super().from_dict(entries, **overrides)


class Conv1D(nn.Module):
    """The weights of a linear layer as GPT-2 checkpoints store them: weight (d_in, d_out), bias (d_out,).

    std: of the fresh weights
    """

    def __init__(self, d_out: int, d_in: int, std: float):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def parameters_of_linear(self):
        return self.weight.t(), self.bias


def normed(norm: nn.LayerNorm, x):
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer, self.n_head, self.attn_pdrop = layer, config.n_head, config.attn_pdrop
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd, config.initializer_range)
        self.c_proj = Conv1D(config.n_embd, config.n_embd, config.residual_std)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, residual, mask, cache):
        q, k, v = qkv_projection(x, *self.c_attn.parameters_of_linear(), num_heads=self.n_head)  # (b, s, h, d) each
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (b, s_k, h, d) each
        dropout_p = self.attn_pdrop if self.training else 0.0
        out = attention(q, k, v, causal=True, scale=self.scale, mask=mask, dropout_p=dropout_p)  # (b, s, h, d)
        if self.training and self.resid_dropout.p > 0:
            return residual + self.resid_dropout(output_projection(out, *self.c_proj.parameters_of_linear()))
        return output_projection(out, *self.c_proj.parameters_of_linear(), residual=residual)


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        d_ff = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(d_ff, config.n_embd, config.initializer_range)
        self.c_proj = Conv1D(config.n_embd, d_ff, config.residual_std)
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, residual):
        weights = (*self.c_fc.parameters_of_linear(), *self.c_proj.parameters_of_linear())
        if self.training and self.dropout.p > 0:
            return residual + self.dropout(mlp(x, *weights, activation=self.activation))
        return mlp(x, *weights, activation=self.activation, residual=residual)


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x, mask, cache):
        x = self.attn(normed(self.ln_1, x), x, mask, cache)
        return self.mlp(normed(self.ln_2, x), x)


class GPT2Model(nn.Module):
    """The decoder without its head: token ids (b, s) to hidden states (b, s, d_model)."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, input_ids, cache, attention_mask, position_ids):
        b, s = input_ids.shape
        past = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + s, device=input_ids.device).unsqueeze(0)  # (1, s)
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != (b, past + s):
                raise ValueError(
                    f"attention_mask must be (b, s_k) = {(b, past + s)}, got {tuple(attention_mask.shape)}"
                )
            mask = attention_mask.bool().view(b, 1, 1, past + s)
        x = embed(input_ids, self.wte.weight, position_table=self.wpe.weight, positions=position_ids)
        x = self.drop(x)  # (b, s, d_model)
        for block in self.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.advance(s)
        return normed(self.ln_f, x)


class GPT2LMHeadModel(PretrainedModel):
    """GPT-2 with its language modelling head, tied to the token embedding by default.

    Fresh weights follow the GPT-2 paper: N(0, 0.02), the projections back into the residual stream
    N(0, 0.02 / sqrt(2 n_layer)), biases 0.
    """

    config_class = GPT2Config
    base_model_prefix = "transformer"
    # tells Hugging Face's Trainer that forward takes num_items_in_batch, and that it shifts the labels
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"
    generate = generate
    _input_embeddings = "wte"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _keys_to_ignore_on_load_unexpected = (r"\.attn\.(masked_)?bias$",)
    _heads = ("lm_head.", "score.", "classifier.", "multiple_choice_head.")

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            module.weight.normal_(0.0, module.std)
            module.bias.zero_()

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: KVCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> CausalLMOutput:
        """Next-token logits, and the loss when labels are given; in training mode the loss comes without the logits.

        input_ids: (b, s)        tokens that are not yet in past_key_values
        past_key_values          the cache an earlier call returned
        attention_mask: (b, s_k) nonzero = may be attended; s_k counts the cached tokens too
        position_ids: (b, s)     default: the tokens' places, cached ones counted
        labels: (b, s)           usually input_ids itself: they are shifted here; -100 is ignored
        use_cache                default: config.use_cache, but no cache while gradients are recorded
        logits_to_keep           only the last so many positions, 0 = all
        num_items_in_batch       divides the summed loss, instead of the count of labels in this batch
        """
        past_key_values = self._check(input_ids, past_key_values, position_ids, labels, use_cache, logits_to_keep)
        x = self.transformer(input_ids, past_key_values, attention_mask, position_ids)  # (b, s, d_model)
        loss = None if labels is None else causal_lm_loss(x, self.lm_head.weight, labels, num_items_in_batch)
        logits = None
        if labels is None or not self.training:
            logits = linear(x[:, -logits_to_keep:], self.lm_head.weight)  # (b, s, vocab)
        return CausalLMOutput(loss=loss, logits=logits, past_key_values=past_key_values)

    def _check(self, input_ids, cache, position_ids, labels, use_cache, logits_to_keep) -> KVCache | None:
        """Raises for bad arguments; returns the cache to use."""
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be integers (b, s), got {input_ids.dtype} {tuple(input_ids.shape)}")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels must be {tuple(input_ids.shape)} like input_ids, got {tuple(labels.shape)}")
        if labels is not None and logits_to_keep:
            raise ValueError(f"logits_to_keep must be 0 when labels are given, got {logits_to_keep}")
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"past_key_values must be a KVCache, got {type(cache).__name__}")
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not torch.is_grad_enabled())
        if use_cache and torch.is_grad_enabled():
            raise ValueError("use_cache must be False while gradients are recorded: wrap the call in torch.no_grad()")
        if use_cache and cache is None:
            cache = KVCache(self.config.n_layer)
        last = input_ids.shape[1] + (cache.length if cache is not None else 0)
        if position_ids is None and last > self.config.n_positions:
            raise ValueError(f"input_ids must not go beyond n_positions = {self.config.n_positions}, got {last} tokens")
        # reading values would stall a GPU and break a compiled graph
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_range("input_ids", input_ids, self.config.vocab_size, "vocab_size")
            if position_ids is not None:
                check_range("position_ids", position_ids, self.config.n_positions, "n_positions")
        return cache


def causal_lm_loss(hidden, weight, labels, num_items_in_batch=None):
    """Cross entropy of hidden (b, s, d) weight^T against the labels (b, s) one place to the right, in float32.

    The label -100 is ignored. The sum is divided by num_items_in_batch, or by the number of labels that count.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # (b, s)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def check_range(name: str, ids: torch.Tensor, limit: int, limit_name: str) -> None:
    """Raises unless every entry of ids lies in [0, limit)."""
    if ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must lie in [0, {limit}) ({limit_name}), got {low if low < 0 else high}")
