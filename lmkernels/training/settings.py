"""What a run is told: dataclasses that the command line, the checkpoint and the trainer share."""

import math
from dataclasses import dataclass, field, fields


def option(default, text: str, only: str | None = None):
    """A field with its help; only: the objective that it belongs to."""
    return field(default=default, metadata={"help": f"{only}: {text}" if only else text, "only": only})


@dataclass
class RunSettings:
    """What every run has, whatever it learns from."""

    batch_size: int = option(16, "sequences per forward pass")
    grad_accum: int = option(1, "forward passes per step")
    steps: int | None = option(1000, "optimizer steps")
    minutes: float | None = option(None, "train for so long instead of a number of steps")
    lr: float = option(1e-3, "highest learning rate")
    min_lr: float = option(1e-4, "learning rate at the end")
    schedule: str = option("cosine", "how the rate falls after the warm-up: cosine or linear")
    warmup: int = option(50, "steps of linear warm-up")
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices only")
    beta2: float = option(0.95, "AdamW's memory of squared gradients")
    clip: float = option(1.0, "largest norm of the gradient, 0 for no limit")
    dtype: str = option("float32", "float32, or bfloat16 for autocast")
    matmul_precision: str | None = option(
        None, "of float32 products: highest, high or medium, as torch names them; default: what torch is set to"
    )
    eval_every: int = option(100, "steps between evaluations")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(2, "checkpoints that stay on the disk")
    seed: int = option(0, "of the weights, the data order and dropout")
    device: str = option("auto", "cpu, cuda or auto")
    threads: int | None = option(None, "CPU threads; default: torch's choice")

    def check(self) -> None:
        """Raises for values that cannot be trained with."""
        for name in ("batch_size", "grad_accum", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "minutes", "threads"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("lr", "min_lr", "weight_decay", "clip", "warmup", "seed"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {self.beta2}")
        for name, choices in (
            ("schedule", ("cosine", "linear")),
            ("dtype", ("float32", "bfloat16")),
            ("matmul_precision", ("highest", "high", "medium")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            if (value := getattr(self, name)) not in choices and not (value is None and name == "matmul_precision"):
                raise ValueError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.grad_accum


@dataclass
class Settings(RunSettings):
    """All options of a pretraining run, with defaults that train a small model in minutes on a laptop."""

    objective: str = option("clm", "clm: a GPT predicts the next token; mlm: a BERT predicts hidden tokens")
    corpus: list[str] = field(
        default_factory=list,
        metadata={"help": "text files or folders; default: the source of Python's standard library"},
    )
    corpus_mb: float | None = option(None, "read at most so many megabytes of the corpus")
    eval_fraction: float = option(0.05, "part of the tokens that is held back for evaluation")
    eval_windows: int = option(64, "sequences per evaluation")
    vocab_size: int = option(4096, "tokens of the BPE (clm) or WordPiece (mlm) that is trained on the corpus")
    n_layer: int = option(4, "transformer blocks")
    n_head: int = option(4, "attention heads")
    n_embd: int = option(256, "width of the model")
    block_size: int = option(256, "tokens of context")
    norm: str = option("layer_norm", "layer_norm or rms_norm", only="clm")
    position: str = option("learned", "learned or rotary positions", only="clm")
    mlp: str = option("plain", "plain or swiglu feed-forward layers", only="clm")
    num_kv_heads: int | None = option(
        None, "heads of keys and values, shared by groups of heads; default: n_head", only="clm"
    )
    bias: bool = option(True, "biases in layers and layer norms", only="clm")
    mlm_probability: float = option(0.15, "part of the tokens that is to be predicted", only="mlm")
    lowercase: bool = option(True, "small letters only, and no accents", only="mlm")
    dropout: float = option(0.0, "dropout probability")

    def check(self) -> None:
        super().check()
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size", "eval_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.corpus_mb is not None and not 0 < self.corpus_mb < math.inf:
            raise ValueError(f"corpus_mb must be positive, got {self.corpus_mb}")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie in (0, 1), got {self.eval_fraction}")
        if self.objective not in ("clm", "mlm"):
            raise ValueError(f"objective must be clm or mlm, got {self.objective!r}")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must lie in (0, 1), got {self.mlm_probability}")
        if self.objective == "mlm" and self.block_size < 4:
            raise ValueError(f"block_size must be at least 4 for mlm, got {self.block_size}")
        for f in fields(self):
            foreign = f.metadata.get("only") not in (None, self.objective)
            if foreign and (value := getattr(self, f.name)) != f.default:
                raise ValueError(f"{f.name} must be left out for objective {self.objective}, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head = {self.n_head}, got {self.n_embd}")

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.block_size


@dataclass
class FinetuneSettings(RunSettings):
    """All options of a fine-tuning run; the defaults are those that BERT is usually given."""

    task: str = option("", "text-classification, token-classification or question-answering")
    model: str = option("", "checkpoint to start from: a folder, or a name on the Hugging Face hub")
    train: str = option("", "file of training data")
    eval: str | None = option(None, "file of held-back data; default: a tenth of the training data, drawn by the seed")
    epochs: float = option(3.0, "passes over the training data")
    max_length: int = option(384, "tokens per sequence; longer text is cut (question answering: read in windows)")
    stride: int = option(128, "question answering: tokens that two windows of one text share")
    steps: int | None = option(None, "optimizer steps, instead of epochs")
    lr: float = option(5e-5, "highest learning rate")
    min_lr: float = option(0.0, "learning rate at the end")
    schedule: str = option("linear", "how the rate falls after the warm-up: cosine or linear")
    warmup: int | None = option(None, "steps of linear warm-up; default: a tenth of all")
    weight_decay: float = option(0.01, "AdamW's weight decay, on matrices only")
    beta2: float = option(0.999, "AdamW's memory of squared gradients")

    def check(self) -> None:
        super().check()
        for name in ("epochs", "max_length", "stride"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.stride >= self.max_length:
            raise ValueError(f"stride must be below max_length = {self.max_length}, got {self.stride}")


# options that may change when a run is resumed: they decide how long it goes on and what it reports
RESUMABLE = {"steps", "minutes", "eval_every", "save_every", "keep", "threads", "device"}


def resumed(saved: RunSettings, changes: dict) -> RunSettings:
    """The settings of a run that goes on: the saved ones with `changes`, which may only touch RESUMABLE."""
    for name, value in changes.items():
        if name not in RESUMABLE and value != getattr(saved, name):
            raise ValueError(f"{name} cannot change when a run is resumed: it was {getattr(saved, name)}, got {value}")
    # a new limit of one kind replaces the old one of the other kind
    limits = {} if changes.keys().isdisjoint({"steps", "minutes"}) else {"steps": None, "minutes": None}
    values = {f.name: getattr(saved, f.name) for f in fields(saved)}
    return type(saved)(**(values | limits | changes))


def learning_rate(settings: RunSettings, step: int, seconds: float) -> float:
    """Linear warm-up to lr, then half a cosine or a line down to min_lr at the last step or the last second.

    step: steps done so far; seconds: training time so far.
    """
    warm = min(1.0, (step + 1) / (settings.warmup + 1))
    if settings.minutes is not None:
        progress = seconds / (60 * settings.minutes)
    else:
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    progress = min(max(progress, 0.0), 1.0)
    left = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return warm * (settings.min_lr + (settings.lr - settings.min_lr) * left)
