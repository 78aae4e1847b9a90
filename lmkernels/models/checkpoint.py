"""Models as Hugging Face folders: config.json and model.safetensors."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._files import write_files

WEIGHTS = "model.safetensors"


def save(model, path: str | Path) -> None:
    """Writes model.config and the weights into the folder `path`; a tied head is left out."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"path must be a folder, got the file {str(path)!r}")
    entries = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_files(
        path,
        {
            WEIGHTS: lambda file: save_tensors(tensors, file),
            "config.json": lambda file: file.write_text(json.dumps(entries, indent=2) + "\n"),
        },
    )


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """safetensors' save_file, whose failures (a full disk) come out as the OSError they are."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error


def load(model_class, config_class, path: str | Path, dtype: torch.dtype | str | None = None):
    """Builds a model from the folder `path`. Everything is checked before the model exists."""
    path = Path(path)
    config = config_class.from_dict(read_config(path))
    if isinstance(dtype, str):
        dtype = named_dtype(dtype)
    with open_weights(weights_file(path)) as file:
        sources = {}  # parameter -> name in the file
        for key in file.keys():
            if (name := model_class.rename_checkpoint_key(key)) is not None:
                sources[name] = key
        with torch.device("meta"):
            model = model_class(config)
        parameters = model.state_dict()
        if config.tie_word_embeddings:
            del parameters["lm_head.weight"]
            check_tied_head(file, sources)
        check_names_and_shapes(file, sources, parameters)
        if dtype is None:
            dtype = file.get_tensor(next(iter(sources.values()))).dtype
        model.to(dtype).to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for name, parameter in model.state_dict().items():
                if name in sources:
                    parameter.copy_(file.get_tensor(sources[name]))
    return model.eval()


def read_config(path: Path) -> dict:
    """The entries of the folder's config.json."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"path must be a folder with config.json and {WEIGHTS}, got {str(path)!r}, which is not a folder here"
            " (names on the Hugging Face hub are not looked up: download the checkpoint first)"
        )
    try:
        entries = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"the checkpoint {str(path)!r} has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is damaged: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path / 'config.json'} must hold an object, got {type(entries).__name__}")
    return entries


def weights_file(path: Path) -> Path:
    """The folder's model.safetensors."""
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    others = [name for name in (f"{WEIGHTS}.index.json", "pytorch_model.bin") if (path / name).exists()]
    instead = f"; it has {others[0]}, but weights are read from one safetensors file only" if others else ""
    raise FileNotFoundError(f"the checkpoint {str(path)!r} has no {WEIGHTS}{instead}")


def open_weights(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated: {error}") from None


def check_tied_head(file, sources: dict[str, str]) -> None:
    """Drops a head that repeats the embedding, and refuses one that differs from it."""
    head = sources.pop("lm_head.weight", None)
    embedding = sources.get("transformer.wte.weight")
    if head and embedding and not torch.equal(file.get_tensor(head), file.get_tensor(embedding)):
        raise ValueError("lm_head.weight must equal transformer.wte.weight when tie_word_embeddings is true")


def check_names_and_shapes(file, sources: dict[str, str], parameters: dict[str, torch.Tensor]) -> None:
    """Raises one error for everything that is missing, left over or of another shape."""
    complaints = []
    if missing := [name for name in parameters if name not in sources]:
        complaints.append(f"missing {listed(missing)}")
    if surplus := [key for name, key in sources.items() if name not in parameters]:
        complaints.append(f"not part of the model: {listed(surplus)}")
    for name, parameter in parameters.items():
        if name in sources:
            shape = tuple(file.get_slice(sources[name]).get_shape())
            if shape != tuple(parameter.shape):
                complaints.append(f"{sources[name]} must be {tuple(parameter.shape)}, got {shape}")
    if complaints:
        raise ValueError(f"the weights do not fit config.json: {listed(complaints, separator='; ')}")


def listed(names: list[str], at_most: int = 4, separator: str = ", ") -> str:
    rest = f"{separator}and {len(names) - at_most} more" if len(names) > at_most else ""
    return separator.join(names[:at_most]) + rest


def named_dtype(name: str) -> torch.dtype | None:
    """torch.float32 from "float32"; "auto" is the checkpoint's own, None."""
    if name == "auto":
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating torch dtype such as 'float32' or 'bfloat16', got {name!r}")
    return dtype
