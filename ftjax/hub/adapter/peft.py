"""Reads and writes adapter folders: `adapter_config.json` beside one safetensors file.

The method determines their contents (`ftjax.methods.method`): mostly what PEFT writes, where a key is `base_model.model.`
plus the Hugging Face name from the parameter's row.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from pydantic import BaseModel, NonNegativeInt, ValidationError

from ftjax.config import LoraConfig, MethodConfig
from ftjax.errors import UserError
from ftjax.hub.adapter.file import AdapterFile, Renamed
from ftjax.hub.gather import host_piece
from ftjax.hub.load import init_params, load_params
from ftjax.hub.safetensors import Tensor, write_file
from ftjax.mesh import sharding
from ftjax.methods import METHODS, method_named, method_of
from ftjax.methods.lora_experts import from_file, is_of_experts, to_file
from ftjax.methods.lora_targets import adapted_modules
from ftjax.methods.method import Fetch, Method, Start, Stored
from ftjax.methods.save import train
from ftjax.methods.saved_keys import refuse_unknown, without_newer
from ftjax.methods.tied import on_embedding
from ftjax.methods.token_rows import DELTA
from ftjax.methods.walk import describe
from ftjax.models.facts import read_object
from ftjax.models.model import Model
from ftjax.models.nn.param import specs, variables
from ftjax.models.nn.quantized import Quantized

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # prefix of the base model's modules in PEFT's files


def fetch_from(params: Mapping[str, jax.Array]) -> Fetch:
    """Return a function that fetches parts of these parameters to the host, dequantised."""

    def fetch(path: str, index: tuple) -> np.ndarray:
        value = params[path]
        if isinstance(value, Quantized):
            return np.asarray(jax.tree.map(lambda leaf: leaf[index], value).dequantise(jnp.float32))
        return host_piece(value, index)()

    return fetch


def adapter_tensors(model: Model, params: Mapping[str, jax.Array], config: MethodConfig) -> list[Tensor]:
    """Yield the tensors of an adapter's file, in float32: everything that is trained, unless the method says otherwise."""
    method = method_of(config)
    if method.stored is not None:
        stored = list(method.stored(config, model, fetch_from(params)))
    else:
        stored = [
            Stored(method.file_name(model, spec, piece), piece.shape, host_piece(params[path], piece.index, piece.shape))
            for path, spec in model.trainable.items()
            for piece in spec.pieces()
        ]
    return [Tensor(name, shape, np.dtype(np.float32), data) for name, shape, data in stored]


def write_adapter(folder: Path, model: Model, params: Mapping[str, jax.Array], config: MethodConfig, base_model: str) -> None:
    """Write a folder for `peft.PeftModel.from_pretrained`, or for the library of the method's format.

    Args:
        base_model: the value of `base_model_name_or_path`: a Hub id or a folder.
    """
    method = method_of(config)
    settings = without_newer(method.saved_config(config, base_model, model))
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    write_file(folder / method.weights_file, adapter_tensors(model, params, config))


def start_adapter(
    model: Model, base: Mapping[str, jax.Array], config: MethodConfig, mesh: Mesh, seed: int, tokenize: Callable
) -> dict[str, jax.Array]:
    """Return a method's new parameters at the start of training.

    Args:
        base: the base model's parameters, from which some methods initialise theirs.
        tokenize: text -> ids, for prompts initialised from a text.
    """
    new = {path: spec for path, spec in model.specs.items() if spec.row.adapter}
    params = init_params(new, mesh, seed)
    method = method_of(config)
    if method.start is not None:
        values = method.start(config, model, Start(fetch_from({**base, **params}), tokenize, seed))
        for path, value in values.items():
            where = sharding(mesh, path, value.shape, model.specs[path].row.axes)
            value = np.asarray(value, model.specs[path].dtype)
            params[path] = jax.make_array_from_callback(value.shape, where, lambda index, value=value: value[index])
    return params


def read_adapter_config(folder: Path) -> dict:
    """Read adapter_config.json. Raises UserError if the folder is not an adapter's."""
    path = folder / CONFIG
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: expected an adapter folder with {CONFIG}; found {found}")
    saved = read_object(path)
    try:
        _ReadEarly.model_validate(saved)
    except ValidationError as error:
        raise _not_valid(path, error) from None
    return saved


