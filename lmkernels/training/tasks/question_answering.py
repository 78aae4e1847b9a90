"""The part of a text that answers a question (Rajpurkar et al. 2016)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer

from .features import Feature, percent, text_of

NAME = "question-answering"
MODEL = "BertForQuestionAnswering"
FORMAT = "SQuAD's JSON: data, of articles with paragraphs, of a context and qas"
LONGEST_ANSWER = 30  # tokens


@dataclass
class Question:
    id: str
    question: str
    context: str
    answers: list[tuple[int, str]]  # where in the context, and its text


@dataclass
class Window:
    """A part of a context: its tokens first .. end - 1 in the sequence, and the characters of each token."""

    first: int
    end: int
    characters: list[tuple[int, int]]


def read(path: str | Path) -> list[Question]:
    """The questions of a file in SQuAD's format (version 1.1: all have an answer), which may be a .gz."""
    try:
        questions = [
            Question(
                str(entry["id"]),
                entry["question"].strip(),
                paragraph["context"],
                [(int(answer["answer_start"]), answer["text"]) for answer in entry["answers"]],
            )
            for article in json.loads(text_of(path))["data"]
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be {FORMAT}: {type(error).__name__}: {error}") from None
    if not questions:
        raise ValueError(f"{path} holds no questions: it must be {FORMAT}")
    for question in questions:
        if not question.answers:
            raise ValueError(f"{path}: question {question.id!r} has no answer; those of SQuAD 2.0 are not supported")
        for start, text in question.answers:
            if question.context[start : start + len(text)] != text:
                raise ValueError(f"{path}: the answer of question {question.id!r} is not at {start} of its context")
    return questions


def label_names(examples: list[Question]) -> None:
    return None


def features(examples: list[Question], tokenizer: Tokenizer, label2id, max_length: int, stride: int) -> list[Feature]:
    """Every window of a context is one sequence; where the answer is not in it, its target is token 0, [CLS]."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    longest = max(len(tokenizer.encode(question).ids) for question in {example.question for example in examples})
    # the windows must move on: beside question and [SEP] there is room for more than they share
    if longest + 1 + stride >= max_length:
        raise ValueError(
            f"max_length must exceed stride + the longest question, {stride} + {longest}, got {max_length}"
        )
    tokenizer.enable_truncation(max_length, stride=stride, strategy="only_second")
    pairs = [(example.question, example.context) for example in examples]
    return [
        feature(i, window, examples[i].answers[0])
        for i, encoding in enumerate(tokenizer.encode_batch(pairs))
        for window in (encoding, *encoding.overflowing)
    ]


def feature(example: int, encoding: Encoding, answer: tuple[int, str]) -> Feature:
    places = [place for place, part in enumerate(encoding.sequence_ids) if part == 1]
    window = Window(places[0], places[-1] + 1, encoding.offsets) if places else Window(0, 0, [])
    start, end = token_span(window, answer[0], answer[0] + len(answer[1]))
    return Feature.of(example, encoding, window, start_positions=start, end_positions=end)


def token_span(window: Window, start: int, end: int) -> tuple[int, int]:
    """The first and the last token of the characters start .. end - 1, or (0, 0) where the window lacks some."""
    tokens = range(window.first, window.end)
    first = next((t for t in tokens if window.characters[t][0] <= start < window.characters[t][1]), None)
    last = next((t for t in tokens if window.characters[t][0] < end <= window.characters[t][1]), None)
    return (0, 0) if first is None or last is None else (first, last)


def predictions(output, features: list[Feature]) -> list[tuple[float, int, int]]:
    """Of every window the likeliest span of at most LONGEST_ANSWER tokens: its score and its characters from, to."""
    result = []
    for start, end, feature in zip(output.start_logits.float(), output.end_logits.float(), features):
        window = feature.extra
        part = slice(window.first, window.end)
        scores = start[part, None] + end[None, part]
        allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
        if not allowed.numel():
            result.append((float("-inf"), 0, 0))
            continue
        best = int(scores.masked_fill(~allowed, float("-inf")).argmax())
        first, last = (window.first + place for place in divmod(best, window.end - window.first))
        result.append((float(scores.flatten()[best]), window.characters[first][0], window.characters[last][1]))
    return result


def score(examples: list[Question], features: list[Feature], predicted, id2label) -> dict[str, float]:
    """Exact match and F1 of SQuAD's own rules, of the best window of each question."""
    from torchmetrics.functional.text import squad

    best: dict[int, tuple[float, int, int]] = {}
    for feature, span in zip(features, predicted):
        best[feature.example] = max(best.get(feature.example, span), span)
    given = [
        {"id": question.id, "prediction_text": question.context[best[i][1] : best[i][2]]}
        for i, question in enumerate(examples)
    ]
    wanted = [
        {
            "id": question.id,
            "answers": {
                "text": [text for _, text in question.answers],
                "answer_start": [start for start, _ in question.answers],
            },
        }
        for question in examples
    ]
    return {name: percent(value / 100) for name, value in squad(given, wanted).items()}
