"""The training loop: AdamW steps, evaluations, checkpoints, and a log."""

import math
import time
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from . import checkpoint
from .checkpoint import Progress
from .interrupt import StopRequest
from .report import Log, plot_losses
from .settings import RunSettings, learning_rate


def adamw(model, settings: RunSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices and leaves biases and norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


class Data(Protocol):
    """What a run learns from: samples by number, so that a run goes on where it stopped without replaying anything."""

    unit: str  # what its speed counts, such as "tokens"
    units_per_sample: int

    def loss(self, model, first: int, n: int) -> torch.Tensor:
        """The mean loss of samples first .. first + n - 1, which repeat for ever in an order of the seed."""

    def evaluate(self, model) -> dict[str, float]:
        """Figures of the data that is held back, eval_loss among them; the same samples each time."""


class Trainer:
    """Trains `model` on `data` and keeps its files in the folder `out`.

    Everything that decides the next step is in the model, the optimizer, torch's generator and `progress`; a checkpoint
    holds these four.
    """

    def __init__(self, model, tokenizer: Tokenizer, data: Data, settings: RunSettings, out: Path):
        self.model, self.tokenizer, self.data, self.settings, self.out = model, tokenizer, data, settings, out
        self.units_per_step = settings.windows_per_step * data.units_per_sample
        self.rate = f"{data.unit}_per_second"
        self.optimizer = adamw(model, settings)
        self.progress = Progress()

    def restore(self, folder: Path) -> None:
        """Takes up the run where the checkpoint `folder`, from which the model was loaded, left it."""
        self.progress, _ = checkpoint.read_training(folder, type(self.settings))
        checkpoint.restore(folder, self.model, self.optimizer)

    def run(self) -> dict:
        """Trains to the end, or until Ctrl-C; saves a checkpoint in both cases. Returns the last figures."""
        first = self.progress.step
        first_second = self.progress.seconds
        last = {"loss": None, "eval_loss": None, self.rate: None}
        with closing(Log(self.out / "log.jsonl", first)) as log, StopRequest() as stop, self.bar() as bar:
            while not self.finished() and not stop.requested:
                figures = self.timed_step()
                units = (self.progress.step - first) * self.units_per_step
                last |= {"loss": figures["loss"], self.rate: round(units / (self.progress.seconds - first_second), 1)}
                log.write(step=self.progress.step, seconds=round(self.progress.seconds, 3), **figures)
                if self.progress.step % self.settings.eval_every == 0 or self.finished():
                    figures = self.evaluate()
                    last |= figures
                    log.write(step=self.progress.step, **figures)
                    self.plot()
                if self.progress.step % self.settings.save_every == 0:
                    self.save()
                self.show(bar, last)
            folder = self.save()
            self.plot()
        return {
            "finished": self.finished(),
            "step": self.progress.step,
            "steps_this_run": self.progress.step - first,
            **last,
            "checkpoint": str(folder),
        }

    def finished(self) -> bool:
        if self.settings.minutes is not None:
            return self.progress.seconds >= 60 * self.settings.minutes
        return self.progress.step >= self.settings.steps

    def timed_step(self) -> dict:
        start = time.perf_counter()
        figures = self.step()
        seconds = time.perf_counter() - start
        self.progress.seconds += seconds
        return figures | {self.rate: round(self.units_per_step / seconds, 1)}

    def step(self) -> dict:
        """One optimizer step over grad_accum batches. Returns its loss, learning rate and gradient norm."""
        settings, progress, device = self.settings, self.progress, self.model.device
        self.model.train()
        loss = torch.zeros((), device=device)
        for _ in range(settings.grad_accum):
            with self.autocast():
                part = self.data.loss(self.model, progress.windows, settings.batch_size) / settings.grad_accum
            part.backward()
            loss += part.detach()
            progress.windows += settings.batch_size
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf)
        loss, norm = loss.item(), norm.item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"training diverged at step {progress.step + 1}: loss {loss}, gradient norm {norm}; "
                "a lower lr or a smaller clip may help, and the checkpoints are intact"
            )
        lr = learning_rate(settings, progress.step, progress.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        return {"loss": loss, "lr": lr, "grad_norm": norm}

    def autocast(self):
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        with self.autocast():
            return self.data.evaluate(self.model)

    def save(self) -> Path:
        return checkpoint.save(
            self.out / "checkpoints", self.model, self.tokenizer, self.optimizer, self.progress, self.settings
        )

    def plot(self) -> None:
        title = f"{type(self.model).__name__}, {self.model.num_parameters() / 1e6:.1f} M parameters"
        plot_losses(self.out / "log.jsonl", self.out / "loss.png", title)

    def bar(self) -> tqdm:
        """A bar over the steps, or over the seconds when time is what ends the run."""
        if self.settings.minutes is None:
            return tqdm(total=self.settings.steps, initial=self.progress.step, unit="step", dynamic_ncols=True)
        form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of training, {remaining} left{postfix}"
        seconds = self.progress.seconds
        return tqdm(total=60 * self.settings.minutes, initial=seconds, bar_format=form, dynamic_ncols=True)

    def show(self, bar: tqdm, last: dict) -> None:
        figures = {"loss": f"{last['loss']:.3f}"}
        if last["eval_loss"] is not None:
            figures["eval"] = f"{last['eval_loss']:.3f}"
        figures[f"{self.data.unit}/s"] = f"{last[self.rate]:,.0f}"
        bar.set_postfix(figures, refresh=False)
        done = self.progress.step if self.settings.minutes is None else self.progress.seconds
        bar.update(min(done, bar.total) - bar.n)
