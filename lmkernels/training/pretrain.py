"""Pretraining a GPT from text: corpus, tokenizer, tokens, model, training."""

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from ..models import GPT2Config, GPT2LMHeadModel
from . import checkpoint
from .corpus import find_corpus
from .settings import Settings, resumed
from .tokens import END_OF_TEXT, read_tokens, train_tokenizer, write_tokens
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
    if checkpoint.all_in(out / "checkpoints"):
        raise ValueError(f"out must be a new folder, {str(out)!r} holds a run already (resume it, or choose another)")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(out)!r}")
    device = prepare(settings)
    tokenizer, tokens = prepare_tokens(out, settings, say)
    end = tokenizer.token_to_id(END_OF_TEXT)
    torch.manual_seed(settings.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_positions=settings.block_size,
            n_embd=settings.n_embd,
            n_layer=settings.n_layer,
            n_head=settings.n_head,
            resid_pdrop=settings.dropout,
            embd_pdrop=settings.dropout,
            attn_pdrop=settings.dropout,
            bos_token_id=end,
            eos_token_id=end,
        )
    ).to(device)
    say(f"model: {model.num_parameters() / 1e6:.2f} M parameters, {settings.tokens_per_step} tokens per step")
    return Trainer(model, tokenizer, tokens, settings, out)


def resumed_trainer(out: Path, options: dict, say) -> Trainer:
    found = checkpoint.all_in(out / "checkpoints")
    if not found:
        raise FileNotFoundError(f"{str(out)!r} holds no checkpoint to resume")
    progress, saved = checkpoint.read_training(found[-1])
    settings = resumed(saved, options)
    settings.check()
    device = prepare(settings)
    model = GPT2LMHeadModel.from_pretrained(found[-1]).to(device)
    tokenizer = checkpoint.load_tokenizer(found[-1])
    trainer = Trainer(model, tokenizer, read_tokens(out / "tokens"), settings, out)
    trainer.restore(found[-1])
    say(f"resuming after step {progress.step} from {found[-1]}")
    return trainer


def prepare(settings: Settings) -> torch.device:
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
