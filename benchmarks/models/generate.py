"""Decoding by `generate` and by the `Engine`: tokens per second in every format, beside other programs (--peers).

For one sequence, a token reads every weight once, and the keys and values before it. The floor is these bytes over the
read bandwidth that torch reaches in the same run, turn by turn with the tokens. Then the time of a prompt; of a pass
over several tokens, by which speculation checks guesses; and batches of ragged prompts, whose rate is that of all new
tokens over the whole time, prompts included. Weights are random: speed does not depend on them. In float32 a peer that
writes other tokens is an error; fewer bits are rounded in several ways.
"""

from __future__ import annotations

import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.generate_peers import PEERS, Clock, Peer, peers_of
from lmkernels.generation import Engine
from lmkernels.generation.decoder import Decoder
from lmkernels.models import GPT2Config, GPT2LMHeadModel
from lmkernels.models.quantized import quantize

FORMATS = ("float32", "bfloat16", "int8", "int4")
CONTEXTS = (32, 256)  # tokens before the last one that is timed
NEW = 24  # tokens per turn, of which the first comes with the prompt
PROMPT = 384
GUESSED = (1, 2, 5, 9)  # tokens of a pass: one and the guesses behind it
BATCHES, SHORTEST, LONGEST, BATCH_NEW = (8, 32), 16, 256, 64


def run(options: harness.Options) -> list[dict]:
    """The table of `python -m benchmarks generate`: GPT-2 with 124 M parameters."""
    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2Config.from_name("gpt2")).eval()
    probe = torch.ones(2**27)
    rows, absent = [], []
    for name in tqdm(FORMATS, unit="format", file=sys.stderr, leave=False):
        lines = {f"decoding, {name}, context {context}": (decoding, context, probe) for context in CONTEXTS}
        lines[f"prompt of {PROMPT}, {name}"] = (prefill,)
        lines[f"guesses, {name}"] = (checking,)
        lines |= {f"{b} ragged prompts, {name}": (batch, b) for b in BATCHES}
        chosen = {title: line for title, line in lines.items() if options.cases in title}
        if not chosen:
            continue
        model = our_model(name, original)
        peers, missing = peers_of(name, original) if options.peers else ({}, [])
        absent += missing
        for title, (measure, *arguments) in chosen.items():
            rows.append({"name": title, "unit": "tokens/s"} | measure(model, peers, options.seconds, *arguments))
    if not rows:
        raise SystemExit(f"--cases {options.cases!r} is in no line, such as 'decoding, int8, context 32'")
    if absent:
        print(f"not installed, and left out: {', '.join(dict.fromkeys(absent))}", file=sys.stderr)
    if options.plot:
        plot(rows, options.plot)
    return rows


def our_model(name: str, original: GPT2LMHeadModel) -> GPT2LMHeadModel:
    model = deepcopy(original)
    if name.startswith("int"):
        quantize(model, name)
        return model
    return model.to(harness.DTYPES[name])


def bytes_per_token(model: GPT2LMHeadModel, context: int) -> int:
    config, dtype = model.config, model.transformer.ln_f.weight.dtype
    return model.step_model().nbytes + 2 * config.n_layer * config.n_embd * context * dtype.itemsize


