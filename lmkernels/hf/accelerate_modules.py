"""Forwards for the blocks of transformers' models, recognised by what they are made of.

Each is a `StandIn` with `read(module)`: the facts that its forward needs of a module; or a sentence why such a block
cannot be served; or None for a module that is no such block. What a block is made of suggests what it computes and does
not prove it: `accelerate` also compares the two forwards in numbers.

The parts of a block keep their places, names and parameters. A forward that works on the parameters of its parts leaves
the call to the block's own forward where a part is no longer what it was: wrapped by peft, pruned, hooked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn._scope import is_for_torch
from ..nn._stand_in import StandIn
from ..nn.embedding import is_dense, table, takes_indices
from ..nn.replace import is_conv1d, original
from ..ops.dropout import drop
from ..ops.embed import embed
from ..ops.linear import linear
from ..ops.mlp import mlp, swiglu_mlp
from ..ops.norms import layer_norm, rms_norm
from ..ops.qkv_projection import qkv_projection

ACTIVATIONS = {
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "relu": nn.functional.relu,
    "tanh": torch.tanh,
}


class RMSNorm(StandIn):
    """`lmkernels.rms_norm` in place of LlamaRMSNorm, T5LayerNorm and the like."""

    class Facts(NamedTuple):
        eps: float

    @classmethod
    def read(cls, module: nn.Module) -> Facts | None:
        name = type(module).__name__
        tensors = [*dict(module.named_parameters()), *dict(module.named_buffers())]
        if tensors != ["weight"] or module.weight.dim() != 1 or not name.endswith(("RMSNorm", "LayerNorm")):
            return None
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return cls.Facts(eps) if isinstance(eps, float) else None

    @staticmethod
    def example(module: nn.Module, generator: torch.Generator) -> tuple:
        return (_random(module.weight, generator, 2, 3, module.weight.shape[0]),)

    def forward(self, hidden_states: Tensor, *more, **named) -> Tensor:
        weight = self.weight
        if more or named or is_for_torch(hidden_states, weight) or hidden_states.dtype != weight.dtype:
            return super().forward(hidden_states, *more, **named)
        return rms_norm(hidden_states, weight, self.facts.eps)


class MLP(StandIn):
    """`lmkernels.mlp` in place of a linear layer, an activation, another linear layer, and dropout after either."""

    class Facts(NamedTuple):
        up: str
        down: str
        activation: str
        inner_dropout: str | None
        dropout: str | None

    # the children's names: both products, the activation, the dropout after it and that after the second product
    NAMES = (
        ("c_fc", "c_proj", "act", None, "dropout"),
        ("fc1", "fc2", "activation_fn", None, None),
        ("fc1", "fc2", "act", None, None),
        ("dense_h_to_4h", "dense_4h_to_h", "act", None, None),
        ("up_proj", "down_proj", "act_fn", None, None),
        ("wi", "wo", "act", "dropout", None),
    )

    @classmethod
    def read(cls, module: nn.Module) -> Facts | str | None:
        for up, down, activation, inner_dropout, dropout in cls.NAMES:
            if children(module) == {up, down, activation, inner_dropout, dropout} - {None}:
                break
        else:
            return None
        parts = {name: getattr(module, name) for name in (up, down, inner_dropout, dropout) if name}
        if reason := not_plain(parts):
            return reason
        name = activation_name(getattr(module, activation))
        return cls.Facts(up, down, name, inner_dropout, dropout) if name else f"the ops know no {activation} like its"

    @staticmethod
    def example(module: nn.Module, generator: torch.Generator) -> tuple:
        weight = parameters(getattr(module, type(module).facts.up))[0]
        return (_random(weight, generator, 2, 3, weight.shape[1]),)

    def forward(self, hidden_states: Tensor) -> Tensor:
        facts = self.facts
        up, down = getattr(self, facts.up), getattr(self, facts.down)
        if not (are_plain(up, down) and may_fuse(hidden_states, up, down)) or _drops(self, facts.inner_dropout):
            return super().forward(hidden_states)
        out = mlp(hidden_states, *parameters(up), *parameters(down), activation=facts.activation)
        return getattr(self, facts.dropout)(out) if facts.dropout else out


class SwiGLU(StandIn):
    """`lmkernels.swiglu_mlp` in place of down(silu(gate(x)) * up(x))."""

    class Facts(NamedTuple):
        gate: str
        up: str
        down: str

    NAMES = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("w1", "w3", "w2", "act_fn"))

    @classmethod
    def read(cls, module: nn.Module) -> Facts | str | None:
        names = next((names for names in cls.NAMES if children(module) == set(names)), None)
        if names is None:
            return None
        *linears, activation = names
        parts = {name: getattr(module, name) for name in linears}
        if reason := not_plain(parts):
            return reason
        if any(part.bias is not None for part in parts.values()):
            return "swiglu_mlp has no biases"
        if activation_name(getattr(module, activation)) != "silu":
            return f"{activation} is not silu"
        return cls.Facts(*linears)

    @staticmethod
    def example(module: nn.Module, generator: torch.Generator) -> tuple:
        weight = getattr(module, type(module).facts.gate).weight
        return (_random(weight, generator, 2, 3, weight.shape[1]),)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.facts)
        if not (are_plain(gate, up, down) and may_fuse(x, gate, up, down)):
            return super().forward(x)
        return swiglu_mlp(x, gate.weight, up.weight, down.weight)


class AddAndNorm(StandIn):
    """LayerNorm(dropout(dense(x)) + residual), as after BERT's attention and MLP: the sum costs no pass of its own."""

    @staticmethod
    def read(module: nn.Module) -> tuple | str | None:
        if children(module) != {"dense", "LayerNorm", "dropout"} or not isinstance(module.dense, nn.Linear):
            return None
        return not_plain(dict(module.named_children())) or ()

    @staticmethod
    def example(module: nn.Module, generator: torch.Generator) -> tuple:
        weight = module.dense.weight
        return tuple(_random(weight, generator, 2, 3, size) for size in reversed(weight.shape))

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        dense, norm, dropout = self.dense, self.LayerNorm, self.dropout
        if not (are_plain(dense, norm, dropout) and may_fuse(hidden_states, dense, norm, like=input_tensor)):
            return super().forward(hidden_states, input_tensor)
        return added_and_normed(norm, dropout, input_tensor, linear, hidden_states, *parameters(dense))


