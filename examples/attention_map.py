"""Draw where the words of a sentence look: the attention maps of a GPT-2.

    python examples/attention_map.py run "def read(file):" --out map.png               # a panel for each layer
    python examples/attention_map.py run "def read(file):" --layer 0 --out map.png     # a panel for each head of one

The model is a folder that `lmkernels pretrain` made, or any GPT-2 of Hugging Face with its tokenizer.json. Every other
model of theirs gives its maps in the same way:

    lmkernels.hf.register()
    model = AutoModel.from_pretrained(name, attn_implementation="lmkernels")
    with lmkernels.capture_attention() as maps:
        model(**tokenizer(sentence, return_tensors="pt"))
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

import lmkernels
from lmkernels.models import GPT2LMHeadModel
from lmkernels.training.checkpoint import find, load_tokenizer


def attention_maps(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """(layers, heads, s, s): how much token i of a sentence looks at token j."""
    with torch.no_grad(), lmkernels.capture_attention() as maps:
        model(torch.tensor([ids]))
    return torch.cat(maps)


def draw(panels: dict[str, torch.Tensor], tokens: list[str]) -> Figure:
    """A figure with one map (s, s) in each panel; rows are the words that look, columns those looked at."""
    across = math.ceil(math.sqrt(len(panels)))
    down = math.ceil(len(panels) / across)
    side = max(2.4, 0.22 * len(tokens) + 0.8)  # inches
    figure = Figure(figsize=(side * across, side * down), dpi=110, layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flat
    for axes, (title, weights) in zip(places, panels.items()):
        axes.imshow(weights.float().numpy(), cmap="Blues", vmin=0)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=6)
    for axes in list(figure.axes)[len(panels) :]:
        axes.axis("off")
    return figure


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint with its tokenizer, or of a run")
    parser.add_argument("sentence")
    parser.add_argument("--layer", type=int, help="show the heads of this layer, counted from 0")
    parser.add_argument("--out", type=Path, default=Path("attention_map.png"))
    options = parser.parse_args(arguments)

    folder = find(options.model)  # of a run, its newest checkpoint
    tokenizer, model = load_tokenizer(folder), GPT2LMHeadModel.from_pretrained(folder)
    ids = tokenizer.encode(options.sentence).ids
    if not ids:
        parser.error(f"the sentence has no tokens: {options.sentence!r}")
    maps = attention_maps(model, ids)
    if options.layer is None:
        panels = {f"layer {i}, mean of heads": each.mean(0) for i, each in enumerate(maps)}
    elif 0 <= options.layer < len(maps):
        panels = {f"layer {options.layer}, head {i}": each for i, each in enumerate(maps[options.layer])}
    else:
        parser.error(f"--layer must be from 0 to {len(maps) - 1}, got {options.layer}")
    draw(panels, [repr(tokenizer.decode([i]))[1:-1] for i in ids]).savefig(options.out)
    print(f"{options.out}: {len(panels)} maps of {len(ids)} tokens")
    return maps


if __name__ == "__main__":
    main()
