"""What the tasks share: files as text, labels as numbers, and sequences as batches."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Encoding

# the label of a token that does not count
IGNORED = -100


@dataclass
class Feature:
    """One sequence for the model.

    example: the number of the example it is made of
    input_ids, token_type_ids: (s,)
    targets: the labels by the names of the model's arguments: a number, or one per token
    extra: what the task needs to read the model's answer
    """

    example: int
    input_ids: list[int]
    token_type_ids: list[int]
    targets: dict[str, Any]
    extra: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, example: int, encoding: Encoding, extra=None, **targets) -> Feature:
        return cls(example, encoding.ids, encoding.type_ids, targets, extra)

    @property
    def counted(self) -> int:
        """How many labels the mean loss of a batch is over."""
        labels = self.targets.get("labels")
        return sum(label != IGNORED for label in labels) if isinstance(labels, list) else 1


def batch(features: list[Feature], pad_id: int) -> dict[str, torch.Tensor]:
    """The arguments of a model: sequences padded on the right to the longest, (b, s) each."""
    width = max(len(feature.input_ids) for feature in features)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    arguments = {
        "input_ids": padded([feature.input_ids for feature in features], pad_id),
        "token_type_ids": padded([feature.token_type_ids for feature in features], 0),
        "attention_mask": padded([[1] * len(feature.input_ids) for feature in features], 0),
    }
    for name, first in features[0].targets.items():
        rows = [feature.targets[name] for feature in features]
        arguments[name] = padded(rows, IGNORED) if isinstance(first, list) else torch.tensor(rows)
    return arguments


def text_of(path: str | Path) -> str:
    """The text of a UTF-8 file, which may be a .gz."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from None


def kind_of(path: str | Path) -> str:
    """The ending of a file's name, .gz aside: "jsonl"."""
    return Path(str(path).removesuffix(".gz")).suffix.removeprefix(".").lower()


def number_of(label: str, label2id: dict[str, int], where: str) -> int:
    if label not in label2id:
        known = ", ".join(map(repr, list(label2id)[:8])) + (", ..." if len(label2id) > 8 else "")
        raise ValueError(f"{where}: the label must be one of the model's ({known}), got {label!r}")
    return label2id[label]


def percent(x: float) -> float:
    return round(100 * float(x), 2)
