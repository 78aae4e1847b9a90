"""A label for a text: reviews by sentiment, say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tokenizers import Tokenizer

from .features import Feature, kind_of, number_of, percent, text_of

NAME = "text-classification"
MODEL = "BertForSequenceClassification"
FORMAT = "a .tsv or .txt of `text<TAB>label`, a .csv with the columns text and label, or a .jsonl with these keys"
TEXT_COLUMNS = ("text", "sentence")


def read(path: str | Path) -> list[tuple[str, str]]:
    """(text, label) pairs of a file in FORMAT, which may be a .gz."""
    kind = kind_of(path)
    if kind not in ("tsv", "txt", "csv", "jsonl"):
        raise ValueError(f"{path} must be {FORMAT}")
    rows = {"csv": from_csv, "jsonl": from_jsonl}.get(kind, from_tsv)(text_of(path), path)
    if not rows:
        raise ValueError(f"{path} holds no examples: it must be {FORMAT}")
    return rows


def from_tsv(text: str, path) -> list[tuple[str, str]]:
    rows = []
    # not splitlines: a text may hold other line separators
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            sentence, tab, label = line.rstrip("\r").rpartition("\t")
            if not tab or not label.strip():
                raise ValueError(f"{path}, line {number}: a line must be `text<TAB>label`, got {line!r:.80}")
            rows.append((sentence.strip(), label.strip()))
    return rows


def from_csv(text: str, path) -> list[tuple[str, str]]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    return [from_entries(row, f"{path}, line {reader.line_num}") for row in reader]


def from_jsonl(text: str, path) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entries = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        rows.append(from_entries(entries if isinstance(entries, dict) else {}, f"{path}, line {number}"))
    return rows


def from_entries(entries: dict, where: str) -> tuple[str, str]:
    column = next((name for name in TEXT_COLUMNS if isinstance(entries.get(name), str)), None)
    if column is None or entries.get("label") in (None, ""):
        raise ValueError(f"{where}: there must be a text (or sentence) and a label, got {list(entries)}")
    return entries[column], str(entries["label"])


def label_names(examples: list[tuple[str, str]]) -> list[str]:
    return sorted({label for _, label in examples})


def features(
    examples: list[tuple[str, str]], tokenizer: Tokenizer, label2id: dict[str, int], max_length: int, stride: int
) -> list[Feature]:
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    encodings = tokenizer.encode_batch([text for text, _ in examples])
    return [
        Feature.of(i, encoding, labels=number_of(examples[i][1], label2id, f"example {i + 1}"))
        for i, encoding in enumerate(encodings)
    ]


def predictions(output, features: list[Feature]) -> list[int]:
    return output.logits.argmax(-1).tolist()


def score(examples, features: list[Feature], predicted: list[int], id2label: dict[int, str]) -> dict[str, float]:
    """Accuracy, and the mean of the F1 of each label."""
    from sklearn.metrics import accuracy_score, f1_score

    labels = [feature.targets["labels"] for feature in features]
    return {
        "accuracy": percent(accuracy_score(labels, predicted)),
        "f1": percent(f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }
