"""Masked language modelling: what is hidden, the run, and what it leaves for transformers."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from lmkernels.cli import main
from lmkernels.models import BertForMaskedLM, BertForSequenceClassification
from lmkernels.training import Settings, masked, pretrain, pseudo_perplexity
from lmkernels.training.checkpoint import all_in, find, load_tokenizer
from lmkernels.training.corpus import find_corpus
from lmkernels.training.masked import SPECIAL, Vocabulary, hide
from lmkernels.training.report import read_log
from lmkernels.training.settings import learning_rate
from lmkernels.training.tokens import read_tokens, train_tokenizer
from lmkernels.training.trainer import adamw

VOCABULARY = Vocabulary(cls=2, sep=3, mask=4, special=torch.arange(5), ordinary=torch.arange(5, 1000))


@pytest.fixture
def masked_options(options):
    return options | {"objective": "mlm", "vocab_size": 200}


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    """The folder of a finished run, and what `pretrain` returned."""
    out = tmp_path_factory.mktemp("masked")
    sizes = {"vocab_size": 200, "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8}
    schedule = {"steps": 60, "warmup": 5, "eval_every": 20, "save_every": 20, "lr": 1e-2, "device": "cpu", "threads": 1}
    result = pretrain(out, {"objective": "mlm", "lowercase": False, "corpus": [str(corpus)], **sizes, **schedule})
    return out, result


def rows(n, s=64, seed=0):
    ids = torch.randint(5, 1000, (n, s), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1], ids[::3, 20] = 2, 3, 3
    return ids


def test_fifteen_percent_are_hidden_80_10_10():
    ids = rows(2000)
    given, labels = hide(ids, torch.arange(2000), VOCABULARY, share=0.15, seed=1, stream=0)
    hidden = labels != -100
    assert (hidden.sum(1) == round(0.15 * 64)).all()
    assert not hidden[ids < 5].any() and torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(given[~hidden], ids[~hidden])
    masked_ones, kept = (given == 4)[hidden], (given == ids)[hidden]
    n = int(hidden.sum())  # 20,000: a standard deviation is 0.3 % of them
    assert masked_ones.sum() / n == pytest.approx(0.8, abs=0.012)
    assert kept.sum() / n == pytest.approx(0.1, abs=0.01)
    others = given[hidden][~masked_ones & ~kept]
    assert 5 <= others.min() < 15 and 990 < others.max() <= 999 and others.unique().numel() > 800
    places = hidden.float().mean(0)[1:-1]
    assert places.std() < 0.02  # every place alike


def test_what_is_hidden_depends_on_number_seed_and_stream_alone():
    ids, numbers = rows(9), torch.arange(7, 16)

    def drawn(some=slice(None), shift=0, seed=1, stream=0):
        numbered = numbers[some] + shift
        return torch.stack(hide(ids[some], numbered, VOCABULARY, share=0.15, seed=seed, stream=stream))

    assert torch.equal(drawn(), torch.cat([drawn(slice(0, 4)), drawn(slice(4, 9))], 1))
    for other in (drawn(seed=2), drawn(stream=1), drawn(shift=1), drawn(shift=1 << 32), drawn(seed=1 + (1 << 32))):
        assert not torch.equal(other, drawn())


def test_rows_with_few_tokens_hide_what_there_is():
    ids = torch.full((3, 12), 3)
    ids[1, 4], ids[2, 4:8] = 7, 8
    _, labels = hide(ids, torch.arange(3), VOCABULARY, share=0.2, seed=0, stream=0)
    assert (labels != -100).sum(1).tolist() == [0, 1, 2]


def test_the_tokenizer_is_berts_and_the_same_each_time(corpus):
    settings = Settings(objective="mlm", vocab_size=200)
    tokenizer = masked.train_tokenizer(find_corpus([str(corpus)]), settings)
    words = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    letters = words[5 : words.index(next(word for word in words if word.startswith("##")))]
    assert words[:5] == list(SPECIAL) and letters == sorted(letters) and set("defrtu01()") < set(letters)
    assert words[5 + len(letters) : 5 + 2 * len(letters)] == [f"##{letter}" for letter in letters]
    again = masked.train_tokenizer(find_corpus([str(corpus)]), settings)
    assert again.to_str() == tokenizer.to_str()
    encoding = tokenizer.encode("RETURN x")
    assert encoding.tokens == ["[CLS]", "return", "x", "[SEP]"] and tokenizer.decode(encoding.ids) == "return x"
    assert tokenizer.encode("x", "def").type_ids == [0, 0, 0, 1, 1]
    cased = masked.train_tokenizer(find_corpus([str(corpus)]), Settings(lowercase=False, vocab_size=200))
    assert "[UNK]" in cased.encode("RETURN").tokens


def test_a_run_learns_and_leaves_all_its_files(run):
    out, result = run
    log = read_log(out / "log.jsonl")
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 60 and losses[0] == pytest.approx(math.log(200), rel=0.1)
    assert result["finished"] and result["eval_loss"] < losses[0] - 1.5 and result["masked_accuracy"] > 10
    assert [row["step"] for row in log if "masked_accuracy" in row] == [20, 40, 60]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in all_in(out / "checkpoints")] == ["step-00000040", "step-00000060"]
    config = BertForMaskedLM.from_pretrained(find(out)).config
    assert (config.vocab_size, config.max_position_embeddings, config.intermediate_size) == (200, 32, 128)


@pytest.mark.parametrize("dtype, grad_accum", [("float32", 1), ("bfloat16", 2)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, masked_options, dtype, grad_accum, ctrl_c):
    masked_options |= {"dtype": dtype, "grad_accum": grad_accum}
    pretrain(tmp_path / "whole", masked_options)

    with ctrl_c(before=5):
        first = pretrain(tmp_path / "parts", masked_options)
    assert not first["finished"] and first["step"] == 5
    torch.rand(3)
    assert pretrain(tmp_path / "parts", {}, resume=True)["finished"]
    for file in ("model.safetensors", "training.safetensors", "tokenizer.json"):
        whole, parts = (find(tmp_path / part) / file for part in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), file
    logs = [
        [(row["step"], row.get("loss"), row.get("eval_loss"), row.get("masked_accuracy")) for row in read_log(path)]
        for path in (tmp_path / "whole" / "log.jsonl", tmp_path / "parts" / "log.jsonl")
    ]
    assert logs[0] == logs[1]
    with pytest.raises(ValueError, match="objective cannot change when a run is resumed: it was mlm, got clm"):
        pretrain(tmp_path / "parts", {"objective": "clm"}, resume=True)


def test_grad_accumulation_equals_one_large_batch(tmp_path, masked_options):
    masked_options |= {"dropout": 0.0, "steps": 3}
    pretrain(tmp_path / "large", masked_options | {"batch_size": 8})
    pretrain(tmp_path / "parts", masked_options | {"batch_size": 2, "grad_accum": 4})
    large, parts = (BertForMaskedLM.from_pretrained(find(tmp_path / part)) for part in ("large", "parts"))
    for (name, expected), (_, parameter) in zip(large.named_parameters(), parts.named_parameters()):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation_is_that_of_all_logits_whatever_the_batch(run, corpus):
    out, result = run
    saved = json.loads((find(out) / "training.json").read_text())["settings"]
    model, tokenizer = BertForMaskedLM.from_pretrained(find(out)).eval(), load_tokenizer(find(out))
    tokens = read_tokens(out / "tokens")
    figures = [
        masked.Text(tokens, tokenizer, Settings(**saved | {"batch_size": n})).evaluate(model)
        for n in (saved["batch_size"], 3)
    ]
    assert figures[0]["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-6)
    assert figures[1]["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-5)
    assert figures[0]["masked_accuracy"] == figures[1]["masked_accuracy"] == result["masked_accuracy"]
    data = masked.Text(tokens, tokenizer, Settings(**saved | {"eval_windows": 1}))
    (ids, labels), score = (
        data.masked(torch.from_numpy(data.held_back[:30].astype("int64"))[None], 0, 1),
        masked.Score(),
    )
    score.add(model, ids, labels)
    with torch.no_grad():
        assert score.loss == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-5)


def test_text_of_unknown_characters_is_no_reason_to_stop(tmp_path, masked_options):
    file = tmp_path / "text.txt"
    file.write_text("a b " * 300 + "".join(chr(0x4E00 + i) for i in range(2000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "ALPHABET", 2)
        options = masked_options | {"corpus": [str(file)], "batch_size": 1, "vocab_size": 30}
        result = pretrain(tmp_path / "run", options)
    losses = [row["loss"] for row in read_log(tmp_path / "run" / "log.jsonl") if "loss" in row]
    assert load_tokenizer(result["checkpoint"]).get_vocab_size() <= 30
    assert result["finished"] and 0.0 in losses and all(map(math.isfinite, losses))
    assert math.isnan(result["eval_loss"])  # the text that was held back has nothing to predict


def test_the_loss_falls_as_with_transformers(tmp_path, masked_options):
    transformers = pytest.importorskip("transformers")
    options = masked_options | {"dropout": 0.0, "lr": 1e-3}
    folder = pretrain(tmp_path / "run", options)["checkpoint"]
    settings, tokenizer = Settings(**options), load_tokenizer(folder)
    data = masked.Text(read_tokens(tmp_path / "run" / "tokens"), tokenizer, settings)
    torch.manual_seed(settings.seed)
    BertForMaskedLM(masked.configuration(settings, tokenizer)).save_pretrained(tmp_path / "start")
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "start").train()
    optimizer, losses = adamw(model, settings), []
    for step in range(settings.steps):
        ids, labels = data.masked(data.windows.batch(4 * step, 4), 4 * step, stream=0)
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, 0.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    logged = [row["loss"] for row in read_log(tmp_path / "run" / "log.jsonl") if "loss" in row]
    assert logged == pytest.approx(losses, rel=1e-4)


def test_transformers_reads_the_model_and_the_tokenizer(run):
    transformers = pytest.importorskip("transformers")
    folder = find(run[0])
    ours, theirs = BertForMaskedLM.from_pretrained(folder).eval(), transformers.BertForMaskedLM.from_pretrained(folder)
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(folder)) is transformers.BertForMaskedLM
    tokenizer, own = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    text = "def f3(x):\n    return X + [MASK] é"
    assert tokenizer(text).input_ids == own.encode(text).ids  # with its capitals: this run's text was not made small
    assert tokenizer.model_max_length == 32
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, own.token_to_id("[MASK]")) == (0, 4)
    batch = tokenizer([text, "def f"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, got = theirs(**batch).logits, ours(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-5)


def test_small_letters_are_known_to_transformers(tmp_path, masked_options):
    transformers = pytest.importorskip("transformers")
    folder = pretrain(tmp_path, masked_options | {"steps": 1})["checkpoint"]
    tokenizer, own = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert tokenizer("DEF F").input_ids == own.encode("def f").ids


def test_a_gpts_tokenizer_is_known_to_transformers(tmp_path, options):
    transformers = pytest.importorskip("transformers")
    folder = pretrain(tmp_path, options | {"steps": 1})["checkpoint"]
    tokenizer, own = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    text = "def f(x):\n  return é"
    assert tokenizer(text, truncation=False).input_ids == own.encode(text).ids
    assert tokenizer.model_max_length == 16 and tokenizer.eos_token == "<|endoftext|>"


def test_pseudo_perplexity_hides_every_token_once(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    out, _ = run
    file = tmp_path / "text.py"
    file.write_text("def f1(x):\n    return x + 3\n\ndef f2(x):\n    return x + 4 é\n")
    figures = pseudo_perplexity(out, file, mask_share=0.0, batch_size=3, max_length=20)
    model, tokenizer = transformers.BertForMaskedLM.from_pretrained(find(out)), load_tokenizer(find(out))
    ids = tokenizer.encode(file.read_text(), add_special_tokens=False).ids
    losses, right = [], 0
    for start in range(0, len(ids), 18):
        window = torch.tensor([[2, *ids[start : start + 18], 3]])
        for place in range(1, window.shape[1] - 1):
            if window[0, place] >= 5:
                with torch.no_grad():
                    logits = model(window.index_fill(1, torch.tensor([place]), 4)).logits[0, place]
                losses.append(-logits.log_softmax(0)[window[0, place]].item())
                right += int(logits.argmax() == window[0, place])
    assert figures["tokens"] == len(losses) == len(ids) - 1  # é is unknown
    assert figures["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert figures["pseudo_perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
    assert figures["masked_accuracy"] == round(100 * right / len(losses), 2)
    assert pseudo_perplexity(out, file, mask_share=0.3)["tokens"] == len(losses)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_share": 1.0}, r"mask_share must lie in \[0, 1\), got 1.0"),
        ({"max_length": 2}, r"max_length must lie in \[3, 32\]"),
        ({"max_length": 33}, r"max_length must lie in \[3, 32\] \(max_position_embeddings\), got 33"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments_of_pseudo_perplexity_are_named_errors(run, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        pseudo_perplexity(run[0], corpus / "part1.py", **options)


def test_pseudo_perplexity_needs_known_text(run, tmp_path):
    (tmp_path / "text.txt").write_text("é é")
    with pytest.raises(ValueError, match="data must hold a token that the model knows"):
        pseudo_perplexity(run[0], tmp_path / "text.txt")


def test_a_tokenizer_without_berts_tokens_is_a_named_error(options, corpus):
    with pytest.raises(ValueError, match=r"it has no \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"):
        Vocabulary.of(train_tokenizer(find_corpus([str(corpus)]), 300))


def test_what_was_learnt_is_fine_tuned(run):
    with pytest.warns(UserWarning, match="initialised at random"):
        model = BertForSequenceClassification.from_pretrained(find(run[0]), num_labels=3)
    expected = BertForMaskedLM.from_pretrained(find(run[0])).state_dict()
    for name, tensor in model.bert.encoder.state_dict().items():
        assert torch.equal(tensor, expected[f"bert.encoder.{name}"])


def test_example_of_a_filled_mask(run, capsys):
    transformers = pytest.importorskip("transformers")
    path = Path(__file__).parents[2] / "examples" / "fill_mask.py"
    spec = importlib.util.spec_from_file_location("fill_mask", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder, sentence = find(run[0]), "def [MASK](x): return [MASK]"
    words = example.main([str(run[0]), sentence, "--top", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 2
    expected = transformers.pipeline("fill-mask", model=str(folder), tokenizer=str(folder), device="cpu", top_k=3)
    assert words == [[guess["token_str"] for guess in guesses] for guesses in expected(sentence)]
    with pytest.raises(SystemExit):
        example.main([str(run[0]), "def f(x):"])
    assert "the sentence must have a [MASK]" in capsys.readouterr().err


def test_command_line(tmp_path, corpus, capsys):
    """From text to a classifier: pretrain, evaluate, finetune."""
    out, text = str(tmp_path / "run"), str(corpus / "part2.py")
    sizes = ["--vocab-size", "200", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "32"]
    steps = ["--steps", "2", "--batch-size", "4", "--threads", "1", "--device", "cpu"]
    command = ["pretrain", "--preset", "bert-base", "--out", out, "--corpus", str(corpus), *sizes, *steps]
    assert main([*command, "--no-lowercase"]) == 0
    assert "BertForMaskedLM with 0.01 M parameters" in (printed := capsys.readouterr().out)
    assert "masked_accuracy: " in printed
    assert main(["pretrain", "--out", out, "--resume", "--steps", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert main(["evaluate", "--model", out, "--data", text, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["task"] == "masked-lm" and figures["pseudo_perplexity"] > 1
    for arguments, message in (
        (["evaluate", "--data", text, "--stride", "4"], "--stride must be left out where the model is a pretrained"),
        (["evaluate", "--data", text, "--quantize", "int8"], "--quantize must be left out"),
        (["generate", "--prompt", "x"], "must hold a model of type 'gpt2', got 'bert'"),
    ):
        assert main([*arguments, "--model", out]) == 2
        assert message in capsys.readouterr().err
    data = tmp_path / "labelled.tsv"
    data.write_text("".join(f"def f{i}(x):\t{i % 3}\n" for i in range(30)))
    tuned = [
        "--task",
        "text-classification",
        "--model",
        out,
        "--train",
        str(data),
        "--max-length",
        "32",
        "--stride",
        "4",
    ]
    assert main(["finetune", *tuned, "--out", str(tmp_path / "tuned"), *steps]) == 0
    folder = find(tmp_path / "tuned")
    assert BertForSequenceClassification.from_pretrained(folder).config.num_labels == 3
    assert json.loads((folder / "tokenizer_config.json").read_text())["do_lower_case"] is False