class _ReadEarly(BaseModel):
    """Keys that are read before the method checks its own."""

    base_model_name_or_path: str | None = None
    model_name: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = None


def _not_valid(path: Path, error: ValidationError) -> UserError:
    """Return the message for values of adapter_config.json: each once, with what was found."""
    found = "; ".join(f"{'.'.join(map(str, one['loc']))} = {one['input']!r}: {one['msg']}" for one in error.errors())
    return UserError(f"{path}: {found}")


def method_that_reads(folder: Path, saved: Mapping) -> Method:
    """Return the method that reads this `adapter_config.json`. Raises UserError if there is none."""
    known = [method_named(name) for name in METHODS]
    found = next((method for method in known if method.reads(saved)), None)
    if found is None:
        if "peft_type" not in saved:
            raise UserError(
                f"{folder / CONFIG}: it has no peft_type, so it is not an adapter of PEFT's, and its config is none of the "
                f"bottlenecks of AdapterHub's that are supported: seq_bn, double_seq_bn, par_bn"
            )
        kinds = ", ".join(method.kind for method in known if method.kind)
        raise UserError(f"{folder}: peft_type {saved['peft_type']!r} is not supported; those that are: {kinds}")
    return found


def settings_of(folder: Path, method: Method, saved: Mapping, config: MethodConfig | None = None) -> MethodConfig:
    """Return the settings in an adapter folder's configuration. Raises UserError for options that ftjax does not support."""
    where = f"{folder / CONFIG}"
    try:
        if method.known is not None:
            refuse_unknown(where, saved, method.known)
        return method.from_saved(config or method.config(adapter_path=str(folder)), dict(saved))
    except ValidationError as error:
        raise _not_valid(folder / CONFIG, error) from None
    except KeyError as error:
        raise UserError(f"{where}: it lacks {error.args[0]!r}; save the adapter again, with PEFT") from None


def attach_adapter(root: nnx.Module, folder: Path, config: MethodConfig | None = None) -> MethodConfig:
    """Attach an adapter's layers to an abstract model in place; return the settings.

    The model's notes receive what the settings name but the model or the file lacks.

    Args:
        config: of a run that starts from the folder. Raises UserError if it is for another method.
    """
    saved = read_adapter_config(folder)
    method = method_that_reads(folder, saved)
    if config is not None and not isinstance(config, method.config):
        raise UserError(f"method.adapter_path: {folder} holds {method.kind}, but method.name is {config.name}")
    settings, have = settings_of(folder, method, saved, config), set(adapter_file(folder, method).keys())
    refuse_single_experts(folder, have)
    try:
        if isinstance(settings, LoraConfig):
            settings = with_updates_of(root, settings, saved, have)
        method.attach(root, settings)
    except re.error as error:
        raise UserError(f"{folder / CONFIG}: {error.pattern!r} is not a regular expression: {error}") from None
    except UserError as error:  # it speaks of ftjax's configuration, but the folder may come from elsewhere
        text = str(error).removeprefix("method: ").replace("method.", "")
        raise UserError(f"{folder / CONFIG}: {text}") from None
    # PEFT also saves resized embeddings, without recording it in its configuration.
    beside = {
        path
        for path, spec in specs(root).items()
        if "vocab" in spec.row.axes and all(f"{PREFIX}{piece.name}" in have for piece in spec.pieces())
    }
    for path, variable in variables(root):
        if path in beside and not variable.row.trainable:
            train(variable)
    return settings


