"""GPT-2 (Radford et al. 2019) on lmkernels' attention, with Hugging Face's names for weights and arguments."""

import math
import sys
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from ..generation import KVCache, generate
from ..nn import RotaryEmbedding
from ..ops.attention import attention
from ..ops.embed import embed
from ..ops.linear import linear
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.mlp import mlp, swiglu_mlp
from ..ops.norms import layer_norm, rms_norm
from ..ops.positions import add_positions
from ..ops.qkv_projection import qkv_projection
from ..ops.rotary import rotary
from .dropout import Dropout
from .outputs import CausalLMOutput
from .pretrained import GenerationDefaults, PretrainedConfig, PretrainedModel
from .project import project, weights_of
from .steps import step_model

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


CHOICES = {
    "activation_function": tuple(ACTIVATIONS),
    "norm": ("layer_norm", "rms_norm"),
    "position": ("learned", "rotary"),
    "mlp": ("plain", "swiglu"),
}


# arguments of Hugging Face's GPT-2 that ours does not support
ABSENT = (
    "token_type_ids",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "output_attentions",
    "output_hidden_states",
)


@dataclass
class GPT2Config(PretrainedConfig):
    """The shape and constants of a GPT-2; names and defaults are Hugging Face's.

    n_inner: width of the feed-forward layer; None is 4 * n_embd, or for swiglu, whose layer has three matrices instead
        of two, 8 / 3 * n_embd rounded up to a multiple of 64

    The last fields are ours. With them the same model is built as Llama is; with their defaults it is GPT-2.

    norm: "layer_norm", or "rms_norm" (Zhang and Sennrich 2019, arXiv:1910.07467); layer_norm_epsilon is for both
    position: "learned", or "rotary" (Su et al. 2021, arXiv:2104.09864): no table of positions; queries and keys are
        rotated, by frequencies rope_theta ** (-2 i / d_rot), in the first d_rot = rotary_fraction * d columns of a head
    mlp: "plain", activation_function between two layers, or "swiglu" (Shazeer 2020, arXiv:2002.05202), without biases
    num_kv_heads: heads of keys and values, each of which serves n_head / num_kv_heads queries' heads (Ainslie et al.
        2023, arXiv:2305.13245); n_head when None
    bias: whether layers and layer norms have biases
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
    norm: str = "layer_norm"
    position: str = "learned"
    rope_theta: float = 10000.0
    rotary_fraction: float = 1.0
    mlp: str = "plain"
    num_kv_heads: int | None = None
    bias: bool = True

    model_type = "gpt2"
    # of a model that Hugging Face's GPT-2 cannot be: transformers refuses it, instead of filling it with random weights
    own_model_type = "lmkernels_gpt"

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            self._check_whole(name)
        for name in ("n_inner", "num_kv_heads"):
            if getattr(self, name) is not None:
                self._check_whole(name)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head = {self.n_head}, got {self.n_embd}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head must be a multiple of num_kv_heads = {self.num_kv_heads}, got {self.n_head}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.position == "rotary" and not (0 < self.rotary_fraction <= 1 and self.rotary_columns > 0):
            raise ValueError(
                f"rotary_fraction must lie in (0, 1] and keep 2 or more of a head's {self.n_embd // self.n_head} "
                f"columns, got {self.rotary_fraction}"
            )

    def _check_whole(self, name: str) -> None:
        if not isinstance(value := getattr(self, name), int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.n_head

    @property
    def rotary_columns(self) -> int:
        """How many columns of a head are rotated: an even number."""
        return int(self.rotary_fraction * (self.n_embd // self.n_head)) // 2 * 2

    @property
    def d_ff(self) -> int:
        """Width of the feed-forward layer."""
        if self.n_inner is None and self.mlp == "swiglu":
            return -(-8 * self.n_embd // 192) * 64
        return self.n_inner or 4 * self.n_embd

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
    def check_model_type(cls, entries: dict) -> None:
        if entries.get("model_type") != cls.own_model_type:
            super().check_model_type(entries)

    @classmethod
    def from_dict(cls, entries: dict, **overrides) -> "GPT2Config":
        if entries.get("add_cross_attention"):
            raise NotImplementedError("add_cross_attention must be false: cross attention is not supported")
        return super().from_dict(entries, **overrides)

    def to_dict(self) -> dict:
        entries = super().to_dict()
        ours = ("norm", "position", "rope_theta", "rotary_fraction", "mlp", "num_kv_heads", "bias")
        defaults = {field.name: field.default for field in fields(self)}
        if all(entries[name] == defaults[name] for name in ours):
            return {name: value for name, value in entries.items() if name not in ours}
        return entries | {"model_type": self.own_model_type}


class Conv1D(nn.Module):
    """The weights of a linear layer as GPT-2 checkpoints store them: weight (d_in, d_out), bias (d_out,) or None.

    std: of the fresh weights
    """

    def __init__(self, d_out: int, d_in: int, *, bias: bool, std: float):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(d_in, d_out))
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out)) if bias else None)

    @property
    def __class__(self):
        """transformers' Conv1D where that is loaded: peft, which asks isinstance(), adapts no others."""
        return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", Conv1D)

    def __reduce__(self):
        # pickle's own way wants type(self) to be self.__class__
        return Conv1D.__new__, (Conv1D,), self.__dict__

    def parameters_of_linear(self):
        return self.weight.t(), self.bias

    def forward(self, x):
        return linear(x, *self.parameters_of_linear())


