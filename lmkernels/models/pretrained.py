"""What the models share: a configuration, and weights that come from and go to Hugging Face's checkpoints."""

import logging
import re
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from . import checkpoint, quantized, trainer
from .checkpoint import Weights, listed

logger = logging.getLogger(__name__)


class PretrainedConfig:
    """The base of the configurations, which are dataclasses with Hugging Face's names and defaults."""

    model_type = ""
    # Hugging Face's Trainer leaves these entries of an output out of what it collects
    keys_to_ignore_at_inference = ["past_key_values"]

    @classmethod
    def from_dict(cls, entries: dict, **overrides):
        """Reads the entries of a config.json; those that do not concern this class are left out.

        overrides: fields that replace what the file says; a name that is no field is a TypeError.
        """
        known = {field.name for field in fields(cls)}
        if unknown := overrides.keys() - known:
            raise TypeError(
                f"from_pretrained() got an unexpected keyword argument {listed(map(repr, sorted(unknown)))}: "
                f"{cls.__name__} has {', '.join(sorted(known))}"
            )
        return cls(**{name: value for name, value in (entries | overrides).items() if name in known})

    @classmethod
    def check_model_type(cls, entries: dict) -> None:
        """Raises for a config.json of another kind of model. A very old one has no model_type: its class tells."""
        names = entries.get("architectures") or []
        if (model_type := entries.get("model_type")) is None:
            if not names or any(str(name).lower().startswith(cls.model_type) for name in names):
                return
            model_type = names[0]
        if model_type != cls.model_type:
            raise ValueError(f"the checkpoint must hold a model of type {cls.model_type!r}, got {model_type!r}")

    def get_text_config(self, decoder: bool | None = None):
        """Itself: Hugging Face's Trainer and pipelines ask for the part of a configuration that is about text."""
        return self

    def to_dict(self) -> dict:
        return {"model_type": self.model_type, **asdict(self)}


class GenerationDefaults(SimpleNamespace):
    """The entries of a generation_config.json as attributes."""

    def to_diff_dict(self) -> dict:
        """Those that are set, under the name by which Hugging Face's pipelines ask for them."""
        return {name: value for name, value in vars(self).items() if value is not None}


