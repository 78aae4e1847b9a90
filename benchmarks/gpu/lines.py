"""What is measured on a GPU and against what, in parts, the most important first.

Most lines are those of benchmarks.ops and benchmarks.models in sizes that fill a GPU, with the peers that a GPU has.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness
from benchmarks.gpu import models
from benchmarks.harness import Line
from benchmarks.models import bert
from benchmarks.ops import (
    attention,
    attention_decode,
    attention_varlen,
    embed,
    linear,
    linear_cross_entropy,
    norms,
    relative_bias,
    rotary,
    softmax,
)
from lmkernels import alibi_slopes
from lmkernels import attention as our_attention
from lmkernels.models import GPT2Config
from lmkernels.testing import cases, numerics

# In torch's own order of preference on Hopper: the first is the one to beat.
SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Setting:
    scale: int = 1  # sizes are divided by it: tests of this code need no speed
    compiled: bool = True  # with the peers that torch.compile makes, FlexAttention among them, which take a while

    def of(self, n: int, least: int = 16) -> int:
        return max(least, n // self.scale)


def call(function: Callable, leaves: list[Tensor], dout: Tensor, direction: str) -> Callable[[], object]:
    """One direction of function(*leaves) alone; the backward pass runs over the graph that its first call makes."""
    if direction == "forward":
        return torch.no_grad()(lambda: function(*leaves))
    leaves, outs = [x.detach().requires_grad_() for x in leaves], []

    def backward():
        if not outs:
            outs.append(function(*leaves))
        return torch.autograd.grad(outs[0], leaves, dout, retain_graph=True)

    return backward


def pinned(backend: SDPBackend, **options) -> Callable:
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return attend


def compiled(function: Callable, **options) -> Callable:
    """torch.compile as a peer: what it cannot compile as a whole is an error, never run as it stands."""
    return torch.compile(function, fullgraph=True, **options)


def flex(score_mod: Callable | None = None, mask_mod: Callable | None = None, **options) -> Callable:
    """FlexAttention on (b, h, s, d), compiled for static shapes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = compiled(flex_attention, dynamic=False)

    @functools.cache
    def block_mask(s_q: int, s_k: int):
        return mask_mod and create_block_mask(mask_mod, None, None, s_q, s_k, device=str(harness.device))

    return lambda q, k, v: attend(
        q, k, v, score_mod=score_mod, block_mask=block_mask(q.shape[2], k.shape[2]), **options
    )


# --- attention ---


