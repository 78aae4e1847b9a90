"""Fine-tuning a BERT on labelled data, and evaluating it on more of the same."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tqdm import tqdm

from .. import models
from ..models import checkpoint as model_files
from . import checkpoint
from .pretrain import prepare
from .settings import FinetuneSettings, resumed
from .tasks import TASKS
from .tasks.features import Feature, batch
from .tokens import batched
from .trainer import Trainer


def finetune(
    out: str | Path, options: dict, *, resume: bool = False, say: Callable[[str], None] = lambda _: None
) -> dict:
    """Fine-tunes a checkpoint on a task and leaves checkpoints/step-N/, log.jsonl and loss.png in the folder `out`.

    options: fields of FinetuneSettings; task, model and train are needed. With resume=True the run in `out` goes on
    from its newest checkpoint, and options may only change how long it runs and what it reports.
    say: gets a line of text at each stage.
    Returns the last figures (step, loss, eval_loss, the task's own ...), the newest checkpoint and `finished`.
    """
    check_scorers()
    out = Path(out)
    if resume:
        source = checkpoint.newest(out)
        settings = resumed(checkpoint.read_training(source, FinetuneSettings)[1], options)
    else:
        settings = FinetuneSettings(**options)
        for field in fields(FinetuneSettings):
            if field.name in ("task", "model", "train") and not getattr(settings, field.name):
                raise ValueError(f"{field.name} must be given: {field.metadata['help']}")
        checkpoint.check_new(out)
    settings.check()
    task = task_named(settings.task)
    device = prepare(settings)
    train, held_back = read_data(task, settings)
    if not resume:
        source = find_model(settings.model)
    tokenizer = checkpoint.load_tokenizer(source)
    torch.manual_seed(settings.seed)
    model = load_model(task, source, train + held_back, settings).to(device)
    data = Examples(task, model, tokenizer, train, held_back, settings)
    if settings.steps is None and settings.minutes is None:
        settings.steps = max(1, math.ceil(settings.epochs * len(data.train) / settings.windows_per_step))
    if settings.warmup is None:
        settings.warmup = (settings.steps or 0) // 10
    say(
        f"{settings.task}: {len(train)} examples to learn from, {len(held_back)} held back; "
        f"{type(model).__name__} with {model.num_parameters() / 1e6:.2f} M parameters"
    )
    trainer = Trainer(model, tokenizer, data, settings, out)
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        trainer.restore(source)
        say(f"resuming after step {trainer.progress.step} from {source}")
    figures = trainer.run()
    return figures | {"out": str(out), "log": str(out / "log.jsonl"), "plot": str(out / "loss.png")}


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    stride: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict:
    """The figures of a fine-tuned checkpoint on a file of labelled data: eval_loss, and those of its task.

    model: a folder (a checkpoint, or what a run has left), or a name on the Hugging Face hub
    data: a file in the format that the model's task reads
    max_length: tokens per sequence. None is 384, or what the model has room for
    stride: tokens that two windows of a question's context share. None is 128, or a third of max_length
    Raises ValueError where the checkpoint is for none of the tasks or the data does not fit.
    """
    check_scorers()
    folder = find_model(model)
    config = model_files.read_config(folder)
    names = config.get("architectures") or ["none"]
    task = next((task for task in TASKS.values() if task.MODEL in names), None)
    if task is None:
        wanted = ", ".join(task.MODEL for task in TASKS.values())
        raise ValueError(f"model must be one of {wanted}, got {names[0]} in {str(folder)!r}")
    if max_length is None:
        max_length = min(FinetuneSettings.max_length, config.get("max_position_embeddings", math.inf))
    if stride is None:
        stride = max(1, min(FinetuneSettings.stride, max_length // 3))
    settings = FinetuneSettings(
        batch_size=batch_size, max_length=max_length, stride=stride, device=device, threads=torch.get_num_threads()
    )
    settings.check()
    examples = task.read(data)
    tokenizer = checkpoint.load_tokenizer(folder)
    network = getattr(models, task.MODEL).from_pretrained(folder, dtype=dtype).to(prepare(settings))
    made = Examples(task, network, tokenizer, [], examples, settings)
    with torch.no_grad():
        figures = made.evaluate(network, progress)
    return {"task": task.NAME, "examples": len(examples), **figures}


def find_model(name: str | Path) -> Path:
    """The folder of a checkpoint: `name` itself, the newest one of a run's folder, or a copy of one of the hub."""
    return checkpoint.find(name) if Path(name).exists() else model_files.find(name)


def task_named(name: str) -> ModuleType:
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def check_scorers() -> None:
    missing = [name for name in ("seqeval", "sklearn", "torchmetrics") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} must be installed to score a model: pip install 'lmkernels[finetune]'")


def read_data(task: ModuleType, settings: FinetuneSettings) -> tuple[list, list]:
    """The examples to learn from, and those held back."""
    train = task.read(settings.train)
    if settings.eval is not None:
        return train, task.read(settings.eval)
    order = np.random.default_rng(settings.seed).permutation(len(train))
    held_back = max(1, len(train) // 10)
    if held_back == len(train):
        raise ValueError(f"train must hold two examples or more where eval is not given, got {len(train)}")
    return [train[i] for i in sorted(order[held_back:])], [train[i] for i in sorted(order[:held_back])]


def load_model(task: ModuleType, folder: Path, examples: list, settings: FinetuneSettings):
    """The checkpoint as a model of the task. A classifier that knows the data's labels stays, else it is a new one."""
    overrides = {}
    if (names := task.label_names(examples)) is not None:
        own = model_files.read_config(folder).get("id2label") or {}
        if not set(names) <= set(own.values()):
            overrides = {
                "num_labels": len(names),
                "id2label": dict(enumerate(names)),
                "label2id": {name: i for i, name in enumerate(names)},
            }
    with warnings.catch_warnings():
        # a head that is not there yet is what fine-tuning is for
        warnings.filterwarnings("ignore", message="the checkpoint .* initialised at random")
        model = getattr(models, task.MODEL).from_pretrained(folder, **overrides)
    longest = model.config.max_position_embeddings
    if settings.max_length > longest:
        raise ValueError(
            f"max_length must be at most the model's max_position_embeddings = {longest}, got {settings.max_length}"
        )
    return model


class Examples:
    """A task's examples as the data of a run."""

    unit = "examples"
    units_per_sample = 1

    def __init__(self, task: ModuleType, model, tokenizer, train: list, held_back: list, settings: FinetuneSettings):
        self.task, self.settings, self.held_back = task, settings, held_back
        self.id2label = model.config.id2label
        self.pad_id = model.config.pad_token_id or 0
        label2id = {name: i for i, name in self.id2label.items()}
        self.train, self.test = (
            task.features(examples, tokenizer, label2id, settings.max_length, settings.stride) if examples else []
            for examples in (train, held_back)
        )
        # a checkpoint's tokenizer cuts nothing off
        tokenizer.no_truncation()
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def feature(self, number: int) -> Feature:
        """Every epoch has an order of its own, which depends on nothing but the seed."""
        epoch, place = divmod(number, len(self.train))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.train))
        return self.train[self.order[place]]

    def output(self, model, features: list[Feature]):
        arguments = batch(features, self.pad_id)
        return model(**{name: x.to(model.device) for name, x in arguments.items()})

    def loss(self, model, first: int, n: int) -> torch.Tensor:
        return self.output(model, [self.feature(number) for number in range(first, first + n)]).loss

    def evaluate(self, model, progress: bool = False) -> dict[str, float]:
        total, count, predicted = 0.0, 0, []
        # sequences of a length together: the order of the examples comes back below
        order = sorted(range(len(self.test)), key=lambda i: len(self.test[i].input_ids))
        with tqdm(total=len(order), unit="sequence", dynamic_ncols=True, disable=not progress) as bar:
            for numbers in batched(order, self.settings.batch_size):
                features = [self.test[i] for i in numbers]
                output = self.output(model, features)
                counts = sum(feature.counted for feature in features)
                total, count = total + output.loss.item() * counts, count + counts
                predicted += zip(numbers, self.task.predictions(output, features))
                bar.update(len(features))
        answers = [answer for _, answer in sorted(predicted, key=lambda pair: pair[0])]
        figures = self.task.score(self.held_back, self.test, answers, self.id2label)
        return {"eval_loss": total / count} | figures
