"""Checkpoints as Hugging Face lays them out: config.json and weights, in a folder here or on the hub.

Weights are read from model.safetensors, from shards of it with an index, and from the older pytorch_model.bin, whole or
in shards. They are written as safetensors.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._files import write_files

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
# in order of preference, which is Hugging Face's
WEIGHT_FILES = (WEIGHTS, f"{WEIGHTS}.index.json", PICKLE, f"{PICKLE}.index.json")
WRITTEN = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def find(path: str | Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the local copy of what the Hugging Face hub has under that name.

    A name on the hub is downloaded once; afterwards the hub is not asked any more.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"path must be a folder with {CONFIG} and {WEIGHTS}, got the file {str(path)!r}")
    if not isinstance(path, str) or not HUB_ID.fullmatch(path):
        raise FileNotFoundError(
            f"path must be a folder with {CONFIG} and {WEIGHTS}, or a name on the Hugging Face hub such as 'gpt2' or "
            f"'owner/name', got {str(path)!r}, which is not a folder here"
        )
    return from_hub(path)


def from_hub(name: str) -> Path:
    """The folder of the hub's checkpoint `name` in huggingface_hub's cache, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if (folder / CONFIG).is_file() and has_weights(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    try:
        for weights in (("model.safetensors", "model-*.safetensors", f"{WEIGHTS}.index.json"), ("pytorch_model*",)):
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG, GENERATION_CONFIG, *weights]))
            if has_weights(folder):
                break
    # offline, unknown, private: huggingface_hub and its HTTP client have a class of error for each
    except Exception as error:
        raise FileNotFoundError(
            f"{name!r} is not a folder here, and the Hugging Face hub did not give it ({first_line(error)}). Give the "
            f"folder of a checkpoint that was downloaded, or check the name, the connection and, for a private "
            f"checkpoint, HF_TOKEN"
        ) from error
    return folder


def has_weights(folder: Path) -> bool:
    """Whether a file of weights is there, and every shard that it names."""
    try:
        return all(file.is_file() for file in weight_files(folder))
    except (FileNotFoundError, ValueError):
        return False


def read_config(folder: Path) -> dict:
    """The entries of the folder's config.json."""
    try:
        return read_json(folder / CONFIG)
    except FileNotFoundError:
        raise FileNotFoundError(f"the checkpoint {str(folder)!r} has no {CONFIG}") from None


def read_generation_config(folder: Path) -> dict | None:
    """The entries of the folder's generation_config.json, if it has one."""
    try:
        return read_json(folder / GENERATION_CONFIG)
    except FileNotFoundError:
        return None


def read_json(file: Path) -> dict:
    try:
        entries = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{file} must hold an object, got {type(entries).__name__}")
    return entries


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files that hold the weights, and what an index says is in each (None: there is no index)."""
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(
            f"the checkpoint {str(folder)!r} has no weights: {WEIGHTS}, its shards with an index, or {PICKLE}"
        )
    if not name.endswith(".json"):
        return {folder / name: None}
    places = read_json(folder / name).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / name} is damaged: its weight_map must say which file holds each tensor")
    files = {}
    for tensor, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{folder / name} is damaged: {tensor} must be in a file of the folder, got {file!r}")
        files.setdefault(folder / file, []).append(tensor)
    return files


class Weights(Mapping):
    """The tensors of a checkpoint by name: mapped from its files, and read when they are asked for.

    Every file is opened, and compared with the index, before the first tensor is read. A context manager; tensors stay
    valid after its end.
    """

    def __init__(self, folder: Path):
        self._readers = {}
        with ExitStack() as stack:
            for file, names in weight_files(folder).items():
                if not file.is_file():
                    raise FileNotFoundError(f"the checkpoint {str(folder)!r} lacks {file.name}, which its index names")
                if file.suffix == ".safetensors":
                    reader = stack.enter_context(open_safetensors(file))
                else:
                    reader = read_pickle(file)
                if missing := set(names or ()) - set(reader.keys()):
                    raise ValueError(f"{file} lacks {listed(sorted(missing))}, which its index says are there")
                self._readers |= dict.fromkeys(reader.keys(), reader)
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()

    def __getitem__(self, name: str) -> torch.Tensor:
        reader = self._readers[name]
        return reader[name] if isinstance(reader, dict) else reader.get_tensor(name)

    def __iter__(self):
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def shape(self, name: str) -> tuple[int, ...]:
        reader = self._readers[name]
        return tuple(reader[name].shape if isinstance(reader, dict) else reader.get_slice(name).get_shape())


def open_safetensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated: {error}") from None


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch.save wrote. Nothing in it is executed: a file that holds code is refused."""
    try:
        # files from before torch 1.6 are no zip archives and cannot be mapped
        tensors = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged, or holds code beside its tensors; it was refused, and nothing in it was executed. "
            f"Ask its author for {WEIGHTS} ({first_line(error.__context__ or error)})"
        ) from None
    # torch.load raises whatever its parsers raise
    except Exception as error:
        raise ValueError(f"{file} is damaged or truncated: {first_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError(f"{file} must hold a dict of tensors, as torch.save(model.state_dict(), file) writes it")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def save(
    folder: str | Path, config: dict, generation_config: dict | None, tensors: dict, max_shard_size: int | str
) -> None:
    """Writes a checkpoint. All files are complete before any takes its name; those of an earlier save then vanish."""
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, got the file {str(folder)!r}")
    try:
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except (TypeError, ValueError):
        raise ValueError(
            f"max_shard_size must be bytes or a text such as '5GB' or '200MB', got {max_shard_size!r}"
        ) from None
    writers = {
        file: lambda path, names=names: save_tensors({name: tensors[name] for name in names}, path)
        for file, names in split.filename_to_tensors.items()
    }
    objects = {CONFIG: config}
    if generation_config is not None:
        objects[GENERATION_CONFIG] = generation_config
    if split.is_sharded:
        objects[f"{WEIGHTS}.index.json"] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for name, entries in objects.items():
        writers[name] = lambda path, entries=entries: path.write_text(json.dumps(entries, indent=2) + "\n")
    write_files(folder, writers)
    for file in folder.iterdir():
        if file.name not in writers and WRITTEN.fullmatch(file.name):
            file.unlink()


def save_config(folder: str | Path, config: dict) -> None:
    write_files(Path(folder), {CONFIG: lambda path: path.write_text(json.dumps(config, indent=2) + "\n")})


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """safetensors' save_file, whose failures (a full disk) come out as the OSError they are."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error


def listed(names: Iterable[str], at_most: int = 4, separator: str = ", ") -> str:
    names = list(names)
    rest = f"{separator}and {len(names) - at_most} more" if len(names) > at_most else ""
    return separator.join(names[:at_most]) + rest


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch.float32 from "float32"; "auto" is the checkpoint's own, None."""
    if dtype is None or dtype == "auto":
        return None
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype must be a floating torch dtype such as 'float32' or 'bfloat16', got {dtype!r}")
    return named
