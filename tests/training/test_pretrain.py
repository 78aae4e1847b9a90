"""A run trains, resumes exactly, and never harms its last good checkpoint."""

import errno
import json
import math

import pytest
import torch

from lmkernels.models import GPT2Config, GPT2LMHeadModel
from lmkernels.training import Settings, pretrain
from lmkernels.training.causal import Text
from lmkernels.training.checkpoint import all_in, find, load_tokenizer
from lmkernels.training.report import read_log
from lmkernels.training.settings import learning_rate
from lmkernels.training.trainer import adamw


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_learns_and_leaves_all_its_files(tmp_path, options):
    result = pretrain(tmp_path, options | {"steps": 40, "save_every": 20})
    losses = [row["loss"] for row in read_log(tmp_path / "log.jsonl") if "loss" in row]
    assert len(losses) == 40 and losses[0] == pytest.approx(math.log(300), rel=0.1)
    assert result["finished"] and result["eval_loss"] < losses[0] - 1
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in all_in(tmp_path / "checkpoints")] == ["step-00000020", "step-00000040"]
    model, tokenizer = GPT2LMHeadModel.from_pretrained(find(tmp_path)), load_tokenizer(find(tmp_path))
    assert model.config.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert model.generate([tokenizer.encode("def f").ids], max_new_tokens=5, eos_token_id=[]).shape[1] > 5


@pytest.mark.parametrize("change", [{}, {"dtype": "bfloat16", "grad_accum": 2}, {"matmul_precision": "high"}], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, options, change, ctrl_c, matmul_precision):
    options |= change
    pretrain(tmp_path / "whole", options)

    with ctrl_c(before=5):
        first = pretrain(tmp_path / "parts", options)
    assert not first["finished"] and first["step"] == 5
    # what happened to the generator in between must not matter
    torch.rand(3)
    matmul_precision("highest")
    assert pretrain(tmp_path / "parts", {}, resume=True)["finished"]
    for file in ("model.safetensors", "training.safetensors"):
        whole, parts = (find(tmp_path / run) / file for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), file
    logs = [
        [(row["step"], row.get("loss"), row.get("lr"), row.get("eval_loss")) for row in read_log(path)]
        for path in (tmp_path / "whole" / "log.jsonl", tmp_path / "parts" / "log.jsonl")
    ]
    assert logs[0] == logs[1]


def test_a_model_as_llama_is_trains_and_resumes(tmp_path, options):
    switches = {"norm": "rms_norm", "position": "rotary", "mlp": "swiglu", "num_kv_heads": 1, "bias": False}
    first = pretrain(tmp_path, options | switches)
    assert pretrain(tmp_path, {"steps": 40}, resume=True)["eval_loss"] < first["eval_loss"]
    model = GPT2LMHeadModel.from_pretrained(find(tmp_path))
    assert {name: getattr(model.config, name) for name in switches} == switches
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {"weight"}


def test_grad_accumulation_equals_one_large_batch(tmp_path, options):
    options |= {"dropout": 0.0, "steps": 3}
    pretrain(tmp_path / "large", options | {"batch_size": 8})
    pretrain(tmp_path / "parts", options | {"batch_size": 2, "grad_accum": 4})
    large, parts = (GPT2LMHeadModel.from_pretrained(find(tmp_path / run)) for run in ("large", "parts"))
    for (name, expected), (_, parameter) in zip(large.named_parameters(), parts.named_parameters()):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_log_lines_after_the_checkpoint_are_forgotten_on_resume(tmp_path, options):
    pretrain(tmp_path, options)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    pretrain(tmp_path, {"steps": 10}, resume=True)
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl") if "loss" in row] == list(range(1, 11))


def test_minutes_end_a_run(tmp_path, options):
    result = pretrain(tmp_path, options | {"steps": None, "minutes": 0.002})
    assert result["finished"] and result["step"] >= 1


def test_only_the_newest_checkpoints_stay(tmp_path, options):
    pretrain(tmp_path, options | {"save_every": 2, "keep": 3})
    assert [path.name[-1] for path in all_in(tmp_path / "checkpoints")] == ["4", "6", "8"]


