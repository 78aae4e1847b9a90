"""Fine-tuning and evaluation: every task learns, resumes exactly, scores as its rules say, and refuses bad data."""

import gzip
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer

from lmkernels import models
from lmkernels.cli import main
from lmkernels.models import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from lmkernels.training import evaluate, finetune, perplexity
from lmkernels.training.checkpoint import find, load_tokenizer
from lmkernels.training.perplexity import windows
from lmkernels.training.report import read_log
from lmkernels.training.tasks import question_answering, text_classification, token_classification
from lmkernels.training.tasks.features import IGNORED, batch

WORDS = "good bad film food the was a not very Anna Berlin lives in where ? paris . who it".split()


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """The folder of a tiny BERT without a head, with the vocab.txt of its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word.lower() for word in WORDS} - {"a"})]
    (folder / "vocab.txt").write_text("\n".join([*vocabulary, *letters]) + "\n")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary) + len(letters),
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
            **sizes,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A file of data for every task."""
    folder = tmp_path_factory.mktemp("data")
    rows = [(f"the {thing} was {'' if sure else 'very '}{word}", word) for thing in ("film", "food", "paris")
            for word in ("good", "bad") for sure in (0, 1)]  # fmt: skip
    (folder / "reviews.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    sentences = [(["Anna", "lives", "in", "Berlin", "."], ["B-PER", "O", "O", "B-LOC", "O"]),
                 (["Paris", "was", "good"], ["B-LOC", "O", "O"]), (["who", "lives"], ["O", "O"])] * 3  # fmt: skip
    lines = ("".join(f"{word}\t{tag}\n" for word, tag in zip(*sentence)) for sentence in sentences)
    with gzip.open(folder / "names.conll.gz", "wt") as file:
        file.write("-DOCSTART- O\n\n" + "\n".join(lines))
    questions = []
    for i, (name, city) in enumerate([("anna", "berlin"), ("lives", "paris")] * 4):
        context = f"{name} was very good . {name} lives in {city} . the film was bad ."
        answer = {"answer_start": context.index(city), "text": city}
        questions.append({"context": context, "qas": [{"id": str(i), "question": "where ?", "answers": [answer]}]})
    (folder / "questions.json").write_text(json.dumps({"data": [{"paragraphs": questions}]}))
    return {
        "text-classification": folder / "reviews.tsv",
        "token-classification": folder / "names.conll.gz",
        "question-answering": folder / "questions.json",
    }


@pytest.fixture
def options(bert):
    return {
        "model": str(bert),
        "batch_size": 4,
        "lr": 5e-3,
        "max_length": 16,
        "stride": 4,
        "device": "cpu",
        "threads": 1,
    }


