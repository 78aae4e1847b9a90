"""The command line does what its help says, in one line when it cannot."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lmkernels
from lmkernels import demo
from lmkernels.cli import main

SIZES = [
    *("--vocab-size", "300", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "32"),
    *("--batch-size", "4", "--warmup", "2", "--eval-windows", "4", "--threads", "1", "--device", "cpu"),
]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.py"
    file.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(600)))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("run")
    assert main(["pretrain", "--out", str(out), "--corpus", str(corpus), *SIZES, "--steps", "4", "--json"]) == 0
    return out


def one_error_line(capsys) -> str:
    """What went to standard error, which must be one line of ours."""
    captured = capsys.readouterr()
    assert re.fullmatch(r"lmkernels: [^\n]+\n", captured.err), captured.err
    return captured.err


def test_pretrain_prints_one_json_object(tmp_path, corpus, capsys):
    out = tmp_path / "run"
    assert main(["pretrain", "--out", str(out), "--corpus", str(corpus), *SIZES, "--steps", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 3 and result["finished"] and result["eval_loss"] > 0
    for key in ("checkpoint", "log", "plot"):
        assert Path(result[key]).exists()


def test_preset_gives_the_sizes_and_single_sizes_override_it(tmp_path, corpus):
    sizes = ["--preset", "tiny", "--n-layer", "1", "--vocab-size", "300", "--block-size", "16"]
    options = ["--batch-size", "1", "--steps", "1", "--eval-windows", "1", "--threads", "1", "--device", "cpu"]
    assert main(["pretrain", "--out", str(tmp_path), "--corpus", str(corpus), *sizes, *options]) == 0
    config = json.loads((tmp_path / "checkpoints" / "step-00000001" / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["n_positions"]) == (1, 256, 16)


def test_resume_takes_the_saved_options(run, tmp_path, capsys):
    out = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(run), str(out)], check=True)
    assert main(["pretrain", "--out", str(out), "--resume", "--steps", "6"]) == 0
    assert "resuming after step 4" in capsys.readouterr().out
    assert (out / "checkpoints" / "step-00000006").is_dir()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_usable_checkpoint_and_tells_how_to_go_on(tmp_path, corpus, stop):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lmkernels", "pretrain", "--out", str(out), "--corpus", str(corpus), *SIZES]
    process = subprocess.Popen(
        [*command, "--steps", "1000000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    log = out / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = errors.strip().splitlines()[-1]
    found = re.search(rf"stopped after step (\d+); go on with: lmkernels pretrain --out {out} --resume", last)
    assert found and "Traceback" not in errors
    step = int(found.group(1))
    assert main(["generate", "--model", str(out), "--prompt", "def", "--max-new-tokens", "2"]) == 0
    assert main(["pretrain", "--out", str(out), "--resume", "--steps", str(step + 2)]) == 0


def test_generate_repeats_the_prompt_and_follows_the_seed(run, capsys):
    def text(*options):
        assert main(["generate", "--model", str(run), "--prompt", "def f", "--max-new-tokens", "12", *options]) == 0
        return capsys.readouterr().out

    assert text("--seed", "1").startswith("def f")
    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--greedy") == text("--greedy")
    assert text("--seed", "3", "--num-return-sequences", "2").count("def f") >= 2


def test_generate_reads_standard_input_and_prints_json(run):
    command = [sys.executable, "-m", "lmkernels", "generate", "--model", str(run), "--max-new-tokens", "5"]
    result = subprocess.run(
        [*command, "--json", "--stats", "--seed", "0"], input="def é\n", capture_output=True, text=True, check=True
    )
    answer = json.loads(result.stdout)
    assert answer["prompt"] == "def é" and len(answer["completions"]) == 1 and answer["tokens"] <= 5
    for entry in ("tokens_per_second", "prompt_tokens_per_second", "decode_tokens_per_second", "weight_bytes"):
        assert answer[entry] > 0
    assert answer["peak_bytes"] > answer["weight_bytes"]
    assert 0 < answer["percent_of_floor"] < 150 and answer["step_bytes"] < answer["weight_bytes"] * 1.1
    assert re.fullmatch(
        r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s \(prompt of \d+: [\d.]+ tokens/s; then [\d.]+ tokens/s, "
        r"\d+ % of what reading [\d,]+ MB a step at [\d.]+ GB/s allows\), "
        r"[\d.,]+ MB of weights, at most [\d.,]+ MB in use\n",
        result.stderr,
    )


def test_generate_takes_the_settings_of_the_sampler(run, capsys):
    def text(*options):
        assert main(["generate", "--model", str(run), "--prompt", "def f", "--max-new-tokens", "9", *options]) == 0
        return capsys.readouterr().out

    greedy = text("--greedy")
    assert text("--greedy", "--prompt-lookup", "3") == text("--greedy", "--draft-model", str(run)) == greedy
    assert text("--greedy", "--repetition-penalty", "9.0") != greedy
    assert text("--min-p", "1.0") == text("--top-k", "1") == greedy
    assert text("--num-beams", "2", "--num-return-sequences", "2").count("def f") >= 2
    varied = text("--greedy", "--repetition-penalty", "9.0")
    stop = varied[len("def f") : -1][-1]
    stopped = text("--greedy", "--repetition-penalty", "9.0", "--stop", "no such text", "--stop", stop)
    assert varied.startswith(stopped[:-1]) and stop in stopped[len("def f") : -1]
    assert text("--greedy", "--quantize", "int8").startswith("def f")


def test_generate_at_a_terminal_asks_for_prompts_until_ctrl_d(run):
    master, terminal = os.openpty()
    command = [sys.executable, "-m", "lmkernels", "generate", "--model", str(run), "--max-new-tokens", "4", "--greedy"]
    process = subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(terminal)
    os.write(master, ("def f\n" + "x" * 400 + "\nimport\n\x04").encode())
    out, errors = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 0 and "Traceback" not in errors
    assert "def f" in out and "import" in out
    assert "Ctrl-D ends" in errors and "n_positions = 32" in errors


def test_generate_starts_a_document_from_an_empty_prompt(run, capsys):
    assert main(["generate", "--model", str(run), "--prompt", "", "--max-new-tokens", "3", "--seed", "0"]) == 0


def test_doctor_reports_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__ and report["lmkernels"] == lmkernels.__version__
    assert report["backends"] == lmkernels.backends() and report["threads"] == torch.get_num_threads()
    assert report["matmul_precision"] == "highest"
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("reference", "native", "triton", "threads", "float32 products", "compiler"):
        assert name in text


def test_doctor_says_what_to_do_about_an_absent_library(capsys, monkeypatch):
    monkeypatch.setattr(lmkernels, "backends", lambda: {"reference": None, "native": "not built", "triton": "no GPU"})
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "absent: not built" in text and "pip install ." in text


def test_doctor_survives_a_wrong_isa():
    result = subprocess.run(
        [sys.executable, "-m", "lmkernels", "doctor"],
        env=os.environ | {"LMKERNELS_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "LMKERNELS_CPU_ISA" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pretrain", "--out", "{tmp}", "--corpus", "{tmp}/nowhere"], "corpus must be a file or a folder"),
        (["pretrain", "--out", "{tmp}", "--corpus", "{tmp}"], "corpus must hold text, found none"),
        (["pretrain", "--out", "{tmp}", "--steps", "-1"], "steps must be positive, got -1"),
        (["pretrain", "--out", "{tmp}", "--norm", "batch"], "norm must be one of layer_norm, rms_norm, got 'batch'"),
        (["pretrain", "--out", "{tmp}", "--num-kv-heads", "3"], "n_head must be a multiple of num_kv_heads = 3, got 4"),
        (["pretrain", "--out", "{tmp}", "--resume"], "no checkpoint to resume"),
        (["pretrain", "--out", "{run}", "--corpus", "{tmp}"], "holds a run already"),
        (["pretrain", "--out", "{run}", "--resume", "--n-embd", "32"], "n_embd cannot change"),
        (["generate", "--model", "{tmp}/nowhere", "--prompt", "x"], "does not exist"),
        (["generate", "--model", "{tmp}", "--prompt", "x"], "holds no checkpoint"),
        (["generate", "--model", "{run}", "--prompt", "x", "--max-new-tokens", "99"], "n_positions = 32"),
        (["generate", "--model", "{run}", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be"),
        (["generate", "--model", "{run}", "--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["generate", "--model", "{run}", "--prompt", "x", "--greedy", "--top-k", "3"], "drop it or --top-k"),
        (["generate", "--model", "{run}", "--prompt", "x", "--num-beams", "2", "--min-p", "0.1"], "drop it or --min-p"),
        (["generate", "--model", "{run}", "--prompt", "x", "--stop", ""], "stop_strings must be"),
        (["generate", "--model", "{run}", "--prompt", "x", "--threads", "0"], "--threads must be at least 1"),
        (["generate", "--model", "{run}", "--prompt", "x", "--dtype", "int9"], "dtype must be"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, capsys, arguments, message):
    capsys.readouterr()
    assert main([argument.format(run=run, tmp=tmp_path) for argument in arguments]) == 2
    assert message in one_error_line(capsys)


def test_truncated_model_is_one_line_and_exit_code_2(run, tmp_path, capsys):
    subprocess.run(["cp", "-r", str(run), str(tmp_path / "copy")], check=True)
    weights = tmp_path / "copy" / "checkpoints" / "step-00000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["generate", "--model", str(tmp_path / "copy"), "--prompt", "x"]) == 2
    assert "damaged or truncated" in one_error_line(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["pretrain"],
        ["pretrain", "--out", "x", "--dtpye", "float32"],
        ["pretrain", "--out", "x", "--steps", "3", "--minutes", "1"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("command", ["doctor", "pretrain", "generate"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and "--json" in capsys.readouterr().out


def test_demo_runs_twice_and_tells_where_everything_lies(tmp_path, corpus, monkeypatch, capsys):
    sizes = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(SIZES[::2], SIZES[1::2])}
    monkeypatch.setattr(demo, "OPTIONS", sizes | {"corpus": corpus, "block_size": 128})
    rows = [
        {"name": "a step", "ours": 2000.0, "plain torch": 1000.0, "unit": "tokens/s", "ratio": 2.0},
        {"name": "a wrong step", "error": "result 0 differs"},
    ]
    monkeypatch.setattr(demo, "comparison", lambda: demo.table(rows))
    for _ in range(2):
        assert demo.main(["--out", str(tmp_path), "--minutes", "0.002"]) == 0
        text = capsys.readouterr().out
        assert "2,000" in text and "2.00x" in text and "result 0 differs" in text and "class Stack:" in text
        assert str(tmp_path / "run" / "loss.png") in text and (tmp_path / "run" / "loss.png").exists()