class FeedForwardChunk(StandIn):
    """The second half of BERT's layer, intermediate and output, with one `lmkernels.mlp`."""

    class Facts(NamedTuple):
        activation: str

    method = "feed_forward_chunk"

    @classmethod
    def read(cls, module: nn.Module) -> Facts | str | None:
        intermediate, output = getattr(module, "intermediate", None), getattr(module, "output", None)
        if not hasattr(module, cls.method) or intermediate is None or output is None:
            return None
        if children(intermediate) != {"dense", "intermediate_act_fn"} or not isinstance(AddAndNorm.read(output), tuple):
            return None
        if reason := not_plain({"intermediate.dense": intermediate.dense}):
            return reason
        name = activation_name(intermediate.intermediate_act_fn)
        return cls.Facts(name) if name else "the ops know no activation like its"

    @staticmethod
    def example(module: nn.Module, generator: torch.Generator) -> tuple:
        weight = module.intermediate.dense.weight
        return (_random(weight, generator, 2, 3, weight.shape[1]),)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        intermediate, output = self.intermediate, self.output
        up, down, norm, dropout = intermediate.dense, output.dense, output.LayerNorm, output.dropout
        fused = not (_is_hooked(intermediate) or _is_hooked(output)) and are_plain(up, down, norm, dropout)
        if not fused or not may_fuse(attention_output, up, down, norm):
            return super().feed_forward_chunk(attention_output)
        weights = (*parameters(up), *parameters(down))
        return added_and_normed(
            norm, dropout, attention_output, mlp, attention_output, *weights, activation=self.facts.activation
        )


class SelfAttention(StandIn):
    """BERT's query, key and value by one `lmkernels.qkv_projection`, where gradients are wanted.

    The three weights are copied side by side, which costs less than the backward of one product saves; a forward alone
    would save nothing.
    """

    @staticmethod
    def read(module: nn.Module) -> tuple | str | None:
        numbers = ("num_attention_heads", "attention_head_size", "scaling", "config")
        if children(module) != {"query", "key", "value", "dropout"} or not all(hasattr(module, n) for n in numbers):
            return None
        if reason := not_plain(dict(module.named_children())):
            return reason
        shapes = {(part.weight.shape, part.bias is None) for part in (module.query, module.key, module.value)}
        return () if len(shapes) == 1 else "query, key and value have different shapes"

    @staticmethod
    def example(module: nn.Module, generator: torch.Generator) -> tuple:
        return (_random(module.query.weight, generator, 2, 3, module.query.in_features),)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *more, **named):
        parts = (self.query, self.key, self.value)
        fused = (
            torch.is_grad_enabled()
            and self.config._attn_implementation == "lmkernels"
            and not any(more)
            and all(named.get(name) is None for name in ("cache", "past_key_values", "encoder_hidden_states"))
            and are_plain(*parts)
            and hidden_states.dim() == 3
            and may_fuse(hidden_states, *parts)
        )
        if not fused:
            return super().forward(hidden_states, attention_mask, *more, **named)
        from .attention import attention_forward

        weight = torch.cat([part.weight for part in parts])  # (3 h d, d_model)
        bias = None if self.query.bias is None else torch.cat([part.bias for part in parts])
        heads = qkv_projection(hidden_states, weight, bias, num_heads=self.num_attention_heads)  # (b, s, h, d) each
        q, k, v = (x.transpose(1, 2) for x in heads)
        dropout = self.dropout.p if self.training else 0.0
        out, weights = attention_forward(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **named
        )  # (b, s, h, d)
        return out.flatten(-2), weights