def refuse_single_experts(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError for updates of single experts' layers, as adapters trained with transformers 4 have them."""
    found = sorted({match[1] for name in names if (match := re.search(r"\.experts\.\d+\.(\w+)\.lora_", name))})
    if found:
        raise UserError(
            f"{folder}: it adapts single experts ({', '.join(found)} of each), which is not supported; train it without them, "
            "or merge it into its base model with PEFT and give the merged model"
        )


def with_updates_of(root: nnx.Module, config: LoraConfig, saved: Mapping, have: Collection[str]) -> LoraConfig:
    """Return a LoRA folder's settings with the modules as targets that its file updates.

    PEFT starts other targets at zero, and looks up defaults if the configuration has no targets. The model's notes report
    differences.
    """
    stored = {match[1] for name in have if (match := re.match(rf"{re.escape(PREFIX)}(.+)\.lora_(?:embedding_)?A", name))}
    if saved.get("target_modules") is None:
        if config.target_parameters:  # the updates of experts are under the names of their modules
            return config.model_copy(update={"target_modules": []})
        return config.model_copy(update={"target_modules": sorted(stored)})
    wanted = adapted_modules(root, on_embedding(root, config))
    absent = sorted(wanted - stored)
    if not absent or not wanted & stored:
        return config
    root.notes = (*root.notes, f"{config.adapter_path}: its file holds no update of {describe(iter(absent))} ({len(absent)})")
    return config.model_copy(update={"target_modules": sorted(wanted & stored)})


def adapter_file(folder: Path, method: Method | None = None) -> AdapterFile:
    """Open the weights of an adapter folder. Raises UserError if they are missing or pickled."""
    method = method or method_that_reads(folder, read_adapter_config(folder))
    pickles = [name for name in ("adapter_model.bin", "pytorch_adapter.bin") if (folder / name).is_file()]
    if not (folder / method.weights_file).is_file() and pickles:
        raise UserError(f"{folder}: its weights are a pickle ({pickles[0]}), which is never loaded; save as safetensors")
    return AdapterFile(folder, method.weights_file)


class _AsInModel(Renamed):
    """An adapter file under the names of the model's rows; tensors without a row keep their names."""

    def __init__(self, folder: Path, model: Model, method: Method):
        source = adapter_file(folder, method)
        named = {
            method.file_name(model, spec, piece): piece.name for spec in model.trainable.values() for piece in spec.pieces()
        }
        beside = {
            f"{PREFIX}{spec.module}.base_layer.weight": spec
            for spec in model.frozen.values()
            if spec.path.endswith(".base.weight") and not spec.stacked
        }
        found = [name for name in source.keys() if name in beside]
        named |= {name: beside[name].hf_template for name in found}
        super().__init__(source, {named.get(name, name): name for name in source.keys()})
        self.base_layers = {beside[name].path for name in found}
        self._of_experts = {
            piece.name: (spec, piece.shape)
            for spec in model.trainable.values()
            if is_of_experts(spec)
            for piece in spec.pieces()
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; that of experts' matrices as in memory, if the file's fits."""
        found = super().shape(name)
        if name not in self._of_experts:
            return found
        spec, shape = self._of_experts[name]
        return shape if found == to_file(spec, np.empty(shape, np.bool_)).shape else found

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """Read a tensor, experts' matrices in the layout in memory."""
        if name not in self._of_experts:
            return super().read(name, index)
        spec, shape = self._of_experts[name]
        return from_file(spec, super().read(name), shape)[tuple(index)]

    def repeated(self, model: Model, method: Method) -> list[str]:
        """Return tensors that repeat another tensor of the file: a tied output projection, and what the method writes
        twice."""
        tied = [name.removesuffix("weight") for name in model.ignored if name.endswith(".weight")]
        heads = {f"{PREFIX}{name}{layer}weight": f"{model.output}.weight" for name in tied for layer in ("", "base_layer.")}
        heads |= {f"{PREFIX}{name}token_adapter.{DELTA}": f"{model.output}.token_adapter.{DELTA}" for name in tied}
        pairs = [(name, own, self.read) for name, own in heads.items()]
        pairs += [
            (name, model.specs[path].hf_template, lambda own: self.read(own).T) for name, path in method.copies(model).items()
        ]
        both = [pair for pair in pairs if pair[0] in self._names and pair[1] in self._names]
        return [name for name, own, read in both if np.array_equal(self.read(name), read(own))]


def load_adapter(model: Model, folder: Path, mesh: Mesh) -> dict[str, jax.Array]:
    """Load the trained parameters of an adapter folder as float32. Raises UserError if its tensors do not fit the model.

    PEFT saves an embedding with an update under `base_layer.weight`; it replaces the base model's embedding.
    """
    method = method_that_reads(folder, read_adapter_config(folder))
    source = _AsInModel(folder, model, method)
    ignored = (*method.ignored, *source.repeated(model, method))
    held = {path: spec for path, spec in model.frozen.items() if path in source.base_layers}
    try:
        return load_params({**model.trainable, **held}, source, mesh, jnp.float32, where=str(folder), ignored=ignored)
    except UserError as error:
        named = read_adapter_config(folder).get("base_model_name_or_path")
        raise UserError(f"{error}" + (f". It was made on {named}: is that the model that is given?" if named else "")) from None
