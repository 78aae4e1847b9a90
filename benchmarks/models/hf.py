"""Hugging Face's BERT-base, GPT-2 124M and T5-small, as they are, with their attention eager, on SDPA and on lmkernels.

Random weights; the batch is padded to the longest of its rows. Inference is in the dtype named; training has float32
parameters, and bfloat16 is autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch

import lmkernels.hf
from benchmarks import harness

B = 4
# name: (class of transformers, tokens of the longest row, direction)
CASES = {
    "BERT-base": ("BertModel", 128, "inference"),
    "BERT-base, long": ("BertModel", 512, "inference"),
    "BERT-base ": ("BertForMaskedLM", 128, "training"),
    "GPT-2 124M": ("GPT2Model", 512, "inference"),
    "GPT-2 124M ": ("GPT2LMHeadModel", 256, "training"),
    "T5-small": ("T5EncoderModel", 512, "inference"),
    "T5-small ": ("T5ForConditionalGeneration", 128, "training"),
}
DTYPES = ("float32", "bfloat16")
IMPLEMENTATIONS = {"ours": "lmkernels", "sdpa": "sdpa", "eager": "eager"}


def lines() -> list[harness.Line]:
    return [line(name, dtype) for name in CASES for dtype in DTYPES]


@cache
def model(class_name: str) -> torch.nn.Module:
    import transformers

    lmkernels.hf.register()
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    return model_class(model_class.config_class()).eval()


def batch(name: str) -> dict[str, torch.Tensor]:
    """Rows of lengths from half of the longest on."""
    _, s, direction = CASES[name]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 20_000, (B, s), generator=generator)
    mask = (torch.arange(s) < torch.linspace(s // 2, s, B).long()[:, None]).long()
    found = {"input_ids": ids, "attention_mask": mask}
    if direction == "training":
        found["labels"] = ids.masked_fill(mask == 0, -100)
    return found


def runner(name: str, dtype: str, implementation: str) -> Callable[[], list[torch.Tensor]]:
    """The last hidden state of real tokens or, in training, the loss and the gradients; without dropout, whose numbers
    differ."""
    class_name, _, direction = CASES[name]
    inputs, training = batch(name), direction == "training"
    tokens = inputs["attention_mask"].bool()

    def run():
        # one model serves every implementation and dtype: switching costs microseconds
        ours = model(class_name).to(torch.float32 if training else harness.DTYPES[dtype])
        ours.set_attn_implementation(implementation)
        if not training:
            with torch.no_grad():
                return [ours(**inputs)[0][tokens]]
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            loss = ours(**inputs).loss
        parameters = [p for p in ours.parameters() if p.requires_grad]
        return [loss, *torch.autograd.grad(loss, parameters, allow_unused=True)]

    return run


def wrong(name: str, dtype: str) -> str | None:
    """Why ours is wrong, or None."""
    actual, expected = (
        torch.cat([x.flatten().double() for x in runner(name, dtype, implementation)() if x is not None])
        for implementation in ("lmkernels", "eager")
    )
    error = ((actual - expected).norm() / expected.norm()).item()
    limit = 1e-4 if dtype == "float32" else 5e-2
    return None if error < limit else f"differs from eager by {error:.1e}, more than {limit}"


def line(name: str, dtype: str) -> harness.Line:
    _, s, direction = CASES[name]
    return harness.Line(
        group="hf",
        case=f"{name.strip()}, b {B} s {s}, padded",
        dtype=dtype,
        direction=direction,
        competitors=lambda: {key: runner(name, dtype, value) for key, value in IMPLEMENTATIONS.items()},
        wrong=lambda: wrong(name, dtype),
    )
