"""Checkpoints of a run: folders that hold all it takes to go on, or to generate."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.normalizers import BertNormalizer

from .._files import new_folder
from ..models.checkpoint import save_tensors
from .settings import RunSettings, Settings


@dataclass
class Progress:
    """How far a run has come.

    step: optimizer steps done; windows: sequences read so far, the place in the data; seconds: training time.
    """

    step: int = 0
    windows: int = 0
    seconds: float = 0.0


def save(folder: Path, model, tokenizer: Tokenizer, optimizer, progress: Progress, settings: RunSettings) -> Path:
    """Writes folder/step-N as a whole, then removes older checkpoints but the newest settings.keep.

    On failure nothing of the new one remains, and the older ones have not been touched.
    """
    target = folder / f"step-{progress.step:08d}"
    if target.exists():
        return target
    try:
        with new_folder(target) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save(str(temporary / "tokenizer.json"))
            (temporary / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, model)) + "\n")
            save_tensors(training_tensors(model, optimizer), temporary / "training.safetensors")
            entries = {"progress": asdict(progress), "settings": asdict(settings)}
            (temporary / "training.json").write_text(json.dumps(entries, indent=2) + "\n")
    # tokenizers reports a failed write as a bare Exception
    except Exception as error:
        older = all_in(folder)
        last = f"the last good one is {older[-1]}" if older else "there is none yet"
        raise OSError(f"cannot save checkpoint {target}: {error}; {last}") from error
    for old in all_in(folder)[: -settings.keep]:
        shutil.rmtree(old)
    return target


def check_new(out: Path) -> None:
    """Raises unless a run may begin in the folder `out`."""
    if all_in(out / "checkpoints"):
        raise ValueError(f"out must be a new folder, {str(out)!r} holds a run already (resume it, or choose another)")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(out)!r}")


def newest(out: Path) -> Path:
    """The checkpoint from which the run in `out` goes on."""
    if found := all_in(out / "checkpoints"):
        return found[-1]
    raise FileNotFoundError(f"{str(out)!r} holds no checkpoint to resume")


def all_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def find(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run's folder."""
    path = Path(path)
    if (path / "config.json").exists():
        return path
    if checkpoints := all_in(path / "checkpoints"):
        return checkpoints[-1]
    what = "holds no checkpoint" if path.is_dir() else "does not exist"
    raise FileNotFoundError(f"{str(path)!r} {what}: give a folder with config.json or one that a run has written")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer.json of a checkpoint; without one, the WordPiece tokenizer of its vocab.txt, as old BERTs have."""
    folder = Path(folder)
    file, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    try:
        if file.is_file():
            return Tokenizer.from_str(file.read_text())
        if vocabulary.is_file():
            file, options = vocabulary, folder / "tokenizer_config.json"
            entries = json.loads(options.read_text()) if options.is_file() else {}
            return BertWordPieceTokenizer(
                str(vocabulary),
                lowercase=entries.get("do_lower_case", True),
                strip_accents=entries.get("strip_accents"),
                handle_chinese_chars=entries.get("tokenize_chinese_chars", True),
            )._tokenizer
    # tokenizers raises a bare Exception for a file it cannot read
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.txt")


def tokenizer_config(tokenizer: Tokenizer, model) -> dict:
    """What transformers' AutoTokenizer takes from tokenizer_config.json: of tokenizer.json it reads the vocabulary and
    builds the rest anew, for a BERT with small letters unless this says otherwise."""
    context = getattr(model.config, "n_positions", None) or model.config.max_position_embeddings
    config = {"model_max_length": context}
    if isinstance(normalizer := tokenizer.normalizer, BertNormalizer):
        config |= {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer.lowercase,
            "strip_accents": normalizer.strip_accents,
            "tokenize_chinese_chars": normalizer.handle_chinese_chars,
        }
    return config


def training_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """AdamW's moments under `<parameter>.<name>` and the state of torch's generators."""
    tensors = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    tensors["rng.cpu"] = torch.get_rng_state()
    if model.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(model.device)
    return tensors


def read_training(checkpoint: Path, kind: type[RunSettings] = Settings) -> tuple[Progress, RunSettings]:
    """How far the checkpoint's run had come, and what it was told."""
    file = checkpoint / "training.json"
    try:
        entries = json.loads(file.read_text())
        return Progress(**entries["progress"]), kind(**entries["settings"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{checkpoint} has no training.json: it can generate, but not be resumed") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def restore(checkpoint: Path, model, optimizer) -> None:
    """Puts back the optimizer's moments and the state of torch's generators."""
    file = checkpoint / "training.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged or missing: {error}") from None
    rng = {name: tensors.pop(name) for name in ("rng.cpu", "rng.cuda") if name in tensors}
    states = {name: {} for name, _ in model.named_parameters()}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(".")
        states[name][entry] = value
    for name, parameter in model.named_parameters():
        moments = {key: value if key == "step" else value.to(parameter.device) for key, value in states[name].items()}
        # fresh memory: a file's tensors are mapped at any address, and kernels differ in the last bit with alignment
        optimizer.state[parameter] = {key: value.clone() for key, value in moments.items()}
    torch.set_rng_state(rng["rng.cpu"])
    if model.device.type == "cuda" and "rng.cuda" in rng:
        torch.cuda.set_rng_state(rng["rng.cuda"], model.device)
