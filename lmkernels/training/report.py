"""What a run leaves behind for people: a JSONL log and the plot of its losses."""

import json
from pathlib import Path

from .._files import write_files


class Log:
    """One JSON object per line; a resumed run first forgets the lines after its checkpoint."""

    def __init__(self, path: Path, step: int):
        rows = [row for row in read_log(path) if row["step"] <= step]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_files(path.parent, {path.name: lambda file: file.write_text(lines)})
        self.file = path.open("a")

    def write(self, **entries) -> None:
        self.file.write(json.dumps(entries) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_log(path: Path) -> list[dict]:
    """The log's rows; a last line that was cut short does not count."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_losses(log: Path, image: Path, title: str) -> None:
    """Draws the training loss (each step, and smoothed) and the evaluation loss of a log."""
    from matplotlib.figure import Figure

    rows = read_log(log)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_back = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.5, label="training (smoothed)")
    if held_back:
        axes.plot(*zip(*held_back), color="tab:orange", marker="o", markersize=3.5, label="held back")
    axes.set(xlabel="step", ylabel="cross entropy (nats)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_back:
        axes.legend(frameon=False)
    write_files(image.parent, {image.name: lambda file: figure.savefig(file, format="png")})


def smoothed(values) -> list[float]:
    """Exponential moving average over about 3 % of the run, without the pull of its start (Kingma & Ba 2015)."""
    keep = 1 - 1 / max(2, len(values) / 30)
    average, result = 0.0, []
    for i, value in enumerate(values, 1):
        average = keep * average + (1 - keep) * value
        result.append(average / (1 - keep**i))
    return result
