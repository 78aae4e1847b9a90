"""A label for every word: named entities."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from .features import IGNORED, Feature, number_of, percent, text_of

NAME = "token-classification"
MODEL = "BertForTokenClassification"
FORMAT = "a word and its tag on each line (the first and the last column), and an empty line after each sentence"

Example = tuple[list[str], list[str]]  # words, tags


def read(path: str | Path) -> list[Example]:
    """(words, tags) of every sentence of a file in CoNLL's format, which may be a .gz."""
    sentences: list[Example] = []
    words, tags = [], []
    for number, line in enumerate([*text_of(path).split("\n"), ""], 1):
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise ValueError(f"{path}, line {number}: there must be {FORMAT}, got {line!r:.80}")
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            sentences.append((words, tags))
            words, tags = [], []
    if not sentences:
        raise ValueError(f"{path} holds no sentences: there must be {FORMAT}")
    return sentences


def label_names(examples: list[Example]) -> list[str]:
    """O first, then by name."""
    return sorted({tag for _, tags in examples for tag in tags}, key=lambda tag: (tag != "O", tag))


def features(
    examples: list[Example], tokenizer: Tokenizer, label2id: dict[str, int], max_length: int, stride: int
) -> list[Feature]:
    """The first piece of a word carries its tag, the others none (Devlin et al. 2019, section 5.3)."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    encodings = tokenizer.encode_batch([words for words, _ in examples], is_pretokenized=True)
    result = []
    for i, encoding in enumerate(encodings):
        numbers = [number_of(tag, label2id, f"sentence {i + 1}") for tag in examples[i][1]]
        labels, first_pieces = [IGNORED] * len(encoding.ids), {}
        for place, word in enumerate(encoding.word_ids):
            if word is not None and word not in first_pieces:
                first_pieces[word] = place
                labels[place] = numbers[word]
        result.append(Feature.of(i, encoding, first_pieces, labels=labels))
    return result


def predictions(output, features: list[Feature]) -> list[dict[int, int]]:
    """{word: label} of every sentence, for the words that the model has seen."""
    rows = output.logits.argmax(-1).tolist()
    return [{word: row[place] for word, place in feature.extra.items()} for row, feature in zip(rows, features)]


def score(examples: list[Example], features, predicted: list[dict[int, int]], id2label) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, as CoNLL counts them. A word that was cut off counts as O."""
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    tags = [words_tags[1] for words_tags in examples]
    guesses = [
        [id2label[labels[word]] if word in labels else "O" for word in range(len(words))]
        for (words, _), labels in zip(examples, predicted)
    ]
    options = {"zero_division": 0}
    return {
        "precision": percent(precision_score(tags, guesses, **options)),
        "recall": percent(recall_score(tags, guesses, **options)),
        "f1": percent(f1_score(tags, guesses, **options)),
        "accuracy": percent(accuracy_score(tags, guesses)),
    }
