"""From text to a file of tokens that is mapped into memory, and batches out of it."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .._files import write_files
from .corpus import Corpus
from .settings import Settings

END_OF_TEXT = "<|endoftext|>"
PIECES_AT_ONCE = 16


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) with `<|endoftext|>` as token 0."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for text, _ in corpus.documents()), trainer)
    return tokenizer


def write_tokens(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: Callable[[int], None], end: str = END_OF_TEXT
) -> None:
    """Tokenises the corpus into `folder`: tokens.bin and tokens.json, which describes it.

    Every file ends in the token `end`. `progress` gets the bytes of text that each round has read.
    """
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    last = tokenizer.token_to_id(end)
    count = 0

    def write(path: Path) -> None:
        nonlocal count
        with path.open("wb") as file:
            for pieces in batched(corpus.documents(), PIECES_AT_ONCE):
                encodings = tokenizer.encode_batch_fast([text for text, _ in pieces], add_special_tokens=False)
                for encoding, (_, ends) in zip(encodings, pieces):
                    ids = encoding.ids + [last] if ends else encoding.ids
                    count += len(ids)
                    np.asarray(ids, dtype).tofile(file)
                progress(sum(len(text.encode()) for text, _ in pieces))

    def describe(path: Path) -> None:
        path.write_text(json.dumps({"dtype": dtype.name, "tokens": count, "bytes": corpus.size}) + "\n")

    write_files(folder, {"tokens.bin": write, "tokens.json": describe})


def read_tokens(folder: Path) -> np.ndarray:
    """The tokens that `write_tokens` wrote, mapped into memory: (n,) uint16 or uint32."""
    try:
        entries = json.loads((folder / "tokens.json").read_text())
        tokens = np.memmap(folder / "tokens.bin", dtype=entries["dtype"], mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokens in {str(folder)!r} cannot be read: {error}") from None
    if len(tokens) != entries["tokens"]:
        raise ValueError(
            f"{folder / 'tokens.bin'} must hold {entries['tokens']} tokens, as tokens.json says, got {len(tokens)}"
        )
    return tokens


def split(tokens: np.ndarray, window: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (n,) to learn from, and the last eval_fraction, which is held back: a window or more of each."""
    held_back = max(window, int(len(tokens) * settings.eval_fraction))
    if len(tokens) - held_back < window:
        raise ValueError(
            f"corpus must have more than {2 * window} tokens for block_size {settings.block_size}, got {len(tokens)}"
        )
    return tokens[:-held_back], tokens[-held_back:]


class Windows:
    """Windows of block_size + overlap tokens in an order that depends on nothing but the seed.

    Every epoch cuts the tokens anew, at a shifted grid, and shuffles the windows. A window is addressed by its
    number since the start of training, so a run resumes where it stopped without replaying anything.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int, overlap: int = 1):
        self.tokens, self.block_size, self.seed, self.overlap = tokens, block_size, seed, overlap
        # one block less than fit, which leaves room to shift the grid
        self.per_epoch = max(1, (len(tokens) - overlap) // block_size - 1)
        self.slack = len(tokens) - overlap - self.per_epoch * block_size
        self.epoch, self.starts = -1, np.empty(0, np.int64)

    def batch(self, first: int, n: int) -> torch.Tensor:
        """Windows first .. first + n - 1: (n, block_size + overlap) int64."""
        return torch.stack([self.window(number) for number in range(first, first + n)])

    def window(self, number: int) -> torch.Tensor:
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            shift = rng.integers(min(self.slack, self.block_size) + 1)
            self.epoch, self.starts = epoch, shift + self.block_size * rng.permutation(self.per_epoch)
        return window_at(self.tokens, self.starts[place], self.block_size + self.overlap)


def held_back_batches(
    tokens: np.ndarray, block_size: int, batch_size: int, n: int, overlap: int = 1
) -> Iterator[torch.Tensor]:
    """At most n windows, the same each time and spread evenly, in batches (<= batch_size, block_size + overlap)."""
    last = len(tokens) - block_size - overlap
    starts = np.unique(np.linspace(0, last, num=min(n, last // block_size + 1), dtype=np.int64))
    for some in batched(starts, batch_size):
        yield torch.stack([window_at(tokens, start, block_size + overlap) for start in some])


def window_at(tokens: np.ndarray, start: int, length: int) -> torch.Tensor:
    return torch.from_numpy(tokens[start : start + length].astype(np.int64))


def batched(items, n: int) -> Iterator[list]:
    items = iter(items)
    while some := list(islice(items, n)):
        yield some