def attention_part(setting: Setting) -> list[Line]:
    long, short = setting.of(8192), setting.of(1024, 32)
    shapes = [  # b, h, s, d, h_kv, and whether causal
        (2, 16, long, 128, None, False),
        (2, 16, long, 128, None, True),
        (2, 32, long, 64, None, False),
        (2, 32, long, 64, None, True),
        (16, 12, short, 64, None, True),  # GPT-2
        (32, 12, short // 2, 64, None, False),  # BERT-base
        (1, 64, long, 128, 8, True),  # Llama 3.1 70B
    ]
    chosen = [attention_case(setting, *shape) for shape in shapes]
    return [attention_line(case, "bfloat16", direction, setting) for case in chosen for direction in PASSES]


def precision_part(setting: Setting) -> list[Line]:
    """Attention in the other dtypes."""
    case = attention_case(setting, 2, 16, setting.of(4096), 64, None, True)
    return [attention_line(case, dtype, direction, setting) for dtype in ("float16", "float32") for direction in PASSES]


def attention_case(setting: Setting, b, h, s, d, h_kv, causal, **options) -> cases.AttentionCase:
    b = setting.of(b, 1)
    groups = f"-kv{h_kv}" if h_kv else ""
    name = f"b{b}-s{s}-h{h}{groups}-d{d}-{'causal' if causal else 'full'}"
    return cases.AttentionCase(name, b, h, s, s, d, h_kv=h_kv, causal=causal, **options)


def attention_line(case: cases.AttentionCase, dtype: str, direction: str, setting: Setting) -> Line:
    options = {"is_causal": case.causal, "enable_gqa": case.h_kv is not None}
    peers = {f"SDPA {name}": partial(pinned, backend, **options) for name, backend in SDPA.items()}
    if setting.compiled:
        mask = (lambda b, h, i, j: i >= j) if case.causal else None
        peers["FlexAttention"] = partial(flex, None, mask, enable_gqa=case.h_kv is not None)
    ours = partial(our_attention, causal=case.causal)
    return attending("attention", case, dtype, direction, ours, peers, partial(checked, case))


def attending(group, case, dtype: str, direction: str, ours: Callable, peers: dict, wrong: Callable) -> Line:
    """ours takes (b, s, h, d), what each of `peers` makes takes (b, h, s, d)."""
    torch_dtype = harness.DTYPES[dtype]

    def competitors():
        inputs = case.make(torch_dtype)
        tensors = inputs.q, inputs.k, inputs.v
        *theirs, dout = (x.transpose(1, 2).contiguous() for x in (*tensors, inputs.dout))
        made = {"ours": call(ours, tensors, inputs.dout, direction)}
        return made | {name: call(make(), theirs, dout, direction) for name, make in peers.items()}

    products = {"forward": 2, "backward": 5}[direction]  # scores once in each direction: what is computed again is ours
    return Line(
        group, case.name, dtype, direction, competitors, lambda: wrong(torch_dtype),
        flops=products * 2 * case.b * case.h * case.visible_pairs() * case.d,
    )  # fmt: skip


@functools.cache
def checked(case: cases.AttentionCase, dtype: torch.dtype) -> str | None:
    """The scores of a group of heads are held in float64: where they are many, those of a shorter sequence."""
    s = case.s_q if case.h_kv in (None, case.h) else min(case.s_q, 2048)
    return attention.wrong(replace(case, b=1, s_q=s, s_k=s), dtype)


def features_part(setting: Setting) -> list[Line]:
    """What SDPA has no fused kernel for, or none but mem-efficient; FlexAttention has all of it but gradients."""
    s, h = setting.of(4096), 16
    slopes = alibi_slopes(h).to(harness.device)
    window = setting.of(512)

    def soft_capped(score, b, head, i, j):
        return 30.0 * torch.tanh(score / 30.0)

    def with_slopes(score, b, head, i, j):
        return score - slopes[head] * (i - j)

    def causal(b, head, i, j):
        return i >= j

    def banded(b, head, i, j):
        return (i >= j) & (i - j <= window)

    def line(name, direction, options, score_mod=None, mask_mod=causal, **peers):
        case = attention_case(setting, 2, h, s, 128, None, True, **options)
        case = replace(case, name=f"{name}, {case.name}")
        given = {"window": case.window, "softcap": case.softcap, "alibi_slopes": slopes if case.alibi else None}
        if setting.compiled:
            peers["FlexAttention"] = partial(flex, score_mod, mask_mod)
        ours = partial(our_attention, causal=True, **given)
        return attending("features", case, "bfloat16", direction, ours, peers, partial(checked_features, case))

    def mem_efficient_with_bias():
        i = torch.arange(s, device=harness.device)
        distance = (i - i[:, None]).to(torch.bfloat16)
        bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, float("-inf")).to(torch.bfloat16)
        return pinned(SDPBackend.EFFICIENT_ATTENTION, attn_mask=bias[None])

    lines = []
    for direction in PASSES:
        lines += [
            line("ALiBi", direction, {"alibi": "h"}, with_slopes, **{"SDPA mem-efficient": mem_efficient_with_bias}),
            line(f"window {window}", direction, {"window": (window, -1)}, None, banded),
            line("softcap", direction, {"softcap": 30.0}, soft_capped),
        ]
    t5 = cases.AttentionCase(f"b8-s{s // 8}-h12-d64, T5's bias", 8, 12, s // 8, s // 8, 64, scale=1.0)
    return [*lines, *(relative_bias.line(t5, "bfloat16", direction) for direction in relative_bias.PASSES)]


@functools.cache
def checked_features(case: cases.AttentionCase, dtype: torch.dtype) -> str | None:
    """All results and gradients by the tests' rule, on a shorter sequence."""
    inputs = replace(case, b=1, s_q=min(case.s_q, 1024), s_k=min(case.s_q, 1024)).make(dtype)
    actual, golden = numerics.attention_results(our_attention, inputs), numerics.golden_attention(inputs)
    plain = numerics.plain_attention_results(inputs)
    try:
        for name, expected in golden.items():
            numerics.assert_as_accurate(actual[name], expected, plain[name], name, dtype=dtype, samples=inputs.rows)
    except AssertionError as error:
        return str(error)
    return None


def packed_part(setting: Setting) -> list[Line]:
    """Sequences of different lengths end to end."""
    bert_lengths = tuple(range(setting.of(32, 4), setting.of(512) + 1, setting.of(32, 4)))
    gpt_lengths = tuple(setting.of(n) for n in (500, 2048, 1250, 1500, 4000, 900))
    return [
        attention_varlen.line(group, case, "bfloat16", direction)
        for group, case in (
            ("gpt", packed_case("b6-s500..4000-h12-d64-causal", gpt_lengths, causal=True)),
            ("bert", packed_case("b16-s32..512-h12-d64-full", bert_lengths, causal=False)),
        )
        for direction in ("forward", "forward+backward")
    ]


def packed_case(name: str, lengths: tuple[int, ...], causal: bool) -> cases.AttentionVarlenCase:
    padded = cases.AttentionCase(name, len(lengths), 12, max(lengths), max(lengths), 64, causal=causal)
    return cases.AttentionVarlenCase(padded, lengths, lengths)


def decode_part(setting: Setting) -> list[Line]:
    """Bandwidth: Triton's kernel, and the one in CUDA C++ where the library was built."""
    long, b = setting.of(8192, 64), setting.of(32, 2)
    shapes = [
        cases.DecodeCase(f"b{b}-s{long}-h32-kv8-d128", (long - 1,) * b, 32, 128, h_kv=8),
        cases.DecodeCase(f"b{b}-s{long}-h32-kv8-d128-pages", (long - 1,) * b, 32, 128, h_kv=8, page=64),
        cases.DecodeCase(f"b1-s{4 * long}-h32-kv8-d128", (4 * long - 1,), 32, 128, h_kv=8),
        cases.DecodeCase(f"b1-s{long // 8}-h12-d64", (long // 8 - 1,), 12, 64),  # GPT-2
    ]
    chosen = [replace(case, room=0) for case in shapes]
    backends = (None, "native") if harness.device.type == "cuda" else (None,)
    lines = [
        attention_decode.line("decode", case, "bfloat16", False, backend) for case in chosen for backend in backends
    ]
    return lines + [attention_decode.line("decode", chosen[0], "bfloat16", True, backend) for backend in backends]


# --- losses, norms, layers ---


def loss_part(setting: Setting) -> list[Line]:
    shapes = [(8192, 50257, 768), (8192, 128256, 4096)]  # GPT-2, Llama 3
    lines = []
    for t, vocab, d in ([setting.of(n, 64) for n in shape] for shape in shapes):
        case = cases.LossCase(f"t{t}-v{vocab}-d{d}", t, vocab, d, counted=1.0)
        for direction in linear_cross_entropy.PASSES:
            functions = linear_cross_entropy.FUNCTIONS | with_compiled(setting, linear_cross_entropy.eager)
            calls = partial(linear_cross_entropy.calls, case, torch.bfloat16, direction, functions)
            lines.append(replace(linear_cross_entropy.line(case, "bfloat16", direction), competitors=calls))
    return lines


def with_compiled(setting: Setting, function: Callable) -> dict[str, Callable]:
    return {"torch.compile": compiled(function)} if setting.compiled else {}


def norms_part(setting: Setting) -> list[Line]:
    lines = []
    for norm, rows, d, residual in (
        ("rms_norm", 16384, 4096, None),
        ("layer_norm", 32768, 768, "same"),
        ("rms_norm", 16384, 4096, "same"),
        ("layer_norm", 16384, 4096, None),
    ):
        shape = (setting.of(rows), setting.of(d))
        case = cases.NormCase("x".join(map(str, shape)), shape, residual=residual, bias=norm == "layer_norm")
        for direction in ("forward", "forward+backward"):
            peers = with_compiled(setting, partial(norms.plain, norm))
            competitors = partial(norms.competitors, norm, case, torch.bfloat16, direction, peers)
            line = norms.line(norm, "memory", case, "bfloat16", direction)
            lines.append(replace(line, competitors=competitors))
    return lines


def layers_part(setting: Setting) -> list[Line]:
    rows = setting.of(16384)
    shapes = {"qkv": (768, 2304), "mlp in": (768, 3072), "mlp out": (3072, 768), "Llama": (4096, 14336)}
    lines = []
    for name, widths in shapes.items():
        d_in, d_out = (setting.of(n) for n in widths)
        case = cases.LinearCase(f"{name} {rows}x{d_in}x{d_out}", (rows,), d_in, d_out)
        lines += [linear.line(case.name, linear.make_linear(case), "bfloat16", p) for p in linear.PASSES]
    d, d_ff = setting.of(768), setting.of(3072)
    mlp = partial(linear.make_mlp, rows=rows, d=d, d_ff=d_ff)
    return lines + [linear.line(f"mlp with residual {rows}x{d}x{d_ff}x{d}", mlp, "bfloat16", p) for p in linear.PASSES]


def positions_part(setting: Setting) -> list[Line]:
    """Rotary positions, embeddings, softmax: all of them bound by memory."""
    b, s, d = setting.of(16, 1), setting.of(2048), setting.of(4096)
    both = "forward", "forward+backward"
    rotated = cases.RotaryCase(f"b{b}-s{s}-h32-d128", b, s, 32, 128)
    tokens = cases.EmbedCase(f"b{b}-s{s}-d{d}", b, s, d, vocab=setting.of(50257), positions="")
    rows = (setting.of(16384), setting.of(4096))
    soft = cases.SoftmaxCase("x".join(map(str, rows)), rows)
    return [
        *(rotary.line("rotary", replace(rotated, name=f"rotary {rotated}"), "bfloat16", p) for p in both),
        *(softmax.line("softmax", replace(soft, name=f"softmax {soft}"), "bfloat16", p) for p in both),
        *(embed.line("embed", replace(tokens, name=f"embed {tokens}"), "bfloat16", p) for p in embed.PASSES[:2]),
    ]


# --- models ---


def gpt_config(setting: Setting) -> GPT2Config:
    if setting.scale == 1:
        return GPT2Config.from_name("gpt2")
    return GPT2Config(512, 256, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


def training_part(setting: Setting) -> list[Line]:
    peers = ["plain torch"]
    if importlib.util.find_spec("transformers"):
        peers.insert(0, "Hugging Face")
    return [models.training(gpt_config(setting), setting.of(16, 2), setting.of(1024, 32), tuple(peers))]


def compiled_part(setting: Setting) -> list[Line]:
    """A whole model through torch.compile, which alone takes a minute."""
    if not setting.compiled:
        return []
    return [models.training(gpt_config(setting), setting.of(16, 2), setting.of(1024, 32), ("torch.compile",))]


def generation_part(setting: Setting) -> list[Line]:
    prompt, n = setting.of(128, 8), setting.of(32, 4)
    return [models.decoding(gpt_config(setting), b, prompt, n) for b in (1, setting.of(32, 2))]


def bert_part(setting: Setting) -> list[Line]:
    if importlib.util.find_spec("transformers") is None:
        return []
    sizes = {
        "b": setting.of(32, 2),
        "s": setting.of(512, 32),
        "layers": setting.of(12, 2),
        "width": setting.of(768, 64),
    }
    shapes = [bert.Shape(ragged=ragged, **sizes) for ragged in (True, False)]
    return [bert.line(direction, shape, "bfloat16") for direction in ("training", "inference") for shape in shapes]


# In the order in which they are measured.
PARTS: dict[str, Callable[[Setting], list[Line]]] = {
    "attention": attention_part,
    "decode": decode_part,
    "training": training_part,
    "loss": loss_part,
    "norms": norms_part,
    "generation": generation_part,
    "bert": bert_part,
    "packed": packed_part,
    "features": features_part,
    "layers": layers_part,
    "positions": positions_part,
    "precision": precision_part,
    "compiled": compiled_part,
}
