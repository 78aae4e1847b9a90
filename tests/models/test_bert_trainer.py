"""Hugging Face's Trainer trains, saves and resumes our BERT as its own: the script in examples/, end to end."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmkernels.models import BertConfig, BertForMaskedLM, BertForSequenceClassification

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_bert.py"
WORDS = "the a of it is was not this good bad great movie film food place time phone very and i".split()
STEPS = ["--max-steps", "4", "--save-steps", "2", "--batch-size", "4", "--max-length", "16"]


@pytest.fixture(scope="module")
def script():
    for package in ("transformers", "datasets", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    spec = importlib.util.spec_from_file_location("finetune_bert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sentences(data, tmp_path_factory) -> str:
    lines = (data / "sentiment_sentences" / "yelp_labelled.train.txt").read_text().splitlines()
    file = tmp_path_factory.mktemp("sentences") / "sentences.tsv"
    file.write_text("\n".join(lines[:40]) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def checkpoint(script, tmp_path_factory) -> str:
    """A tiny classifier, without dropout, and a tokenizer of a few words and all letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(c) for c in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{x}" for x in letters), *(w for w in WORDS if w[1:])]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_script_trains_as_with_transformers_and_its_folders_load(script, sentences, checkpoint, tmp_path, monkeypatch):
    import transformers

    metrics = script.main([checkpoint, sentences, "--output", str(tmp_path / "ours"), *STEPS])
    for folder in ("ours", "ours/checkpoint-2", "ours/checkpoint-4"):
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / folder)
        theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / folder).eval()
        ids = torch.arange(4, 20).view(2, 8)
        torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    trained = load_file(tmp_path / "ours" / "model.safetensors")
    start = load_file(Path(checkpoint) / "model.safetensors")
    assert trained.keys() == start.keys() and not torch.equal(trained["classifier.weight"], start["classifier.weight"])

    monkeypatch.setattr(script, "BertForSequenceClassification", transformers.BertForSequenceClassification)
    expected = script.main([checkpoint, sentences, "--output", str(tmp_path / "theirs"), *STEPS])
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    for name, x in load_file(tmp_path / "theirs" / "model.safetensors").items():
        assert (x - trained[name]).norm() <= 1e-2 * (x - start[name]).norm() + 1e-6, name


def test_resumed_training_ends_where_uninterrupted_training_does(script, sentences, checkpoint, tmp_path):
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    dropout = tmp_path / "dropout"
    shutil.copytree(checkpoint, dropout)
    (dropout / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.1}))
    script.main([str(dropout), sentences, "--output", str(tmp_path / "out"), *STEPS])
    whole = load_file(tmp_path / "out" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "model.safetensors").unlink()
    script.main([str(dropout), sentences, "--output", str(tmp_path / "out"), *STEPS, "--resume"])
    for name, x in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(x, whole[name], msg=name)


def test_trainer_saves_and_resumes_a_model_with_tied_weights_in_bfloat16(script, tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    config = BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(61, (8, 6))]
    arguments = {"output_dir": str(tmp_path), "bf16": True, "save_steps": 2, "disable_tqdm": True}
    arguments["use_cpu"] = torch.get_default_device().type == "cpu"

    def trainer(**more):
        options = TrainingArguments(**arguments, **more, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        return Trainer(model=BertForMaskedLM(config), args=options, train_dataset=rows, eval_dataset=rows)

    trainer(max_steps=2).train()
    resumed = trainer(max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    head = resumed.model.cls.predictions
    assert head.decoder.weight is resumed.model.bert.embeddings.word_embeddings.weight
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(loaded.state_dict(), resumed.model.state_dict())
    assert resumed.evaluate()["eval_loss"] > 0