class PretrainedModel(nn.Module):
    """A model with Hugging Face's parameter names that reads and writes Hugging Face's checkpoints.

    A subclass ends its __init__ with self.post_init(), and says with these class attributes what its checkpoints are
    like. Names are those of parameters, with base_model_prefix, whether or not the class has it.

    config_class: a dataclass on PretrainedConfig
    base_model_prefix: the attribute that holds the model without its head, and its place in names. Checkpoints may have
        been written with or without it.
    _input_embeddings: the attribute of the model without its head that holds the token embedding
    _keys_to_ignore_on_load_unexpected: regular expressions (searched) for tensors of no use in a checkpoint
    _renames: pairs of a regular expression and its replacement, for names of older checkpoints
    _tied_weights_keys: {parameter: the parameter that it is}, while config.tie_word_embeddings holds. Such a parameter
        is in no state_dict and no file; a file that has it must have it equal.
    _heads: beginnings of names of what depends on the task, for this class and its siblings. Where a checkpoint has
        nothing under one of them, the parameters are initialised, with a warning. What a checkpoint has for another
        task is ignored. All other tensors must be there, and nothing else may be.
    """

    config_class: type[PretrainedConfig]
    base_model_prefix = ""
    main_input_name = "input_ids"
    _input_embeddings = ""
    _keys_to_ignore_on_load_unexpected: tuple[str, ...] = ()
    _keys_to_ignore_on_save = None
    _renames: tuple[tuple[str, str], ...] = ()
    _tied_weights_keys: dict[str, str] = {}
    _heads: tuple[str, ...] = ()

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(f"config must be a {self.config_class.__name__}, got {type(config).__name__}")
        self.config = config
        # what `generate` takes unless the call says otherwise; Hugging Face's generation_config.json
        self.generation_config: GenerationDefaults | None = None
        self.quantization: str | None = None

    def can_generate(self) -> bool:
        """Whether the model has a `generate`: Hugging Face's pipelines ask."""
        return hasattr(self, "generate")

    def post_init(self) -> None:
        """Initialises every module, then ties what is tied: the end of a subclass's __init__."""
        with torch.no_grad():
            self.apply(self._init_weights)
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Fills what `module` itself holds, its children aside: N(0, initializer_range), biases 0, norms 1 and 0.

        Buffers that are not saved are filled here too: a model that is loaded is built without memory first.
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.weight.fill_(1.0)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            module.bias.zero_()

    @property
    def tied_weights(self) -> dict[str, str]:
        """{parameter: the parameter that it is} of this model."""
        return self._tied_weights_keys if self.config.tie_word_embeddings else {}

    def tie_weights(self) -> None:
        for name, source in self.tied_weights.items():
            (module, _, parameter), (source, _, original) = name.rpartition("."), source.rpartition(".")
            setattr(self.get_submodule(module), parameter, getattr(self.get_submodule(source), original))

    def state_dict(self, *args, prefix: str = "", **kwargs):
        """torch's, without what is tied: it is there under the name of what it is tied to."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in self.tied_weights:
            for part in ("", *quantized.PARTS):
                state.pop(f"{prefix}{name}{part}", None)
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, source in self.tied_weights.items():
            for part in ("", *quantized.PARTS):
                if (tensor := state_dict.get(f"{prefix}{source}{part}")) is not None:
                    state_dict.setdefault(f"{prefix}{name}{part}", tensor)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True):
        if mode and self.quantization is not None:
            raise ValueError(
                f"a model whose weights are {self.quantization} is for inference and has no gradients: load the "
                "original without quantize to train it"
            )
        return super().train(mode)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Tells Hugging Face's Trainer that forward takes num_items_in_batch.

        A Trainer asks when it gets the model, which is the time to see to what it will save.
        """
        trainer.save_configuration_too(PretrainedModel)
        return True

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_submodule(self._input_embeddings)

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        self.base_model.set_submodule(self._input_embeddings, embeddings)
        self.tie_weights()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters have; quantised ones count as what they stand for."""
        embeddings = (nn.Embedding, quantized.QuantizedEmbedding) if exclude_embeddings else ()
        excluded = [module for module in self.modules() if isinstance(module, embeddings)]
        left_out = {id(x) for module in excluded for x in (*module.parameters(), *quantized.weights(module))}
        counted = [x for x in self.parameters() if x.requires_grad or not only_trainable]
        counted += [] if only_trainable else quantized.weights(self)
        return sum(x.shape.numel() for x in counted if id(x) not in left_out)

    def get_memory_footprint(self) -> int:
        """Bytes of all parameters and buffers."""
        tensors = [*self.parameters(), *self.buffers(), *quantized.weights(self)]
        return sum(tensor.nbytes for tensor in tensors)

    def save_pretrained(self, path: str | Path, *, max_shard_size: int | str = "50GB") -> None:
        """Writes config.json and model.safetensors into the folder `path`, as Hugging Face lays them out.

        max_shard_size: weights that are larger are spread over several files, with model.safetensors.index.json.
        All files are complete before any takes its name. What is tied is written once.
        """
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        generation_config = None if self.generation_config is None else vars(self.generation_config)
        checkpoint.save(path, self._config_entries(), generation_config, tensors, max_shard_size)

    def save_config(self, path: str | Path) -> None:
        """Writes config.json alone into the folder `path`."""
        checkpoint.save_config(path, self._config_entries())

    def _config_entries(self) -> dict:
        return self.config.to_dict() | {
            "architectures": [type(self).__name__],
            "dtype": str(self.dtype).removeprefix("torch."),
            **quantized.entry(self),
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        quantize: str | None = None,
        **config_overrides,
    ):
        """Loads a checkpoint in evaluation mode.

        path: a folder with config.json and the weights, or a name on the Hugging Face hub, which huggingface_hub
            downloads and keeps
        dtype: of the weights; None or "auto" keeps the checkpoint's
        quantize: "int8" or "int4", for inference: the weights of all linear layers, the head with a token embedding
            that it shares among them, are packed by `lmkernels.quantize_weight`. save_pretrained writes them as they
            are, and from_pretrained maps such a file into memory, without quantising again.
        config_overrides: entries of the configuration that replace the checkpoint's, such as num_labels=2

        Everything is checked before anything is read: ValueError, TypeError or FileNotFoundError names what is wrong
        with the files. Nothing in them is executed.
        """
        quantized.check_kind(quantize)
        dtype = checkpoint.named_dtype(dtype)
        folder = checkpoint.find(path)
        entries = checkpoint.read_config(folder)
        cls.config_class.check_model_type(entries)
        config = cls.config_class.from_dict(entries, **config_overrides)
        packed = quantized.kind_of(entries, quantize)
        generation_config = checkpoint.read_generation_config(folder)
        with torch.device("meta"):
            model = cls(config)
            if packed:
                quantized.quantize(model, packed)
        with Weights(folder) as weights:
            sources, fresh = model._match(weights)
            if dtype is None:
                found = (weights[sources[name]].dtype for name, _ in model.named_parameters() if name in sources)
                dtype = next((dtype for dtype in found if dtype.is_floating_point), torch.float32)
            model.to(dtype).to_empty(device="cpu")
            model.tie_weights()
            with torch.no_grad():
                for name, module in model.named_modules():
                    own = {f"{name}.{parameter}".lstrip(".") for parameter in module._parameters}
                    if own & fresh or module._non_persistent_buffers_set:
                        model._init_weights(module)
                if packed:
                    quantized.map_weights(model, weights, sources)
                for name, parameter in model.named_parameters():
                    if name in sources:
                        parameter.copy_(weights[sources[name]])
        if fresh:
            warnings.warn(
                f"the checkpoint {str(path)!r} has no {listed(sorted(fresh))}: initialised at random, to be trained",
                stacklevel=2,
            )
        if quantize and not packed:
            quantized.quantize(model, quantize)
        if generation_config is not None and model.generation_config is not None:
            model.generation_config = GenerationDefaults(**generation_config)
        return model.eval()

    def _match(self, weights: Weights) -> tuple[dict[str, str], set[str]]:
        """{parameter: the name of its tensor in the checkpoint}, and the parameters of heads that it does not have.

        Raises one error for all that is missing, left over or of another shape.
        """
        prefix = f"{self.base_model_prefix}."
        has_base = hasattr(self, self.base_model_prefix)
        expected = {name if has_base else prefix + name: name for name in self.state_dict()}
        found = self._full_names(weights)
        for name, source in self.tied_weights.items():
            name, source = (x if has_base else prefix + x for x in (name, source))
            if name not in found:
                continue
            if source in found and not torch.equal(weights[found[name]], weights[found[source]]):
                raise ValueError(f"{name} must equal {source} when tie_word_embeddings is true")
            found.setdefault(source, found[name])
            del found[name]

        missing = [name for name in expected if name not in found]
        surplus = [name for name in found if name not in expected]
        absent = [head for head in self._heads if not any(name.startswith(head) for name in found)]
        fresh = {name for name in missing if name.startswith(tuple(absent))}
        ignored = {name for name in surplus if name.startswith(self._heads)}
        complaints = []
        if lost := [expected[name] for name in missing if name not in fresh]:
            complaints.append(f"missing {listed(lost)}")
        if left := [found[name] for name in surplus if name not in ignored]:
            complaints.append(f"not part of the model: {listed(left)}")
        parameters = self.state_dict()
        for name in expected.keys() & found.keys():
            shape, wanted = weights.shape(found[name]), tuple(parameters[expected[name]].shape)
            if shape != wanted:
                complaints.append(f"{found[name]} must be {wanted}, got {shape}{self._shape_hint(name)}")
        if complaints:
            raise ValueError(f"the weights do not fit config.json: {listed(complaints, separator='; ')}")
        if ignored:
            logger.info("not used by %s: %s", type(self).__name__, listed(sorted(found[name] for name in ignored)))
        return {expected[name]: found[name] for name in expected if name in found}, {expected[name] for name in fresh}

    def _full_names(self, names) -> dict[str, str]:
        """{name with base_model_prefix: name in the checkpoint}, without what is of no use."""
        found = {}
        for name in names:
            if any(re.search(pattern, name) for pattern in self._keys_to_ignore_on_load_unexpected):
                continue
            current = name
            for pattern, replacement in self._renames:
                current = re.sub(pattern, replacement, current)
            if current in found:
                raise ValueError(f"the checkpoint has two names of one tensor: {found[current]} and {name}")
            found[current] = name
        prefix = f"{self.base_model_prefix}."
        if any(name.startswith(prefix) for name in found):
            return found
        return {name if name.startswith(self._heads) else prefix + name: source for name, source in found.items()}

    def _shape_hint(self, name: str) -> str:
        """What explains the shape of a head."""
        num_labels = getattr(self.config, "num_labels", None)
        return f" (num_labels is {num_labels})" if num_labels and name.startswith(self._heads) else ""
