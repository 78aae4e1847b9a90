"""How well a GPT predicts a text."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..models import GPT2LMHeadModel
from ..ops.linear import linear
from . import checkpoint
from .finetune import find_model
from .pretrain import prepare
from .settings import FinetuneSettings
from .tasks.features import text_of
from .tokens import batched

# tokens whose logits are held at a time
ROWS = 512


def perplexity(
    model: str | Path,
    data: str | Path,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    stride: int | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict:
    """e^loss of a text under a GPT, per token, and bits per byte, which compares models of different vocabularies.

    model: a folder (a checkpoint, or what a run has left), or a name on the Hugging Face hub
    data: a text file, which may be a .gz
    max_length: tokens of a window; None is the model's context
    stride: every window moves on by so many tokens, whose losses count; those before them in the window are context
        only. None is max_length: windows side by side.
    """
    settings = FinetuneSettings(batch_size=batch_size, device=device, threads=torch.get_num_threads())
    settings.check()
    folder = find_model(model)
    text = text_of(data)
    tokenizer = checkpoint.load_tokenizer(folder)
    options = {} if quantize is None else {"quantize": quantize}
    network = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype, **options).to(prepare(settings))
    context = network.config.n_positions
    max_length = context if max_length is None else max_length
    stride = max_length if stride is None else stride
    if not 2 <= max_length <= context:
        raise ValueError(f"max_length must lie in [2, {context}] (n_positions), got {max_length}")
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride must lie in [1, max_length = {max_length}], got {stride}")
    ids = torch.tensor(tokenizer.encode(text).ids)
    if len(ids) < 2:
        raise ValueError(f"data must hold two tokens or more, got {len(ids)} in {str(data)!r}")

    total, count = 0.0, 0
    with tqdm(total=len(ids) - 1, unit="token", unit_scale=True, dynamic_ncols=True, disable=not progress) as bar:
        for some in batched(windows(len(ids), max_length, stride), batch_size):
            width = max(end - start for start, _, end in some)
            inputs, labels = torch.zeros(len(some), width, dtype=torch.long), torch.full((len(some), width), -100)
            for row, (start, counted, end) in enumerate(some):
                inputs[row, : end - start] = ids[start:end]
                labels[row, counted - start : end - start] = ids[counted:end]
            loss, counts = summed_loss(network, inputs.to(network.device), labels.to(network.device))
            total, count = total + loss, count + counts
            bar.update(counts)
    loss = total / count
    return {
        "task": "perplexity",
        "tokens": count,
        "eval_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / len(text.encode()),
    }


@torch.no_grad()
def summed_loss(model: GPT2LMHeadModel, ids: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """The sum of the cross entropies of labels (b, s) one place to the right, and their number; -100 is ignored."""
    hidden = model.transformer(ids, None, None, None, None)[:, :-1]  # (b, s - 1, d_model)
    counted = labels[:, 1:] != -100
    hidden, targets = hidden[counted], labels[:, 1:][counted]  # (n, d_model), (n,)
    total = 0.0
    for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS)):
        logits = linear(rows, model.lm_head.weight).float()
        total += F.cross_entropy(logits, wanted, reduction="sum").item()
    return total, targets.numel()


def windows(n: int, max_length: int, stride: int):
    """(start, first counted, end) of windows over n tokens: every token but the first counts once."""
    counted = 1
    while counted < n:
        # the last token of a window predicts nothing in it, so windows side by side share one token
        start = max(0, min(counted - 1, counted + stride - max_length))
        end = min(n, start + max_length)
        yield start, counted, end
        counted = end
