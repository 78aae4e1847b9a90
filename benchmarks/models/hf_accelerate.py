"""A training step of transformers' own models, as they are and after `lmkernels.hf.accelerate`.

The models have the sizes and the dropout of their defaults, random weights, and torch's fused AdamW on both sides;
transformers runs eagerly, with the attention that it chooses itself. bfloat16 is autocast over float32 parameters.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from tqdm import tqdm

from benchmarks import harness


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(use_cache=False))


def bert() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())


def language_modelling(model: torch.nn.Module, b: int, s: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(model.config.vocab_size, (b, s))
    return {"input_ids": ids, "labels": ids}


def classification(model: torch.nn.Module, b: int, s: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(model.config.vocab_size, (b, s))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(2, (b,))}


# name: the model, its batch, b, s
CASES = {
    "GPT-2 124M": (gpt2, language_modelling, 4, 256),
    "BERT-base, 2 classes": (bert, classification, 8, 128),
}


def run(options: harness.Options) -> list[dict]:
    rows = []
    lines = [(case, dtype) for case in CASES for dtype in options.dtypes if options.cases in case]
    for case, dtype in tqdm(lines, unit="line", file=sys.stderr):
        make, batch, b, s = CASES[case]
        torch.manual_seed(0)
        plain = make().train()
        ours = accelerated(plain)
        row = {"name": f"{case} training step, {dtype}, b {b} s {s}"}
        if error := disagreement(plain, ours, batch(plain, 2, 16), dtype):
            rows.append(row | {"error": error})
            continue
        inputs = batch(plain, b, s)
        steps = {"ours": stepper(ours, inputs, dtype), "transformers": stepper(plain, inputs, dtype)}
        timings = interleaved(steps, options.seconds)
        mine, theirs = timings["ours"], timings["transformers"].median
        row |= {"unit": "tokens/s", "ours": round(b * s / mine.median, 1), "transformers": round(b * s / theirs, 1)}
        row |= {"p10": round(b * s / mine.p90, 1), "p90": round(b * s / mine.p10, 1)}
        rows.append(row | {"ratio": round(theirs / mine.median, 2)})
    return rows


def interleaved(steps: dict[str, Callable], seconds: float) -> dict[str, harness.Timing]:
    """As the harness does it, with one call to warm up: a step takes seconds."""
    for step in steps.values():
        step()
    samples = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples["ours"]) < 3:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - start)
    return {name: harness.Timing.of(taken) for name, taken in samples.items()}


def accelerated(model: torch.nn.Module) -> torch.nn.Module:
    from lmkernels.hf import accelerate

    ours = copy.deepcopy(model)
    accelerate(ours, verbose=False)
    return ours


def stepper(model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: str) -> Callable[[], torch.Tensor]:
    """Forward, backward and AdamW; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def disagreement(plain: torch.nn.Module, ours: torch.nn.Module, inputs: dict, dtype: str) -> str | None:
    """Why loss or gradients are not those of the plain model, or None; in evaluation mode, without dropout."""
    results = []
    for model in (plain, ours):
        model.eval()
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            loss = model(**inputs).loss
        loss.backward()
        results.append([loss.detach().view(1), torch.cat([p.grad.flatten() for p in model.parameters()])])
        model.zero_grad()
        model.train()
    limit = 1e-4 if dtype == "float32" else 3e-2
    for name, theirs, mine in zip(("loss", "gradient"), *results, strict=True):
        error = ((mine - theirs).norm() / theirs.norm()).item()
        if not error < limit:
            return f"the {name} differs from transformers' by {error:.1e}, more than {limit}"
    return None