@pytest.mark.parametrize(
    "task, figure", [("text-classification", "accuracy"), ("token-classification", "f1"), ("question-answering", "f1")]
)
def test_a_task_is_learned_and_scored(tmp_path, files, options, task, figure):
    file = str(files[task])
    result = finetune(tmp_path, options | {"task": task, "train": file, "eval": file, "epochs": 25, "eval_every": 20})
    assert result["finished"] and result[figure] == 100, result
    assert result["eval_loss"] < 0.2
    assert [row[figure] for row in read_log(tmp_path / "log.jsonl") if figure in row][-1] == result[figure]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    again = evaluate(tmp_path, file, batch_size=3, max_length=16, stride=4, device="cpu")
    assert again["task"] == task and again[figure] == 100
    assert again["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-4)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, files, options, ctrl_c):
    options |= {"task": "text-classification", "train": str(files["text-classification"]), "steps": 7}
    finetune(tmp_path / "whole", options)
    with ctrl_c(before=5):
        assert not finetune(tmp_path / "parts", options)["finished"]
    torch.rand(3)
    assert finetune(tmp_path / "parts", {}, resume=True)["finished"]
    for file in ("model.safetensors", "training.safetensors"):
        whole, parts = (find(tmp_path / run) / file for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), file


def test_a_classifier_keeps_its_labels_and_another_one_replaces_it(tmp_path, files, options):
    options |= {"task": "text-classification", "steps": 1}
    finetune(tmp_path / "one", options | {"train": str(files["text-classification"])})
    one = find(tmp_path / "one")
    assert models.BertForSequenceClassification.from_pretrained(one).config.id2label == {0: "bad", 1: "good"}
    (tmp_path / "good.tsv").write_text("the food\tgood\n" * 4)
    finetune(tmp_path / "two", options | {"model": str(one), "train": str(tmp_path / "good.tsv")})
    assert models.BertForSequenceClassification.from_pretrained(find(tmp_path / "two")).config.num_labels == 2
    (tmp_path / "other.tsv").write_text("the food\tx\nfilm\ty\nin\tz\n")
    with pytest.raises(ValueError, match="num_labels"):
        finetune(tmp_path / "three", options | {"model": str(one), "train": str(tmp_path / "other.tsv")})
    with pytest.raises(ValueError, match=r"example 1: the label must be one of the model's \('bad', 'good'\), got 'x'"):
        evaluate(one, tmp_path / "other.tsv", max_length=16, stride=4)


def test_only_the_first_piece_of_a_word_has_a_tag(bert):
    examples = [(["Berlin", "zed", "was"], ["B", "O", "O"])]
    (feature,) = token_classification.features(examples, load_tokenizer(bert), {"B": 7, "O": 0}, 16, 4)
    # [CLS] berlin z ##e ##d was [SEP]
    assert feature.targets["labels"] == [IGNORED, 7, 0, IGNORED, IGNORED, 0, IGNORED]
    assert feature.extra == {0: 1, 1: 2, 2: 5}


def test_a_word_that_was_cut_off_counts_as_missed(bert):
    examples = [(["Berlin", "was", "Paris"], ["B-LOC", "O", "B-LOC"])]
    features = token_classification.features(examples, load_tokenizer(bert), {"O": 0, "B-LOC": 1}, 4, 1)
    figures = token_classification.score(examples, features, [{0: 1, 1: 0}], {0: "O", 1: "B-LOC"})
    assert figures["precision"] == 100 and figures["recall"] == 50


def test_windows_of_a_context_find_the_answer_where_it_is_whole(bert, files):
    (question, *_) = question_answering.read(files["question-answering"])
    features = question_answering.features([question], load_tokenizer(bert), None, 12, 4)
    assert len(features) > 1
    spans = [(f.targets["start_positions"], f.targets["end_positions"]) for f in features]
    assert any(span != (0, 0) for span in spans)
    for feature, (start, end) in zip(features, spans):
        characters = feature.extra.characters
        text = question.context[characters[start][0] : characters[end][1]]
        assert (start, end) == (0, 0) or text == question.answers[0][1]


def test_predictions_are_spans_of_the_context_in_order():
    window = question_answering.Window(2, 5, [(0, 0), (0, 0), (0, 2), (3, 5), (6, 9), (0, 0)])
    feature = question_answering.Feature(0, [0] * 6, [0] * 6, {}, window)
    start, end = torch.zeros(1, 6), torch.zeros(1, 6)
    start[0, 0], end[0, 0] = 50, 50  # [CLS]
    start[0, 4], end[0, 3] = 5, 4  # the wrong way round
    start[0, 2], end[0, 4] = 3, 3
    output = models.outputs.QuestionAnsweringModelOutput(start_logits=start, end_logits=end)
    assert question_answering.predictions(output, [feature]) == [(8.0, 6, 9)]


def test_squad_takes_the_best_window_and_forgives_articles_and_case():
    question = question_answering.Question("q", "where", "In the City of x", [(3, "the City")])
    windows = [question_answering.Feature(0, [], [], {}) for _ in range(2)]
    figures = question_answering.score([question], windows, [(1.0, 0, 2), (2.0, 7, 11)], None)
    assert figures == {"exact_match": 100.0, "f1": 100.0}


def test_batches_are_padded_and_labels_do_not_count_there():
    features = [
        token_classification.Feature(0, [5, 6, 7], [0, 0, 0], {"labels": [1, 2, 3]}),
        token_classification.Feature(1, [5], [0], {"labels": [4]}),
    ]
    arguments = batch(features, 9)
    assert arguments["input_ids"].tolist() == [[5, 6, 7], [5, 9, 9]]
    assert arguments["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert arguments["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.tsv", "a\t1\nb c\t0\n"),
        ("x.csv", 'text,label\na,1\n"b c",0\n'),
        ("x.jsonl", '{"sentence": "a", "label": 1}\n{"text": "b c", "label": "0"}\n'),
    ],
)
def test_classification_reads_all_its_formats(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert text_classification.read(tmp_path / name) == [("a", "1"), ("b c", "0")]


@pytest.mark.parametrize(
    "task, name, content, message",
    [
        (text_classification, "x.tsv", "a\t1\nno label\n", "line 2: a line must be"),
        (text_classification, "x.tsv", "", "holds no examples"),
        (text_classification, "x.csv", "text,other\na,b\n", "line 2: there must be a text"),
        (text_classification, "x.jsonl", '{"text": "a"\n', "line 1 is not JSON"),
        (text_classification, "x.parquet", "", "must be a .tsv"),
        (token_classification, "x.conll", "a O\nb\n", "line 2: there must be a word and its tag"),
        (token_classification, "x.conll", "\n\n", "holds no sentences"),
        (question_answering, "x.json", "{}", "must be SQuAD's JSON"),
        (question_answering, "x.json", '{"data": []}', "holds no questions"),
        (text_classification, "x.tsv.gz", "not gzip", "cannot be read"),
    ],
)
def test_bad_data_is_named(tmp_path, task, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        task.read(tmp_path / name)


def squad(context, start, text, answers=None):
    answers = [{"answer_start": start, "text": text}] if answers is None else answers
    entry = {"id": "q1", "question": "where ?", "answers": answers}
    return {"data": [{"paragraphs": [{"context": context, "qas": [entry]}]}]}


def test_answers_must_be_in_their_context(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(squad("in berlin", 2, "berlin")))
    with pytest.raises(ValueError, match="'q1' is not at 2 of its context"):
        question_answering.read(file)
    file.write_text(json.dumps(squad("in berlin", 0, "", answers=[])))
    with pytest.raises(ValueError, match="'q1' has no answer"):
        question_answering.read(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "translation"}, "task must be one of text-classification"),
        ({"train": ""}, "train must be given"),
        ({"max_length": 65}, "max_position_embeddings = 64, got 65"),
        ({"stride": 16}, "stride must be below max_length"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"schedule": "step"}, "schedule must be cosine or linear, got 'step'"),
        ({"task": "question-answering", "stride": 12}, "max_length must exceed"),
    ],
)
def test_bad_options_leave_nothing(tmp_path, files, options, change, message):
    task = change.get("task", "text-classification")
    options |= {"task": task, "train": str(files.get(task, files["text-classification"]))}
    with pytest.raises(ValueError, match=message):
        finetune(tmp_path / "out", options | change)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="session")