class Embeddings(StandIn):
    """BERT's and RoBERTa's three embeddings in one `lmkernels.embed`, then LayerNorm and dropout."""

    TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")

    @classmethod
    def read(cls, module: nn.Module) -> tuple | str | None:
        if children(module) != {*cls.TABLES, "LayerNorm", "dropout"}:
            return None
        if not all(is_dense(getattr(module, name)) for name in cls.TABLES):
            return "a table has max_norm, sparse or scale_grad_by_freq"
        return not_plain(dict(module.named_children())) or ()

    @classmethod
    def example(cls, module: nn.Module, generator: torch.Generator) -> tuple:
        words, positions, types = (getattr(module, name).num_embeddings for name in cls.TABLES)
        device = module.word_embeddings.weight.device
        ids, type_ids = (torch.randint(n, (2, min(3, positions)), generator=generator) for n in (words, types))
        if (padding := module.word_embeddings.padding_idx) is not None:
            ids[0, -1] = padding  # RoBERTa counts positions without it
        return ids.to(device), type_ids.to(device)

    def forward(self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, *more, **named):
        words, positions, types = (getattr(self, name) for name in self.TABLES)
        fused = (
            isinstance(input_ids, Tensor)
            and input_ids.dim() == 2
            and inputs_embeds is None
            and not any(more)
            and not any(named.values())
            and are_plain(words, positions, types)
            and all(takes_indices(ids) for ids in (input_ids, token_type_ids, position_ids) if ids is not None)
            and may_fuse(words.weight, words, positions, types)
        )
        if not fused:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, *more, **named)
        if position_ids is None and hasattr(self, "create_position_ids_from_input_ids"):
            position_ids = self.create_position_ids_from_input_ids(input_ids, self.padding_idx)
        x = embed(
            input_ids,
            table(words),
            position_table=table(positions),
            positions=position_ids,
            type_ids=token_type_ids,
            type_table=table(types),
        )  # (b, s, d)
        return self.dropout(self.LayerNorm(x))


class Dropout(StandIn):
    """torch.nn.Dropout, whose decisions on a CPU come from all cores, 16 bits each."""

    @staticmethod
    def read(module: nn.Module) -> tuple | None:
        return () if type(module) is nn.Dropout else None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if is_for_torch(input) else drop(self, input)


FORWARDS = (RMSNorm, MLP, SwiGLU, AddAndNorm, FeedForwardChunk, SelfAttention, Embeddings, Dropout)


def children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Of a linear layer or Conv1D: weight (out, in) and bias."""
    return (module.weight.t() if type(module).__name__ == "Conv1D" else module.weight), module.bias


def are_plain(*modules: nn.Module) -> bool:
    """Whether these compute what their class says, and nobody looks on: so that their parameters tell all."""
    return not any(_is_hooked(module) or not _is_known(type(module)) for module in modules)


def not_plain(modules: dict[str, nn.Module]) -> str:
    """Which of the parts of a block are not plain, or ""."""
    names = [name for name, module in modules.items() if not are_plain(module)]
    return f"{' and '.join(names)}: not as transformers made it" if names else ""


def _is_known(kind: type) -> bool:
    kind = original(kind)
    return kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout) or is_conv1d(kind)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def may_fuse(x: Tensor, *modules: nn.Module, like: Tensor | None = None) -> bool:
    """Whether the ops take x and the modules' parameters together with the dtype that torch would give the result."""
    tensors = [p for module in modules for p in module.parameters(recurse=False)]
    return not is_for_torch(x, like, *tensors) and len({p.dtype for p in tensors}) == 1


def added_and_normed(norm: nn.LayerNorm, dropout: nn.Dropout, residual: Tensor, product, *arguments, **options):
    """norm(dropout(product(...)) + residual), where product is an op that can add a residual itself."""
    weights = (norm.weight, norm.bias, norm.eps)
    if dropout.training and dropout.p > 0:
        return layer_norm(dropout(product(*arguments, **options)), *weights, residual=residual)[0]
    return layer_norm(product(*arguments, **options, residual=residual), *weights)


def activation_name(module: nn.Module) -> str | None:
    """The ops' name for what an activation module computes."""
    if any(True for _ in module.parameters()):
        return None
    x = torch.linspace(-8, 8, 257)
    with torch.no_grad():
        y = module(x)
        names = (name for name, f in ACTIVATIONS.items() if torch.allclose(y, f(x), rtol=1e-5, atol=1e-6))
        return next(names, None)


def _drops(module: nn.Module, name: str | None) -> bool:
    return name is not None and getattr(module, name).training and getattr(module, name).p > 0


def _random(like: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)
