"""Ops captured in a CUDA graph: what its replay computes from new values is what a call computes. Needs a GPU.

A graph cannot be captured where a value is read back from the GPU, where memory is fetched from the CPU, or where a
launch depends on more than shapes; and its replay is wrong where a kernel kept a number that has changed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lmkernels as lmk
from lmkernels import _library
from lmkernels.models import GPT2Config, GPT2LMHeadModel

B, S, H, H_KV, D, WIDTH = 2, 70, 4, 2, 64, 256


@pytest.fixture(autouse=True)
def gpu(device):
    if torch.device(device).type != "cuda":
        pytest.skip("CUDA graphs need a GPU: --device cuda")
    # a graph's memory is its own; what fills fresh memory is a kernel of the capture
    torch.set_deterministic_debug_mode("default")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def attention_arguments() -> dict:
    return {"q": normal(B, S, H, D), "k": normal(B, S, H_KV, D), "v": normal(B, S, H_KV, D)}


def everything(q, k, v, bias, slopes, sink, seed):
    return lmk.attention(
        q, k, v, causal=True, bias=bias, alibi_slopes=slopes, sink=sink, dropout_p=0.1, seed=seed, window=(40, -1)
    )  # fmt: skip


def packed(q, k, v, starts):
    tokens = (x.flatten(0, 1) for x in (q, k, v))
    return lmk.attention_varlen(*tokens, starts, starts, 2 * S, 2 * S, causal=True)


def layer(x, w_qkv, w_out, w_in, w_back, weight, bias, cos, sin):
    """What a block of a model is made of."""
    normed = lmk.layer_norm(x, weight, bias, 1e-5)
    q, k, v = lmk.qkv_projection(normed, w_qkv, num_heads=H, num_kv_heads=H_KV, cos=cos, sin=sin)
    x = lmk.output_projection(lmk.attention(q, k, v, causal=True), w_out, residual=x)
    normed, x = lmk.rms_norm(x, weight, 1e-5, residual=x)
    return lmk.mlp(normed, w_in, None, w_back, None, residual=x)


def embedded(ids, table, positions):
    return lmk.softmax(lmk.embed(ids, table, position_table=positions))


def loss(hidden, table, labels):
    return lmk.linear_cross_entropy(hidden, table, labels, z_loss=1e-4)


def swiglu(x, w_in, w_up, w_back):
    return lmk.swiglu_mlp(x, w_in, w_up, w_back)


def layer_arguments() -> dict:
    cos, sin = lmk.rotary_tables(S, D)
    return {
        "x": normal(B, S, WIDTH),
        "w_qkv": normal((H + 2 * H_KV) * D, WIDTH) / 16,
        "w_out": normal(WIDTH, H * D) / 16,
        "w_in": normal(4 * WIDTH, WIDTH) / 16,
        "w_back": normal(WIDTH, 4 * WIDTH) / 32,
        "weight": normal(WIDTH),
        "bias": normal(WIDTH),
        "cos": cos,
        "sin": sin,
    }


def starts() -> Tensor:
    return torch.tensor([0, int(torch.randint(1, 60, ())) + 10, B * S], dtype=torch.int32)


def swiglu_arguments() -> dict:
    weights = {"w_in": normal(512, WIDTH) / 16, "w_up": normal(512, WIDTH) / 16, "w_back": normal(WIDTH, 512) / 16}
    return {"x": normal(B, S, WIDTH), **weights}


CALLS: dict[str, tuple[Callable, Callable[[], dict]]] = {
    "attention": (lambda q, k, v: lmk.attention(q, k, v, causal=True), attention_arguments),
    "attention with everything": (
        everything,
        lambda: (
            attention_arguments()
            | {"bias": normal(1, H, S, S), "slopes": torch.rand(H), "sink": normal(H), "seed": torch.randint(2**40, ())}
        ),
    ),
    "attention_varlen": (packed, lambda: attention_arguments() | {"starts": starts()}),
    "layer": (layer, layer_arguments),
    "embed, softmax": (
        embedded,
        lambda: {"ids": torch.randint(100, (B, S)), "table": normal(100, WIDTH), "positions": normal(S, WIDTH)},
    ),
    "linear_cross_entropy": (
        loss,
        lambda: {"hidden": normal(B * S, WIDTH), "table": normal(1000, WIDTH), "labels": torch.randint(1000, (B * S,))},
    ),
    "swiglu_mlp": (swiglu, swiglu_arguments),
    "rotary": (
        lambda x, cos, sin, positions: lmk.rotary(x, cos, sin, positions=positions),
        lambda: (
            dict(zip(("cos", "sin"), lmk.rotary_tables(S, D)))
            | {"x": normal(B, S, H, D), "positions": torch.randint(S, (B, S))}
        ),
    ),
}


def captured(function: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of one call, and its results, which every replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def results_and_gradients(function: Callable, arguments: dict[str, Tensor]) -> list[Tensor]:
    """Tables of angles have no gradient."""
    leaves = {
        name: x.detach().requires_grad_(name not in ("cos", "sin"))
        for name, x in arguments.items()
        if x.is_floating_point()
    }
    out = function(**arguments | leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), wanted)]


@pytest.mark.parametrize("name", CALLS)
def test_a_replay_computes_what_a_call_computes(name):
    function, make = CALLS[name]
    static = make()
    graph, results = captured(lambda: results_and_gradients(function, static))
    for _ in range(2):
        fresh = make()
        for key, x in static.items():
            x.copy_(fresh[key])
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        for actual, expected in zip(results, results_and_gradients(function, fresh), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2 * float(expected.float().abs().max()))


@pytest.mark.parametrize("kernels", ["triton", "native"])
@pytest.mark.parametrize("pages", [False, True])
def test_a_replay_appends_where_the_lengths_say(kernels, pages):
    if kernels == "native" and _library.cuda_error is not None:
        pytest.skip(_library.cuda_error)
    capacity, page = 128, 16
    blocks = capacity // page
    shape = (B * blocks, page, H_KV, D) if pages else (B, capacity, H_KV, D)
    table = torch.randperm(B * blocks).view(B, blocks).int() if pages else None
    caches = [normal(*shape) for _ in "kv"]
    static = {"q": normal(B, 1, H, D), "k_new": normal(B, 1, H_KV, D), "v_new": normal(B, 1, H_KV, D)}
    lengths = torch.tensor([3, 70], dtype=torch.int32)

    def step(k_cache, v_cache, kv_lengths, q, k_new, v_new):
        return lmk.attention_decode(
            q, k_cache, v_cache, kv_lengths, k_new=k_new, v_new=v_new, block_table=table, backend=kernels
        )

    graph, out = captured(lambda: step(*caches, lengths, **static))
    expected_caches = [cache.clone() for cache in caches]
    for _ in range(3):
        fresh = {key: torch.randn_like(x) for key, x in static.items()}
        for key, x in static.items():
            x.copy_(fresh[key])
        graph.replay()
        expected = step(*expected_caches, lengths, **fresh)
        assert torch.equal(out, expected)
        assert all(torch.equal(cache, other) for cache, other in zip(caches, expected_caches))
        lengths += 1


def test_a_model_and_its_loss_are_captured():
    model = GPT2LMHeadModel(GPT2Config(1000, 128, n_embd=WIDTH, n_layer=2, n_head=4)).to(torch.bfloat16).eval()
    ids = torch.randint(1000, (B, S))

    def call(ids):
        return model(ids, labels=ids, use_cache=False).loss

    with torch.no_grad():
        graph, out = captured(lambda: call(ids))
        fresh = torch.randint(1000, (B, S))
        ids.copy_(fresh)
        graph.replay()
        torch.testing.assert_close(out, call(fresh))