@pytest.mark.parametrize(
    "written_last",
    [
        "lmkernels.models.checkpoint.save_file",
        "lmkernels.training.checkpoint.save_tensors",
        "lmkernels.training.checkpoint.asdict",
        "lmkernels._files.sync",
    ],
)
def test_a_full_disk_while_saving_leaves_the_last_good_checkpoint(tmp_path, options, monkeypatch, written_last):
    pretrain(tmp_path, options)
    good = files(tmp_path / "checkpoints")

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(written_last, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        pretrain(tmp_path, {"steps": 12}, resume=True)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert files(tmp_path / "checkpoints") == good
    assert pretrain(tmp_path, {"steps": 12}, resume=True)["finished"]


def test_matrices_decay_and_vectors_do_not():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    matrices, vectors = adamw(model, Settings(weight_decay=0.3)).param_groups
    assert matrices["weight_decay"] == 0.3 and {p.dim() for p in matrices["params"]} == {2}
    assert vectors["weight_decay"] == 0.0 and {p.dim() for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_learning_rate_warms_up_and_follows_a_cosine_to_its_end():
    settings = Settings(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(settings, step, 0.0) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    timed = Settings(steps=None, minutes=1, warmup=0, lr=1.0, min_lr=0.0)
    assert learning_rate(timed, 500, 30.0) == pytest.approx(0.5)


def test_divergence_stops_the_run_before_the_weights_are_lost(tmp_path, options):
    pretrain(tmp_path, options)
    good = files(tmp_path / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "loss", lambda self, model, *_: model(torch.zeros(1, 4).long()).logits.sum() * math.nan)
        with pytest.raises(FloatingPointError, match="diverged at step 9"):
            pretrain(tmp_path, {"steps": 12}, resume=True)
    assert files(tmp_path / "checkpoints") == good


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_embd": 15}, "n_embd must be a multiple of n_head = 2, got 15"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": math.nan}, "lr must be 0 or more, got nan"),
        ({"dtype": "float8"}, "dtype must be float32 or bfloat16"),
        ({"matmul_precision": "low"}, "matmul_precision must be highest, high or medium, got 'low'"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"eval_fraction": 1.0}, r"eval_fraction must lie in \(0, 1\)"),
        ({"block_size": 100_000}, "corpus must have more than 200002 tokens"),
        ({"objective": "mlm", "block_size": 100_000}, "corpus must have more than 199996 tokens"),
        ({"objective": "plm"}, "objective must be clm or mlm, got 'plm'"),
        ({"objective": "mlm", "mlp": "swiglu"}, "mlp must be left out for objective mlm, got 'swiglu'"),
        ({"objective": "mlm", "bias": False}, "bias must be left out for objective mlm, got False"),
        ({"lowercase": False}, "lowercase must be left out for objective clm, got False"),
        ({"objective": "mlm", "mlm_probability": 1.0}, r"mlm_probability must lie in \(0, 1\), got 1.0"),
        ({"objective": "mlm", "block_size": 3}, "block_size must be at least 4 for mlm, got 3"),
        ({"objective": "mlm", "vocab_size": 20}, r"vocab_size must be at least \d+ \(5 special tokens, and \d+ char"),
        ({"vocab_size": 100}, "vocab_size must be at least 257"),
    ],
)
def test_bad_settings_are_named_errors(tmp_path, options, change, message):
    with pytest.raises(ValueError, match=message):
        pretrain(tmp_path, options | change)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_a_named_error(tmp_path, options):
    with pytest.raises(ValueError, match="torch sees no GPU"):
        pretrain(tmp_path, options | {"device": "cuda"})


def test_a_second_run_does_not_overwrite_the_first(tmp_path, options):
    pretrain(tmp_path, options)
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain(tmp_path, options)


def test_resume_refuses_what_would_be_another_run(tmp_path, options):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume"):
        pretrain(tmp_path, {}, resume=True)
    pretrain(tmp_path, options)
    with pytest.raises(ValueError, match="n_layer cannot change when a run is resumed: it was 1, got 2"):
        pretrain(tmp_path, {"n_layer": 2}, resume=True)


@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("training.json", lambda data: data[:30], "training.json is damaged"),
        ("training.json", lambda data: json.dumps({"progress": {}}).encode(), "training.json is damaged"),
        ("training.safetensors", lambda data: data[:-5], "training.safetensors is damaged"),
        ("model.safetensors", lambda data: data[:-5], "model.safetensors is damaged or truncated"),
        ("tokenizer.json", lambda data: data[:50], "tokenizer.json is damaged"),
    ],
)
def test_resume_from_a_damaged_checkpoint_is_a_named_error(tmp_path, options, file, damage, message):
    pretrain(tmp_path, options)
    path = find(tmp_path) / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        pretrain(tmp_path, {"steps": 12}, resume=True)


def test_leftovers_of_a_killed_save_are_no_checkpoint(tmp_path, options):
    pretrain(tmp_path, options)
    (tmp_path / "checkpoints" / ".step-00000099.1.tmp").mkdir()
    assert find(tmp_path).name == "step-00000008"
