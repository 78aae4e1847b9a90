"""Pretraining a GPT or a BERT from text: corpus, tokenizer, tokens, model, training."""

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from . import causal, checkpoint, masked
from .corpus import find_corpus
from .settings import RunSettings, Settings, resumed
from .tokens import read_tokens, write_tokens
from .trainer import Trainer

# what a run learns to do: modules with the same names
OBJECTIVES = {"clm": causal, "mlm": masked}


def pretrain(
    out: str | Path, options: dict, *, resume: bool = False, say: Callable[[str], None] = lambda _: None
) -> dict:
    """Trains a GPT (objective "clm") or a BERT ("mlm") and leaves everything in the folder `out`.

    out holds tokenizer.json, tokens/, checkpoints/step-N/, log.jsonl and loss.png.
    options: fields of Settings. With resume=True the run in `out` goes on from its newest checkpoint, and options
    may only change how long it runs and what it reports.
    say: gets a line of text at each stage.
    Returns the last figures (step, loss, eval_loss, tokens_per_second, and of a BERT masked_accuracy ...), the newest
    checkpoint and `finished`.
    """
    out = Path(out)
    trainer = resumed_trainer(out, options, say) if resume else new_trainer(out, options, say)
    figures = trainer.run()
    return figures | {"out": str(out), "log": str(out / "log.jsonl"), "plot": str(out / "loss.png")}


def new_trainer(out: Path, options: dict, say) -> Trainer:
    settings = Settings(**options)
    settings.check()
    checkpoint.check_new(out)
    objective = OBJECTIVES[settings.objective]
    objective.configuration(settings, None)
    device = prepare(settings)
    tokenizer, tokens = prepare_tokens(out, settings, say)
    data = objective.Text(tokens, tokenizer, settings)
    torch.manual_seed(settings.seed)
    model = objective.MODEL(objective.configuration(settings, tokenizer)).to(device)
    name, size = type(model).__name__, model.num_parameters() / 1e6
    say(f"model: {name} with {size:.2f} M parameters, {settings.tokens_per_step} tokens per step")
    return Trainer(model, tokenizer, data, settings, out)


def resumed_trainer(out: Path, options: dict, say) -> Trainer:
    folder = checkpoint.newest(out)
    progress, saved = checkpoint.read_training(folder)
    settings = resumed(saved, options)
    settings.check()
    objective = OBJECTIVES[settings.objective]
    device = prepare(settings)
    model = objective.MODEL.from_pretrained(folder).to(device)
    tokenizer = checkpoint.load_tokenizer(folder)
    data = objective.Text(read_tokens(out / "tokens"), tokenizer, settings)
    trainer = Trainer(model, tokenizer, data, settings, out)
    trainer.restore(folder)
    say(f"resuming after step {progress.step} from {folder}")
    return trainer


def prepare(settings: RunSettings) -> torch.device:
    """Sets the number of threads, notes it in the settings, sets the precision of products and chooses the device."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    settings.threads = torch.get_num_threads()
    if settings.matmul_precision is not None:
        torch.set_float32_matmul_precision(settings.matmul_precision)
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto on this machine, got cuda: torch sees no GPU")
    return torch.device(settings.device)


def prepare_tokens(out: Path, settings: Settings, say) -> tuple:
    """Trains the tokenizer and writes the token file. Returns the tokenizer and the tokens (n,)."""
    limit = None if settings.corpus_mb is None else int(1e6 * settings.corpus_mb)
    corpus = find_corpus(settings.corpus, seed=settings.seed, max_bytes=limit)
    say(f"corpus: {len(corpus.paths)} files, {corpus.size / 1e6:.1f} MB")
    objective = OBJECTIVES[settings.objective]
    tokenizer = objective.train_tokenizer(corpus, settings)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    with tqdm(total=corpus.size, unit="B", unit_scale=True, desc="tokens", dynamic_ncols=True, leave=False) as bar:
        write_tokens(corpus, tokenizer, out / "tokens", bar.update, objective.END)
    tokens = read_tokens(out / "tokens")
    say(f"tokens: {len(tokens):,}, vocabulary {tokenizer.get_vocab_size()}")
    return tokenizer, tokens