def ours(model: GPT2LMHeadModel) -> Peer:
    def write(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        clock = Clock()
        tokens = model.generate(prompts, max_new_tokens=new, eos_token_id=[], streamer=clock)
        return tokens[:, -new:].tolist(), clock.times

    return write


def ours_in_an_engine(model: GPT2LMHeadModel, rows: int) -> Peer:
    engine = Engine(model, max_rows=rows)

    def write(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        times = [time.perf_counter()]
        requests = [engine.add(prompt, max_new_tokens=new, eos_token_id=[]) for prompt in prompts]
        while engine.busy:
            engine.step()
            times.append(time.perf_counter())
        return [request.tokens for request in requests], times

    return write


def in_turn(competitors: dict[str, Peer], prompts: list[list[int]], new: int, seconds: float, least: int, between=None):
    """The times of every turn of each, and whose tokens were not ours in a first, short turn, which warms up.

    Each turn's prompts begin in a way of their own: an engine remembers those that it has read.
    """
    taken = {name: [] for name in competitors}
    written = {name: write(prompts, min(new, NEW))[0] for name, write in competitors.items()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken["ours"]) < least:
        prompts = [[prompt[0] ^ 1 + len(taken["ours"]), *prompt[1:]] for prompt in prompts]
        for name, write in competitors.items():
            taken[name].append(write(prompts, new)[1])
        if between is not None:
            between()
    return taken, [name for name, tokens in written.items() if tokens != written["ours"]]


def compared(rates: dict[str, float]) -> dict:
    """Tokens per second as a row, with the ratio of ours to the best peer's."""
    peers = [rate for name, rate in rates.items() if name in PEERS]
    row = {name: round(rate, 1) for name, rate in rates.items()}
    return row | ({"ratio": round(rates["ours"] / max(peers), 2)} if peers else {})


def decoding(model, peers: dict[str, Peer], seconds: float, context: int, probe: torch.Tensor) -> dict:
    """With `context` tokens before the last, in turn with the peers and a reading of memory."""
    reading = []

    def read():
        for _ in range(3):
            start = time.perf_counter()
            probe.sum()
            reading.append(time.perf_counter() - start)

    prompt = torch.randint(2**15, (max(8, context - NEW),)).tolist()
    taken, wrong = in_turn({"ours": ours(model), **peers}, [prompt], NEW, seconds, least=3, between=read)
    if wrong and model.dtype == torch.float32 and model.quantization is None:
        return {"error": f"{', '.join(wrong)} wrote other tokens"}
    # of every token but the first, which waits for the prompt
    medians = {
        name: statistics.median(b - a for times in turns for a, b in zip(times[1:], times[2:]))
        for name, turns in taken.items()
    }
    rate = probe.nbytes / harness.Timing.of(reading).p10
    size = bytes_per_token(model, len(prompt) + NEW // 2)
    row = compared({name: 1 / median for name, median in medians.items()})
    row |= {"MB/token": round(size / 1e6, 1), "GB/s": round(size / medians["ours"] / 1e9, 1)}
    return row | {"read GB/s": round(rate / 1e9, 1), "% of floor": round(100 * size / rate / medians["ours"], 1)}


def prefill(model, peers: dict[str, Peer], seconds: float) -> dict:
    """Prompt tokens per second, up to the first new token."""
    prompt = torch.randint(2**15, (PROMPT,)).tolist()
    taken, _ = in_turn({"ours": ours(model), **peers}, [prompt], 1, seconds, least=3)
    return compared({name: PROMPT / statistics.median(t[1] - t[0] for t in turns) for name, turns in taken.items()})


@torch.no_grad()
def checking(model, peers: dict[str, Peer], seconds: float) -> dict:
    """Milliseconds of a pass over one token and the guesses behind it, and what that is of a pass over one."""
    ids = torch.randint(2**15, (1, 128 + max(GUESSED)))
    decoder = Decoder(model, torch.ones(1, 128, dtype=torch.bool), ids.shape[1] + 1)
    decoder.logits(ids[:, :128])
    taken = {n: [] for n in GUESSED}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[1]) < 5:
        for n, times in taken.items():
            start = time.perf_counter()
            decoder.logits(ids[:, : 128 + n], n)
            times.append(time.perf_counter() - start)
            decoder.crop(128)
    medians = {n: statistics.median(times) for n, times in taken.items()}
    row = {"unit": "ms"} | {f"{n} token" + "s" * (n > 1): round(1e3 * median, 2) for n, median in medians.items()}
    return row | {"5 to 1": round(medians[5] / medians[1], 2)}


def batch(model, peers: dict[str, Peer], seconds: float, rows: int) -> dict:
    """New tokens per second of the whole call, for prompts of all lengths from SHORTEST to LONGEST."""
    lengths = torch.linspace(SHORTEST, LONGEST, rows).long()[torch.randperm(rows)].tolist()
    prompts = [torch.randint(2**15, (length,)).tolist() for length in lengths]
    competitors = {"ours": ours(model), "Engine": ours_in_an_engine(model, rows)}
    competitors |= {name: peer for name, peer in peers.items() if name != "ONNX Runtime"}
    taken, _ = in_turn(competitors, prompts, BATCH_NEW, seconds, least=1)
    new = rows * BATCH_NEW
    return compared({name: new / statistics.median(t[-1] - t[0] for t in turns) for name, turns in taken.items()})


def plot(rows: list[dict], path: Path) -> None:
    """Bars of the tokens per second: of one sequence, with the floor as a line above ours, and of batches."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = [
        ("one sequence (dashed: what reading memory allows)", [row for row in rows if row["name"].startswith("deco")]),
        ("ragged batches, prompts included", [row for row in rows if "ragged" in row["name"]]),
    ]
    groups = [(title, lines) for title, lines in groups if lines]
    figure, axes = pyplot.subplots(len(groups), figsize=(9, 4.5 * len(groups)), layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes[:, 0], groups):
        names = [name for name in ("ours", "Engine", *PEERS) if any(name in row for row in lines)]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = [j + (i - (len(names) - 1) / 2) * width for j, row in enumerate(lines) if name in row]
            axis.bar(at, [row[name] for row in lines if name in row], width, label=name)
        floors = {i: row["ours"] / row["% of floor"] * 100 for i, row in enumerate(lines) if "% of floor" in row}
        axis.hlines(floors.values(), [i - 0.45 for i in floors], [i + 0.45 for i in floors], "k", "dashed")
        labels = [row["name"].removeprefix("decoding, ").replace(", ", "\n") for row in lines]
        axis.set_xticks(range(len(lines)), labels, fontsize="small")
        axis.set_ylabel("tokens per second")
        axis.set_title(title)
        axis.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
