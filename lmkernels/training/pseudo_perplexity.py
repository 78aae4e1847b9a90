"""How well a BERT predicts hidden tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..models import BertForMaskedLM
from ..models.bert import IGNORED
from . import checkpoint
from .finetune import find_model
from .masked import Score, Vocabulary
from .pretrain import prepare
from .settings import FinetuneSettings
from .tasks.features import text_of
from .tokens import batched


def pseudo_perplexity(
    model: str | Path,
    data: str | Path,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    mask_share: float = 0.15,
    dtype: torch.dtype | str | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict:
    """How well a BertForMaskedLM predicts each token of a text: masked_accuracy, and pseudo_perplexity, e^loss.

    The text is read in windows side by side. Every token is hidden once and replaced by [MASK]; unknown ones never are.
    model: a folder (a checkpoint, or what a run has left), or a name on the Hugging Face hub
    data: a text file, which may be a .gz
    max_length: tokens of a window, [CLS] and [SEP] among them. None is the model's max_position_embeddings
    mask_share: part of a window's tokens that is hidden at a time, so that a window takes 1 / mask_share passes. 0 is
        one token at a time, the pseudo-perplexity of Salazar et al. 2020, arXiv:1910.14659: as many passes as tokens.
    """
    settings = FinetuneSettings(batch_size=batch_size, device=device, threads=torch.get_num_threads())
    settings.check()
    if not 0 <= mask_share < 1:
        raise ValueError(f"mask_share must lie in [0, 1), got {mask_share}")
    folder = find_model(model)
    text = text_of(data)
    tokenizer = checkpoint.load_tokenizer(folder)
    vocabulary = Vocabulary.of(tokenizer)
    network = BertForMaskedLM.from_pretrained(folder, dtype=dtype).to(prepare(settings)).eval()
    context = network.config.max_position_embeddings
    max_length = context if max_length is None else max_length
    if not 3 <= max_length <= context:
        raise ValueError(f"max_length must lie in [3, {context}] (max_position_embeddings), got {max_length}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)
    count = int((~torch.isin(ids, vocabulary.special)).sum())
    if count == 0:
        raise ValueError(f"data must hold a token that the model knows, got none in {str(data)!r}")

    score = Score()
    with tqdm(total=count, unit="token", unit_scale=True, dynamic_ncols=True, disable=not progress) as bar:
        rows = (row for window in ids.split(max_length - 2) for row in hidden_in_turn(window, vocabulary, mask_share))
        for some in batched(rows, batch_size):
            width = max(len(given) for given, _ in some)
            given, labels, real = (
                torch.stack([F.pad(x, (0, width - len(x)), value=fill) for x in column])
                for column, fill in (
                    ([given for given, _ in some], 0),
                    ([labels for _, labels in some], IGNORED),
                    ([torch.ones_like(given) for given, _ in some], 0),
                )
            )
            score.add(network, given, labels, real)
            bar.update(score.count - bar.n)
    return {
        "task": "masked-lm",
        "tokens": score.count,
        "eval_loss": score.loss,
        "pseudo_perplexity": math.exp(score.loss) if score.loss < 700 else math.inf,
        "masked_accuracy": score.accuracy,
    }


def hidden_in_turn(window: Tensor, vocabulary: Vocabulary, share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """What a model is given and what it is to say, (s + 2,) each, until all tokens of window (s,) were hidden."""
    places = (~torch.isin(window, vocabulary.special)).nonzero().squeeze(1)
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]
    passes = min(len(places), math.ceil(1 / share)) if share else len(places)
    for i in range(passes):
        some = places[i::passes]
        given = window.index_fill(0, some, vocabulary.mask)
        labels = torch.full_like(window, IGNORED).index_copy(0, some, window[some])
        yield vocabulary.sequences(given[None])[0], F.pad(labels, (1, 1), value=IGNORED)
