"""The weights of a GPT-2 as `decode_step` takes them."""

from torch import nn

from ..ops.decode_step import StepLayer, StepModel
from .dropout import Dropout
from .quantized import Quantized


def step_model(self) -> StepModel | None:
    """All that a step of decoding reads: the matrices where they lie, norms and biases as they are at the first step.

    None where a module has been replaced, or a forward overridden, by one that is not ours.
    """
    ours = f"{__package__}.gpt2"
    if type(self).forward.__module__ != ours or not all(is_plain(module, ours) for module in self.children()):
        return None
    body = self.transformer
    rotary, positions = getattr(body, "rotary", None), getattr(body, "wpe", None)
    return StepModel(
        tokens=body.wte.weight,
        layers=tuple(map(step_layer, body.h)),
        norm=body.ln_f.weight,
        norm_bias=getattr(body.ln_f, "bias", None),
        head=self.lm_head.weight,
        heads=self.config.n_head,
        scale=body.h[0].attn.scale,
        positions=None if positions is None else positions.weight,
        cos=None if rotary is None else rotary.cos,
        sin=None if rotary is None else rotary.sin,
        eps=self.config.layer_norm_epsilon,
        rms=isinstance(body.ln_f, nn.RMSNorm),
        activation="silu" if hasattr(body.h[0].mlp, "c_gate") else body.h[0].mlp.activation,
        scale_by_layer=self.config.scale_attn_by_inverse_layer_idx,
    )


def is_plain(module: nn.Module, ours: str) -> bool:
    kind = type(module).__module__
    known = kind == ours or kind.startswith(("torch.nn.modules.", "lmkernels.nn.")) or type(module) is Dropout
    return (known or isinstance(module, Quantized)) and all(is_plain(child, ours) for child in module.children())


def step_layer(block: nn.Module) -> StepLayer:
    attention, mlp = block.attn, block.mlp
    qkv, qkv_bias = attention.c_attn.parameters_of_linear()
    project, project_bias = attention.c_proj.parameters_of_linear()
    down, down_bias = mlp.c_proj.parameters_of_linear()
    gated = hasattr(mlp, "c_gate")
    up, up_bias = (mlp.c_up if gated else mlp.c_fc).parameters_of_linear()
    gate, gate_bias = mlp.c_gate.parameters_of_linear() if gated else (None, None)
    return StepLayer(
        norm1=block.ln_1.weight,
        norm1_bias=getattr(block.ln_1, "bias", None),
        qkv=qkv,
        qkv_bias=qkv_bias,
        project=project,
        project_bias=project_bias,
        norm2=block.ln_2.weight,
        norm2_bias=getattr(block.ln_2, "bias", None),
        up=up,
        up_bias=up_bias,
        gate=gate,
        gate_bias=gate_bias,
        down=down,
        down_bias=down_bias,
    )
