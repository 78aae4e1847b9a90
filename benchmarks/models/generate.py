"""Decoding by `generate` for one sequence: tokens per second in every format, as a share of what memory allows.

A token reads every weight once, and the keys and values before it. The floor is these bytes over the read bandwidth
that torch reaches in the same run, turn by turn with the tokens. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import harness
from lmkernels.models import GPT2Config, GPT2LMHeadModel
from lmkernels.models.quantized import quantize

FORMATS = ("float32", "bfloat16", "int8", "int4")
CONTEXTS = (32, 256)  # tokens before the last one that is timed
NEW = 24  # tokens per turn, of which the first comes with the prompt
PROMPT = 384
PEERS = ("Hugging Face", "CTranslate2")


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self):
        self.times = []

    def put(self, tokens) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...

    def seconds(self) -> list[float]:
        """Of every token but the first, which waits for the prompt."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:])]


def run(options: harness.Options) -> list[dict]:
    """The table of `python -m benchmarks generate`: GPT-2 with 124 M parameters."""
    torch.manual_seed(0)
    chosen = [name for name in FORMATS if options.cases in name]
    if not chosen:
        raise SystemExit(f"--cases {options.cases!r} matches none of {', '.join(FORMATS)}")
    probe = torch.ones(2**27)
    rows = []
    for name in tqdm(chosen, unit="format", file=sys.stderr, leave=False):
        model = our_model(name)
        peers = peers_of(name, model, all_of_them=options.peers)
        rows += [decoding(name, model, peers, context, probe, options.seconds) for context in CONTEXTS]
        rows.append(prefill(name, model, peers))
    if options.plot:
        plot(rows, options.plot)
    return rows


def our_model(name: str) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(GPT2Config.from_name("gpt2")).eval()
    if name.startswith("int"):
        quantize(model, name)
        return model
    return model.to(harness.DTYPES[name])


def bytes_per_token(model: GPT2LMHeadModel, context: int) -> int:
    config, dtype = model.config, model.transformer.ln_f.weight.dtype
    return model.step_model().nbytes + 2 * config.n_layer * config.n_embd * context * dtype.itemsize


# A peer: token ids (1, s) and a number of new tokens to the seconds that each new token after the first took.
Peer = Callable[[torch.Tensor, int], list[float]]


def ours(model: GPT2LMHeadModel) -> Peer:
    def tokens(ids: torch.Tensor, n: int) -> list[float]:
        clock = Clock()
        model.generate(ids, max_new_tokens=n, eos_token_id=[], streamer=clock)
        return clock.seconds()

    return tokens


def peers_of(name: str, model: GPT2LMHeadModel, *, all_of_them: bool) -> dict[str, Peer]:
    """Those that have this format, with the weights of `model` where it has them."""
    peers = {}
    if name in harness.DTYPES and importlib.util.find_spec("transformers"):
        peers["Hugging Face"] = hugging_face(model)
    if all_of_them and importlib.util.find_spec("ctranslate2"):
        import ctranslate2

        if name in ctranslate2.get_supported_compute_types("cpu"):
            peers["CTranslate2"] = ctranslate2_model(name)
    return peers


def hugging_face(model: GPT2LMHeadModel) -> Peer:
    import transformers

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_dict()))
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs = theirs.to(model.dtype).eval()

    def tokens(ids: torch.Tensor, n: int) -> list[float]:
        clock = Clock()
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        theirs.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
        return clock.seconds()

    return tokens


def ctranslate2_model(name: str) -> Peer:
    """Random weights in CTranslate2's layout; int8 ones are made of float32 as it loads them."""
    import ctranslate2
    import transformers
    from ctranslate2.converters import transformers as converters

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    spec = converters.GPT2Loader().get_model_spec(theirs)
    spec.register_vocabulary([str(i) for i in range(theirs.config.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    with tempfile.TemporaryDirectory() as folder:
        spec.validate()
        spec.optimize(quantization=None)
        spec.save(folder)
        generator = ctranslate2.Generator(
            folder, device="cpu", compute_type=name, intra_threads=torch.get_num_threads(), inter_threads=1
        )

    def tokens(ids: torch.Tensor, n: int) -> list[float]:
        times = []
        prompt = [str(i) for i in ids[0].tolist()]
        options = {"max_length": n, "min_length": n, "sampling_topk": 1}
        for _ in generator.generate_tokens(prompt, **options):
            times.append(time.perf_counter())
        return [b - a for a, b in zip(times, times[1:])]

    return tokens


def decoding(name: str, model, peers: dict[str, Peer], context: int, probe: torch.Tensor, seconds: float) -> dict:
    """Tokens per second with `context` tokens before the last, in turn with the peers and a reading of memory."""
    ids = torch.randint(model.config.vocab_size, (1, max(8, context - NEW)))
    taken = {"ours": [], **{peer: [] for peer in peers}}
    reading = []
    end = None
    while end is None or time.perf_counter() < end or len(taken["ours"]) < 3 * NEW:
        for competitor, tokens in {"ours": ours(model), **peers}.items():
            times = tokens(ids, NEW)
            if end is not None:
                taken[competitor] += times
        for _ in range(3):
            start = time.perf_counter()
            probe.sum()
            reading.append(time.perf_counter() - start)
        end = end or time.perf_counter() + seconds  # the first turn warms up
    medians = {competitor: statistics.median(times) for competitor, times in taken.items()}
    rate = probe.nbytes / harness.Timing.of(reading).p10
    size = bytes_per_token(model, ids.shape[1] + NEW // 2)
    row = {"name": f"decoding, {name}, context {context}", "unit": "tokens/s"}
    row |= {competitor: round(1 / median, 1) for competitor, median in medians.items()}
    if peers:
        row["ratio"] = round(min(medians[peer] for peer in peers) / medians["ours"], 2)
    row |= {"MB/token": round(size / 1e6, 1), "GB/s": round(size / medians["ours"] / 1e9, 1)}
    return row | {"read GB/s": round(rate / 1e9, 1), "% of floor": round(100 * size / rate / medians["ours"], 1)}


@torch.no_grad()
def prefill(name: str, model, peers: dict[str, Peer]) -> dict:
    """Prompt tokens per second, up to the first new token."""
    ids = torch.randint(model.config.vocab_size, (1, PROMPT))
    timing = harness.interleaved({"ours": lambda: model(ids, use_cache=True, logits_to_keep=1)}, 0.5, least=3)["ours"]
    return {"name": f"prompt of {PROMPT}, {name}", "unit": "tokens/s", "ours": round(PROMPT / timing.median, 1)}


def plot(rows: list[dict], path: Path) -> None:
    """Bars of the tokens per second, and the floor as a line above ours."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = [row for row in rows if "% of floor" in row]
    names = [name for name in ("ours", *PEERS) if any(name in row for row in lines)]
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(names)
    for i, competitor in enumerate(names):
        at = [j + (i - (len(names) - 1) / 2) * width for j, row in enumerate(lines) if competitor in row]
        axes.bar(at, [row[competitor] for row in lines if competitor in row], width, label=competitor)
    floors = [row["ours"] / row["% of floor"] * 100 for row in lines]
    axes.hlines(floors, [i - 0.45 for i in range(len(lines))], [i + 0.45 for i in range(len(lines))], "k", "dashed")
    axes.set_xticks(range(len(lines)), [row["name"].removeprefix("decoding, ").replace(", ", "\n") for row in lines])
    axes.set_ylabel("tokens per second (dashed: what reading allows)")
    axes.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