def norm_of(config: GPT2Config) -> nn.Module:
    if config.norm == "rms_norm":
        return nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)


def normed(norm: nn.Module, x):
    if isinstance(norm, nn.RMSNorm):
        return rms_norm(x, norm.weight, norm.eps)
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        d_model, d = config.n_embd, config.n_embd // config.n_head
        self.layer, self.n_head, self.kv_heads = layer, config.n_head, config.kv_heads
        self.attn_pdrop = config.attn_pdrop
        self.scale = d**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        d_qkv = (self.n_head + 2 * self.kv_heads) * d
        self.c_attn = Conv1D(d_qkv, d_model, bias=config.bias, std=config.initializer_range)
        self.c_proj = Conv1D(d_model, d_model, bias=config.bias, std=config.residual_std)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, x, residual, mask, cache, rotation):
        q, k, v = self.heads(x, rotation)  # (b, s, h or h_kv, d)
        options = {"scale": self.scale, "mask": mask, "dropout_p": self.attn_pdrop if self.training else 0.0}
        if cache is None:
            out = attention(q, k, v, causal=True, **options)  # (b, s, h, d)
        else:
            out = cache.attend(self.layer, q, k, v, **options)
        out = out.flatten(2)  # (b, s, h d)
        if self.training and self.resid_dropout.p > 0:
            return self.resid_dropout(project(self.c_proj, out), residual)
        return project(self.c_proj, out, residual=residual)

    def heads(self, x, rotation):
        if (weights := weights_of(self.c_attn)) is not None:
            return qkv_projection(x, *weights, num_heads=self.n_head, num_kv_heads=self.kv_heads, **rotation)
        heads = self.c_attn(x).unflatten(-1, (self.n_head + 2 * self.kv_heads, -1))  # (b, s, h + 2 h_kv, d)
        q, k, v = heads.split((self.n_head, self.kv_heads, self.kv_heads), dim=2)
        return *((rotary(y, **rotation) for y in (q, k)) if rotation else (q, k)), v


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        inward = {"bias": config.bias and not self.swiglu, "std": config.initializer_range}
        if self.swiglu:
            self.c_gate = Conv1D(config.d_ff, config.n_embd, **inward)
            self.c_up = Conv1D(config.d_ff, config.n_embd, **inward)
        else:
            self.c_fc = Conv1D(config.d_ff, config.n_embd, **inward)
        self.c_proj = Conv1D(config.n_embd, config.d_ff, bias=inward["bias"], std=config.residual_std)
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x, residual):
        if self.training and self.dropout.p > 0:
            return self.dropout(self.layers(x, None), residual)
        return self.layers(x, residual)

    def layers(self, x, residual):
        inward = (self.c_gate, self.c_up) if self.swiglu else (self.c_fc,)
        weights = [weights_of(layer) for layer in (*inward, self.c_proj)]
        if self.swiglu:
            if None not in weights:
                return swiglu_mlp(x, *(weight for weight, _ in weights), residual=residual)
            return project(self.c_proj, project(self.c_gate, x, "silu") * project(self.c_up, x), residual=residual)
        if None not in weights:
            return mlp(x, *weights[0], *weights[1], activation=self.activation, residual=residual)
        return project(self.c_proj, project(self.c_fc, x, self.activation), residual=residual)


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = norm_of(config)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = norm_of(config)
        self.mlp = GPT2MLP(config)

    def forward(self, x, mask, cache, rotation):
        x = self.attn(normed(self.ln_1, x), x, mask, cache, rotation)
        return self.mlp(normed(self.ln_2, x), x)


