"""Causal language modelling: a GPT learns to predict each token from those before it."""

import numpy as np
import torch
from tokenizers import Tokenizer

from ..models import GPT2Config, GPT2LMHeadModel
from ..ops.linear_cross_entropy import linear_cross_entropy
from . import tokens as token_files
from .corpus import Corpus
from .settings import Settings
from .tokens import END_OF_TEXT, Windows, held_back_batches, split

MODEL = GPT2LMHeadModel
END = END_OF_TEXT


def train_tokenizer(corpus: Corpus, settings: Settings) -> Tokenizer:
    return token_files.train_tokenizer(corpus, settings.vocab_size)


def configuration(settings: Settings, tokenizer: Tokenizer | None) -> GPT2Config:
    """The model that the settings describe. Raises for one that cannot be built."""
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout)
    same = ("n_embd", "n_layer", "n_head", "norm", "position", "mlp", "num_kv_heads", "bias")
    end = None if tokenizer is None else tokenizer.token_to_id(END)
    return GPT2Config(
        vocab_size=settings.vocab_size if tokenizer is None else tokenizer.get_vocab_size(),
        n_positions=settings.block_size,
        bos_token_id=end,
        eos_token_id=end,
        **dropouts,
        **{name: getattr(settings, name) for name in same},
    )


class Text:
    """tokens (n,) as windows to learn from; the last eval_fraction of them is held back."""

    unit = "tokens"

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, settings: Settings):
        self.settings, self.units_per_sample = settings, settings.block_size
        train, self.held_back = split(tokens, settings.block_size + 1, settings)
        self.windows = Windows(train, settings.block_size, settings.seed)

    def loss(self, model, first: int, n: int) -> torch.Tensor:
        return next_token_loss(model, self.windows.batch(first, n))

    def evaluate(self, model) -> dict[str, float]:
        settings = self.settings
        batches = held_back_batches(self.held_back, settings.block_size, settings.batch_size, settings.eval_windows)
        losses = [(next_token_loss(model, ids).item(), len(ids)) for ids in batches]
        return {"eval_loss": sum(loss * n for loss, n in losses) / sum(n for _, n in losses)}


def next_token_loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each token in ids (b, s + 1) but the first, given those before it."""
    ids = ids.to(model.device)
    hidden = model.transformer(ids[:, :-1], None, None, None, None)  # (b, s, d_model)
    return linear_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:])
