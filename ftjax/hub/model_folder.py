"""Writes a merged model as a Hugging Face folder for `AutoModelForCausalLM.from_pretrained`."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax.config import MethodConfig
from ftjax.hub.gather import host_piece
from ftjax.hub.load import layout_in, open_model, read_block
from ftjax.hub.narrow import narrowed
from ftjax.hub.older_fields import REPLACED, older_fields
from ftjax.hub.safetensors import Tensor, write_model
from ftjax.hub.source import TensorSource
from ftjax.methods import method_of
from ftjax.models.composite import text_of, with_text
from ftjax.models.model import Model
from ftjax.models.nn.param import Piece, Spec
from ftjax.models.registry import FAMILIES

# Files about the inputs of a composite model's other parts
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

# (parameter, piece of it) -> one Hugging Face tensor of the base model
ReadWeight = Callable[[Spec, Piece], np.ndarray]


def from_params(params: Mapping[str, jax.Array]) -> ReadWeight:
    """Return a reader of the weights on the devices."""
    return lambda spec, piece: host_piece(params[spec.path], piece.index, piece.shape)()


def from_source(source: TensorSource, trained: Mapping[str, jax.Array]) -> ReadWeight:
    """Return a reader of the weights as stored on disk, one at a time, except trained ones."""
    on_device = from_params(trained)
    have = set(source.keys())

    def read(spec: Spec, piece: Piece) -> np.ndarray:
        if spec.path in trained:
            return on_device(spec, piece)
        if piece.name in have:
            return source.read(piece.name)
        index = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in piece.index)
        return read_block(spec, source, index, layout_in(spec, have)).reshape(piece.shape)

    return read


def model_tensors(
    model: Model, read: ReadWeight, trained: Mapping[str, jax.Array], config: MethodConfig, dtype
) -> list[Tensor]:
    """Yield the base model's tensors under Hugging Face's names, with the adapter merged in float32, then rounded to
    `dtype`.

    Args:
        trained: at least the adapter's parameters, by path.
    """
    merge = method_of(config).merged
    dtype = np.dtype(dtype)

    def fetch(path: str, index: tuple) -> np.ndarray:
        return host_piece(trained[path], index)()

    def kept(spec: Spec) -> np.dtype:
        return np.dtype(np.float32) if spec.row.float32 else dtype

    def data(spec: Spec, piece: Piece):
        def one() -> np.ndarray:
            weight = read(spec, piece)
            if merge is not None:
                index = tuple(i for i in piece.index if isinstance(i, int))  # of the layer, and of the expert
                weight = merge(model, spec.path, index, weight, fetch)
            return narrowed(piece.name, weight, kept(spec))

        return one

    return [
        Tensor(piece.name, piece.shape, kept(spec), data(spec, piece))
        for spec in model.specs.values()
        if not spec.row.adapter
        for piece in spec.written()
    ]


def _tagged(value: Any) -> Any:
    """Return the value with infinite numbers, which JSON lacks, as transformers writes them."""
    if isinstance(value, Mapping):
        return {key: _tagged(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(inner) for inner in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value


def write_config(folder: Path, config: Mapping, dtype: str, source: Path) -> None:
    """Write config.json with the fields of transformers 5 and 4, and generation_config.json from the source or from
    `config`."""
    from transformers import CONFIG_MAPPING

    whole = {**with_text(config, dtype=dtype), "dtype": dtype}
    written = CONFIG_MAPPING[config["model_type"]].from_dict(whole).to_diff_dict()
    written.pop("_name_or_path", None)
    fields = {**written, **older_fields(written)}
    fields.pop(REPLACED.get(config["model_type"]), None)
    text = json.dumps(_tagged(fields), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    generation = source / "generation_config.json"
    if source.is_dir() and generation.is_file():
        shutil.copyfile(generation, folder / "generation_config.json")
    else:
        text = text_of(config)
        ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if text.get(key) is not None}
        (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n")
    for name in PROCESSORS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def carried_tensors(model: Model, source: Path) -> list[Tensor]:
    """Return the tensors of the base model's folder that the model does not use, as stored there."""
    if not model.carried:
        return []
    _, stored = open_model(source)
    return [
        Tensor(name, tuple(stored.shape(name)), stored.dtype(name), partial(stored.read, name))
        for name in stored.keys()
        if name.startswith(model.carried)
    ]


def write_folder(folder: Path, model: Model, tensors: Iterable[Tensor], dtype: str, source: Path) -> None:
    """Write config.json, generation_config.json and the weights, in shards of at most 5 GB, with those that the model carries.

    Args:
        dtype: `float32`, `bfloat16` or `float16`, the dtype on disk.
        source: the base model's folder or file.
    """
    write_config(folder, model.config, dtype, source)
    composite = FAMILIES[model.config["model_type"]].composite
    found = [*tensors, *carried_tensors(model, source)]
    write_model(folder, found if composite is None else [one._replace(name=composite.in_file(one.name)) for one in found])
