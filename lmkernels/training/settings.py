"""What a pretraining run is told: one dataclass that the command line, the checkpoint and the trainer share."""

import math
from dataclasses import dataclass, field, fields


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """All options of a run, with defaults that train a small model in minutes on a laptop."""

    corpus: list[str] = field(
        default_factory=list,
        metadata={"help": "text files or folders; default: the source of Python's standard library"},
    )
    corpus_mb: float | None = option(None, "read at most so many megabytes of the corpus")
    eval_fraction: float = option(0.05, "part of the tokens that is held back for evaluation")
    vocab_size: int = option(4096, "tokens of the byte-level BPE that is trained on the corpus")
    n_layer: int = option(4, "transformer blocks")
    n_head: int = option(4, "attention heads")
    n_embd: int = option(256, "width of the model")
    block_size: int = option(256, "tokens of context")
    dropout: float = option(0.0, "dropout probability")
    batch_size: int = option(16, "sequences per forward pass")
    grad_accum: int = option(1, "forward passes per step")
    steps: int | None = option(1000, "optimizer steps")
    minutes: float | None = option(None, "train for so long instead of a number of steps")
    lr: float = option(1e-3, "highest learning rate")
    min_lr: float = option(1e-4, "learning rate at the end of the cosine")
    warmup: int = option(50, "steps of linear warm-up")
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices only")
    clip: float = option(1.0, "largest norm of the gradient, 0 for no limit")
    dtype: str = option("float32", "float32, or bfloat16 for autocast")
    eval_every: int = option(100, "steps between evaluations")
    eval_windows: int = option(64, "sequences per evaluation")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(2, "checkpoints that stay on the disk")
    seed: int = option(0, "of the weights, the data order and dropout")
    device: str = option("auto", "cpu, cuda or auto")
    threads: int | None = option(None, "CPU threads; default: torch's choice")

    def check(self) -> None:
        """Raises for values that cannot be trained with."""
        whole = ("vocab_size", "n_layer", "n_head", "n_embd", "block_size", "batch_size", "grad_accum")
        for name in (*whole, "eval_every", "eval_windows", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "minutes", "threads", "corpus_mb"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("lr", "min_lr", "weight_decay", "clip", "warmup", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie in (0, 1), got {self.eval_fraction}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head = {self.n_head}, got {self.n_embd}")

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.grad_accum

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.block_size


# options that may change when a run is resumed: they decide how long it goes on and what it reports
RESUMABLE = {"steps", "minutes", "eval_every", "save_every", "keep", "threads", "device"}


def resumed(saved: Settings, changes: dict) -> Settings:
    """The settings of a run that goes on: the saved ones with `changes`, which may only touch RESUMABLE."""
    for name, value in changes.items():
        if name not in RESUMABLE and value != getattr(saved, name):
            raise ValueError(f"{name} cannot change when a run is resumed: it was {getattr(saved, name)}, got {value}")
    # a new limit of one kind replaces the old one of the other kind
    limits = {} if changes.keys().isdisjoint({"steps", "minutes"}) else {"steps": None, "minutes": None}
    values = {f.name: getattr(saved, f.name) for f in fields(Settings)}
    return Settings(**(values | limits | changes))


def learning_rate(settings: Settings, step: int, seconds: float) -> float:
    """Linear warm-up to lr, then half a cosine down to min_lr at the last step or the last second.

    step: steps done so far; seconds: training time so far.
    """
    warm = min(1.0, (step + 1) / (settings.warmup + 1))
    if settings.minutes is not None:
        progress = seconds / (60 * settings.minutes)
    else:
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    progress = min(max(progress, 0.0), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return warm * (settings.min_lr + (settings.lr - settings.min_lr) * cosine)