def gpt(tmp_path_factory):
    """The folder of a tiny GPT that knows single bytes."""
    folder = tmp_path_factory.mktemp("gpt")
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)
    ).save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .?")}
    tokenizer = {"model": {"type": "BPE", "vocab": letters, "merges": []}, "version": "1.0"}
    Tokenizer.from_str(json.dumps(tokenizer)).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("max_length, stride", [(16, None), (8, None), (8, 3), (16, 1), (2, 1)])
def test_perplexity_counts_every_token_once_with_its_context(tmp_path, gpt, max_length, stride):
    text = "anna lives in berlin. where was the film? the food was not bad."
    (tmp_path / "text.txt").write_text(text)
    result = perplexity(gpt, tmp_path / "text.txt", max_length=max_length, stride=stride, batch_size=3, device="cpu")
    model, ids = GPT2LMHeadModel.from_pretrained(gpt), torch.tensor(load_tokenizer(gpt).encode(text).ids)
    total = 0.0
    for start, counted, end in windows(len(ids), max_length, stride or max_length):
        log_probs = model(ids[None, start : end - 1]).logits[0].log_softmax(-1)
        total -= log_probs.gather(1, ids[start + 1 : end, None])[counted - start - 1 :].sum().item()
    assert result["tokens"] == len(ids) - 1
    assert result["eval_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(result["eval_loss"]))
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text), rel=1e-4)


def test_perplexity_of_quantised_weights_is_near(tmp_path, gpt):
    (tmp_path / "text.txt").write_text("anna lives in berlin. where was the film?")
    whole, int8, int4 = (
        perplexity(gpt, tmp_path / "text.txt", quantize=quantize, device="cpu")["eval_loss"]
        for quantize in (None, "int8", "int4")
    )
    assert 0 < abs(int8 - whole) < 0.01 * whole and abs(int8 - whole) < abs(int4 - whole) < 0.2 * whole