class GPT2Model(nn.Module):
    """The decoder without its head: token ids (b, s), or embeddings of them, to hidden states (b, s, d_model)."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        else:
            self.rotary = RotaryEmbedding(
                config.rotary_columns, max_positions=config.n_positions, base=config.rope_theta
            )
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm_of(config)

    def forward(self, input_ids, inputs_embeds, cache, attention_mask, position_ids):
        b, s = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        past = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + s, device=self.ln_f.weight.device).unsqueeze(0)  # (1, s)
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != (b, past + s):
                raise ValueError(
                    f"attention_mask must be (b, s_k) = {(b, past + s)}, got {tuple(attention_mask.shape)}"
                )
            mask = attention_mask.bool().view(b, 1, 1, past + s)
        x = self.drop(self.embedded(input_ids, inputs_embeds, position_ids))  # (b, s, d_model)
        rotation = {}
        if self.config.position == "rotary":
            rotation = {"cos": self.rotary.cos, "sin": self.rotary.sin, "positions": position_ids}
        for block in self.h:
            x = block(x, mask, cache, rotation)
        if cache is not None:
            cache.advance(s)
        return normed(self.ln_f, x)

    def embedded(self, input_ids, inputs_embeds, position_ids):
        table = self.wpe.weight if self.config.position == "learned" else None
        if inputs_embeds is not None:
            return inputs_embeds if table is None else add_positions(inputs_embeds, table, positions=position_ids)
        positions = {} if table is None else {"position_table": table, "positions": position_ids}
        # rows of a quantised table are float32 where no other table says otherwise
        return embed(input_ids, self.wte.weight, **positions).to(self.ln_f.weight.dtype)


class GPT2LMHeadModel(PretrainedModel):
    """GPT-2 with its language modelling head, tied to the token embedding by default.

    Fresh weights follow the GPT-2 paper: N(0, 0.02), the projections back into the residual stream
    N(0, 0.02 / sqrt(2 n_layer)), biases 0.
    """

    config_class = GPT2Config
    base_model_prefix = "transformer"
    # tells Hugging Face's Trainer that forward shifts the labels
    loss_type = "ForCausalLM"

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **arguments) -> dict:
        """What forward takes of a step; peft wants every causal model to have it, `generate` does not ask."""
        return {"input_ids": input_ids, **arguments}

    generate = generate
    step_model = step_model
    _input_embeddings = "wte"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _keys_to_ignore_on_load_unexpected = (r"\.attn\.(masked_)?bias$",)
    _heads = ("lm_head.", "score.", "classifier.", "multiple_choice_head.")
    _no_split_modules = ["GPT2Block"]

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.generation_config = GenerationDefaults(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            module.weight.normal_(0.0, module.std)
            if module.bias is not None:
                module.bias.zero_()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **absent,
    ) -> CausalLMOutput | tuple:
        """Next-token logits, and the loss when labels are given; in training mode the loss comes without the logits.

        input_ids: (b, s)        tokens that are not yet in past_key_values
        past_key_values          the cache an earlier call returned
        attention_mask: (b, s_k) nonzero = may be attended; s_k counts the cached tokens too
        position_ids: (b, s)     default: the tokens' places, cached ones counted
        labels: (b, s)           usually input_ids itself: they are shifted here; -100 is ignored
        use_cache                default: config.use_cache, but no cache while gradients are recorded
        logits_to_keep           only the last so many positions, 0 = all; or a tensor of positions
        num_items_in_batch       divides the summed loss, instead of the count of labels in this batch
        inputs_embeds: (b, s, d_model)  in the place of input_ids, for tokens without a row of the table
        return_dict              False: a tuple, without what is None
        absent                   what Hugging Face's GPT-2 also takes, such as output_attentions, must be None or False
        """
        check_absent(absent)
        past_key_values = self._check(
            input_ids, inputs_embeds, past_key_values, position_ids, labels, use_cache, logits_to_keep
        )
        x = self.transformer(input_ids, inputs_embeds, past_key_values, attention_mask, position_ids)  # (b, s, d_model)
        loss = None if labels is None else causal_lm_loss(x, self.lm_head.weight, labels, num_items_in_batch)
        logits = None
        if labels is None or not self.training:
            kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-logits_to_keep, None)
            logits = linear(x[:, kept], self.lm_head.weight)  # (b, s, vocab)
        out = CausalLMOutput(loss=loss, logits=logits, past_key_values=past_key_values)
        return out.to_tuple() if return_dict is False else out

    def _check(
        self, input_ids, inputs_embeds, cache, position_ids, labels, use_cache, logits_to_keep
    ) -> KVCache | None:
        """Raises for bad arguments; returns the cache to use."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
            raise ValueError(f"input_ids must be integers (b, s), got {input_ids.dtype} {tuple(input_ids.shape)}")
        if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.n_embd):
            raise ValueError(f"inputs_embeds must be (b, s, {self.config.n_embd}), got {tuple(inputs_embeds.shape)}")
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if labels is not None and labels.shape != shape:
            raise ValueError(f"labels must be {tuple(shape)} like the tokens, got {tuple(labels.shape)}")
        if labels is not None and (isinstance(logits_to_keep, torch.Tensor) or logits_to_keep):
            raise ValueError(f"logits_to_keep must be 0 when labels are given, got {logits_to_keep}")
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"past_key_values must be a KVCache, got {type(cache).__name__}")
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not torch.is_grad_enabled())
        if use_cache and torch.is_grad_enabled():
            raise ValueError("use_cache must be False while gradients are recorded: wrap the call in torch.no_grad()")
        if use_cache and cache is None:
            cache = KVCache(self.config.n_layer)
        last = shape[1] + (cache.length if cache is not None else 0)
        if position_ids is None and last > self.config.n_positions:
            raise ValueError(f"input_ids must not go beyond n_positions = {self.config.n_positions}, got {last} tokens")
        # reading values would stall a GPU and break a compiled graph
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            if input_ids is not None:
                check_range("input_ids", input_ids, self.config.vocab_size, "vocab_size")
            if position_ids is not None:
                check_range("position_ids", position_ids, self.config.n_positions, "n_positions")
        return cache


def check_absent(arguments: dict) -> None:
    """Raises for arguments that nobody knows, and for those of Hugging Face's GPT-2 that ask for what is not there."""
    for name, value in arguments.items():
        if name not in ABSENT:
            raise TypeError(f"GPT2LMHeadModel.forward() got an unexpected keyword argument {name!r}")
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} must be None: it is not supported, got {type(value).__name__}")


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
