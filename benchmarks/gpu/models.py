"""GPT-2 on a GPU: a step of training and greedy decoding, against Hugging Face's and against plain torch."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import generate_peers, harness
from benchmarks.models import gpt
from benchmarks.models.bert import Step
from lmkernels.models import GPT2Config, GPT2LMHeadModel

DTYPE = "bfloat16"  # autocast in training


class Output(NamedTuple):
    loss: torch.Tensor


class PlainWithLoss(gpt.PlainGPT):
    """Plain torch with the call of the other models."""

    def forward(self, input_ids, labels):
        logits, _ = super().forward(input_ids[:, :-1])
        return Output(F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten()))


def hugging_face(model: GPT2LMHeadModel) -> nn.Module:
    """transformers' model with the weights of ours."""
    import transformers

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_dict()))
    theirs.load_state_dict(model.state_dict(), strict=False)
    return theirs


PEERS: dict[str, Callable[[GPT2LMHeadModel], nn.Module]] = {
    "Hugging Face": hugging_face,
    "plain torch": PlainWithLoss,
    "torch.compile": lambda model: torch.compile(PlainWithLoss(model), fullgraph=True),
}


def training(config: GPT2Config, b: int, s: int, peers: tuple[str, ...]) -> harness.Line:
    """Forward, backward and AdamW, without dropout, so that the losses of all agree."""

    @functools.cache
    def steps() -> dict[str, Step]:
        torch.manual_seed(0)
        ours = gpt.without_dropout(config)
        ids = torch.randint(config.vocab_size, (b, s))
        models = {"ours": ours, **{name: PEERS[name](ours) for name in peers}}
        return {name: Step(model, {"input_ids": ids, "labels": ids}, DTYPE) for name, model in models.items()}

    def wrong() -> str | None:
        losses = {name: [step() for _ in range(3)] for name, step in steps().items()}
        for name in peers:
            if error := gpt.disagreement(losses["ours"], losses[name], DTYPE):
                return error.replace("plain torch", name)
        return None

    return harness.Line(
        "training",
        f"GPT-2, {config.n_layer} layers, width {config.n_embd}, b{b}-s{s}",
        DTYPE,
        "",
        competitors=steps,
        wrong=wrong,
        flops=3 * forward_flops(config, b * s, s / 2),
        tokens=b * s,
    )


def forward_flops(config: GPT2Config, tokens: int, context: float) -> float:
    """Of the products: the layers, the head, and attention to `context` tokens on average."""
    d = config.n_embd
    return tokens * 2 * (config.n_layer * (12 * d * d + 2 * d * context) + config.vocab_size * d)


def decoding(config: GPT2Config, b: int, prompt: int, n: int) -> harness.Line:
    """A prompt and n greedy tokens; the bytes are those of the weights, once for each of them."""

    @functools.cache
    def made():
        torch.manual_seed(0)
        competitors, _, _, error = gpt.decoding(config=config, b=b, prompt=prompt, n=n, dtype=DTYPE)
        if importlib.util.find_spec("transformers"):
            theirs = generate_peers.hugging_face(gpt.without_dropout(config), DTYPE)
            ids = torch.randint(config.vocab_size, (b, prompt)).tolist()
            competitors = {"ours": competitors.pop("ours"), "Hugging Face": lambda: theirs(ids, n), **competitors}
        return competitors, error

    weights = config.n_layer * 12 * config.n_embd**2 + config.vocab_size * config.n_embd
    return harness.Line(
        "decoding",
        f"GPT-2, {config.n_layer} layers, width {config.n_embd}, b{b}, prompt {prompt}, {n} tokens",
        DTYPE,
        "",
        competitors=lambda: made()[0],
        wrong=lambda: made()[1],
        bytes_read=n * weights * harness.DTYPES[DTYPE].itemsize,
        tokens=b * n,
    )
