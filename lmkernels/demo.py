"""The whole library in three minutes: python -m lmkernels.demo

Shows the machine, trains a small GPT on the source of Python's standard library, lets it write, and compares this
library with plain torch on the same machine.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch

from . import _library, cli

OPTIONS = {
    "vocab_size": 2048,
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 256,
    "block_size": 128,
    "batch_size": 4,
    "lr": 1.5e-3,
    "warmup": 50,
    "eval_every": 100,
    "eval_windows": 64,
    "save_every": 500,
}
PROMPTS = ('class Stack:\n    """', "    def __init__(self, ")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lmkernels.demo", description="Train, write, compare.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: demo-out")
    parser.add_argument("--minutes", type=float, default=1.1, help="of training (default 1.1)")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    run = arguments.out / "run"
    # an earlier demo's run, which has nothing that this one does not make again
    if (run / "tokenizer.json").exists():
        shutil.rmtree(run)

    heading("This machine (lmkernels doctor)")
    cli.main(["doctor"])

    heading("Training a GPT on the source of Python's standard library (lmkernels pretrain)")
    dtype = "bfloat16" if _library.cpu_isa() in ("avx512bf16", "amx") or torch.cuda.is_available() else "float32"
    options = OPTIONS | {"minutes": arguments.minutes, "dtype": dtype}
    flags = [text for name, value in options.items() for text in (cli.option_name(name), str(value))]
    if code := cli.main(["pretrain", "--out", str(run), *flags]):
        return code

    for prompt in PROMPTS:
        heading("What it writes (lmkernels generate)")
        write = ["--max-new-tokens", "100", "--temperature", "0.7", "--seed", "1", "--stats"]
        if code := cli.main(["generate", "--model", str(run), "--prompt", prompt, *write]):
            return code

    heading("This library and plain torch, side by side")
    print(comparison())

    heading(f"Done in {time.perf_counter() - start:.0f} s")
    print(f"loss plot    {run / 'loss.png'}\nlog          {run / 'log.jsonl'}\ncheckpoints  {run / 'checkpoints'}")
    print(f"write more   lmkernels generate --model {run} --prompt 'def '")
    return 0


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def comparison() -> str:
    """The benchmarks' quick table, or why there is none."""
    try:
        from benchmarks.models.gpt import compare
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("benchmarks"):
            raise
        return "the benchmarks are not installed: run the demo in a checkout of lmkernels"
    return table(compare())


def table(rows: list[dict]) -> str:
    """Rows of a comparison as aligned text."""
    lines = [("", "lmkernels", "plain torch", "", "ratio")]
    for row in rows:
        if "error" in row:
            lines.append((row["name"], "", "", "", row["error"]))
            continue
        ours, plain = f"{row['ours']:,.0f}", f"{row['plain torch']:,.0f}"
        lines.append((row["name"], ours, plain, row["unit"], f"{row['ratio']:.2f}x"))
    width = max(len(line[0]) for line in lines)
    text = [
        f"{name:<{width}}  {ours:>10}  {plain:>11}  {unit:<8}  {ratio:>6}" for name, ours, plain, unit, ratio in lines
    ]
    return "\n".join([*text, f"({torch.get_num_threads()} threads; medians of interleaved runs; more is better)"])


if __name__ == "__main__":
    sys.exit(main())