@pytest.mark.parametrize("n, max_length, stride", [(2, 16, 16), (100, 16, 16), (100, 16, 5), (33, 16, 1), (17, 2, 1)])
def test_windows_are_full_and_cover(n, max_length, stride):
    counted = 1
    for start, first, end in windows(n, max_length, stride):
        assert first == counted and start < first < end <= start + max_length
        assert start == 0 or end == n or first - start >= max_length - stride
        counted = end
    assert counted == n


def test_command_line(tmp_path, files, bert, gpt, capsys):
    out, data = str(tmp_path / "run"), str(files["text-classification"])
    command = ["finetune", "--task", "text-classification", "--model", str(bert), "--train", data, "--out", out]
    assert main([*command, "--max-length", "16", "--stride", "4", "--steps", "2", "--json", "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finished"] and {"accuracy", "f1", "checkpoint"} <= result.keys()
    assert main(["evaluate", "--model", out, "--data", data, "--max-length", "16", "--stride", "4"]) == 0
    assert "accuracy: " in capsys.readouterr().out
    long = tmp_path / "long.tsv"
    long.write_text("the film was good " * 40 + "\tgood\n")
    assert main(["evaluate", "--model", out, "--data", str(long)]) == 0  # cut to what the model has room for
    assert "examples: 1\n" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("anna lives in berlin.")
    assert main(["evaluate", "--model", str(gpt), "--data", str(tmp_path / "text.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1
    assert main(["evaluate", "--model", str(bert), "--data", data]) == 2
    assert "model must be one of BertForSequenceClassification" in capsys.readouterr().err


def test_the_tokenizer_of_an_old_checkpoint_is_its_vocabulary(bert, tmp_path):
    expected = BertWordPieceTokenizer(str(bert / "vocab.txt"), lowercase=True).encode("Anna was not zed").ids
    assert load_tokenizer(bert).encode("Anna was not zed").ids == expected
    (tmp_path / "vocab.txt").write_bytes((bert / "vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).encode("Anna").ids != load_tokenizer(bert).encode("Anna").ids


def example(name: str):
    """The module examples/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def long_bert(bert, tmp_path):
    """The folder of the tiny BERT with room for what the examples read at a time."""
    torch.manual_seed(0)
    config = BertConfig.from_dict(json.loads((bert / "config.json").read_text()), max_position_embeddings=384)
    BertModel(config).save_pretrained(tmp_path / "bert")
    shutil.copy(bert / "vocab.txt", tmp_path / "bert")
    return tmp_path / "bert"


def test_example_of_named_entities(tmp_path, long_bert, data, capsys):
    """On sentences of WNUT-17."""
    for part, count in (("train", 60), ("dev", 20)):
        with gzip.open(data / "wnut17" / f"{part}.conll.gz", "rt") as file:
            sentences = re.split(r"\n\s*\n", file.read())[:count]
        (tmp_path / f"{part}.conll").write_text("\n\n".join(sentences))
    files = [str(tmp_path / f"{part}.conll") for part in ("train", "dev")]
    out = str(tmp_path / "out")
    example("named_entities").main([str(long_bert), *files, "--epochs", "1", "--out", out, "--sentence", "Anna lives"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("F1 of whole entities: ") and [line.split()[-1] for line in lines[1:]] == [
        "Anna",
        "lives",
    ]


def test_example_of_question_answering(tmp_path, long_bert, data, capsys):
    """On questions of SQuAD."""
    for part, name in (("train", "train_subset_44articles"), ("dev", "dev_half_a_24articles")):
        articles = json.loads(gzip.decompress((data / "squad1.1" / f"{name}.json.gz").read_bytes()))["data"]
        few = [{"paragraphs": articles[0]["paragraphs"][:2]}]
        (tmp_path / f"{part}.json").write_text(json.dumps({"data": few}))
    files = [str(tmp_path / f"{part}.json") for part in ("train", "dev")]
    run = [str(long_bert), *files, "--epochs", "1", "--out", str(tmp_path / "out")]
    context = "Anna lives in Berlin"
    example("question_answering").main([*run, "--question", "where ?", "--context", context])
    scores, answer = capsys.readouterr().out.splitlines()
    assert scores.startswith("exact match: ") and answer and answer in context
