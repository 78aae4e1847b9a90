"""Pretraining a GPT from text: corpus, tokenizer, tokens, model, training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..models import GPT2Config, GPT2LMHeadModel
from ..ops.linear_cross_entropy import linear_cross_entropy
from . import checkpoint
from .corpus import find_corpus
from .settings import RunSettings, Settings, resumed
from .tokens import END_OF_TEXT, Windows, held_back_batches, read_tokens, train_tokenizer, write_tokens
from .trainer import Trainer


def pretrain(
    out: str | Path, options: dict, *, resume: bool = False, say: Callable[[str], None] = lambda _: None
) -> dict:
    """Trains a GPT and leaves everything in the folder `out`.

    out holds tokenizer.json, tokens/, checkpoints/step-N/, log.jsonl and loss.png.
    options: fields of Settings. With resume=True the run in `out` goes on from its newest checkpoint, and options
    may only change how long it runs and what it reports.
    say: gets a line of text at each stage.
    Returns the last figures (step, loss, eval_loss, tokens_per_second ...), the newest checkpoint and `finished`.
    """
    out = Path(out)
    trainer = resumed_trainer(out, options, say) if resume else new_trainer(out, options, say)
    figures = trainer.run()
    return figures | {"out": str(out), "log": str(out / "log.jsonl"), "plot": str(out / "loss.png")}


def new_trainer(out: Path, options: dict, say) -> Trainer:
    settings = Settings(**options)
    settings.check()
    checkpoint.check_new(out)
    configuration(settings, settings.vocab_size, None)
    device = prepare(settings)
    tokenizer, tokens = prepare_tokens(out, settings, say)
    end = tokenizer.token_to_id(END_OF_TEXT)
    torch.manual_seed(settings.seed)
    model = GPT2LMHeadModel(configuration(settings, tokenizer.get_vocab_size(), end)).to(device)
    say(f"model: {model.num_parameters() / 1e6:.2f} M parameters, {settings.tokens_per_step} tokens per step")
    return Trainer(model, tokenizer, Text(tokens, settings), settings, out)


def configuration(settings: Settings, vocab_size: int, end: int | None) -> GPT2Config:
    """The model that the settings describe. Raises for one that cannot be built."""
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout)
    same = ("n_embd", "n_layer", "n_head", "norm", "position", "mlp", "num_kv_heads", "bias")
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=settings.block_size,
        bos_token_id=end,
        eos_token_id=end,
        **dropouts,
        **{name: getattr(settings, name) for name in same},
    )


def resumed_trainer(out: Path, options: dict, say) -> Trainer:
    folder = checkpoint.newest(out)
    progress, saved = checkpoint.read_training(folder)
    settings = resumed(saved, options)
    settings.check()
    device = prepare(settings)
    model = GPT2LMHeadModel.from_pretrained(folder).to(device)
    tokenizer = checkpoint.load_tokenizer(folder)
    trainer = Trainer(model, tokenizer, Text(read_tokens(out / "tokens"), settings), settings, out)
    trainer.restore(folder)
    say(f"resuming after step {progress.step} from {folder}")
    return trainer


class Text:
    """tokens (n,) as windows to learn from; the last eval_fraction of them is held back."""

    unit = "tokens"

    def __init__(self, tokens: np.ndarray, settings: Settings):
        held_back = max(settings.block_size + 1, int(len(tokens) * settings.eval_fraction))
        if len(tokens) - held_back < settings.block_size + 1:
            raise ValueError(
                f"corpus must have more than {2 * settings.block_size + 2} tokens for block_size "
                f"{settings.block_size}, got {len(tokens)}"
            )
        self.settings, self.units_per_sample = settings, settings.block_size
        self.windows = Windows(tokens[:-held_back], settings.block_size, settings.seed)
        self.held_back = tokens[-held_back:]

    def loss(self, model, first: int, n: int) -> torch.Tensor:
        return next_token_loss(model, self.windows.batch(first, n))

    def evaluate(self, model) -> dict[str, float]:
        settings = self.settings
        batches = held_back_batches(self.held_back, settings.block_size, settings.batch_size, settings.eval_windows)
        losses = [(next_token_loss(model, ids).item(), len(ids)) for ids in batches]
        return {"eval_loss": sum(loss * n for loss, n in losses) / sum(n for _, n in losses)}


def next_token_loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each token in ids (b, s + 1) but the first, given those before it."""
    ids = ids.to(model.device)
    hidden = model.transformer(ids[:, :-1], None, None, None, None)  # (b, s, d_model)
    return linear_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:])


def prepare(settings: RunSettings) -> torch.device:
    """Sets the number of threads, notes it in the settings, and chooses the device."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    settings.threads = torch.get_num_threads()
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
    tokenizer = train_tokenizer(corpus, settings.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    with tqdm(total=corpus.size, unit="B", unit_scale=True, desc="tokens", dynamic_ncols=True, leave=False) as bar:
        write_tokens(corpus, tokenizer, out / "tokens", bar.update)
    tokens = read_tokens(out / "tokens")
    say(f"tokens: {len(tokens):,}, vocabulary {tokenizer.get_vocab_size()}")
    return tokenizer, tokens
