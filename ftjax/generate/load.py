"""Load a model for inference, optionally with an adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax.config.load import print_note
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import load_adapter
from ftjax.hub.load import check_base, load_base
from ftjax.hub.model_folder import from_source, model_tensors
from ftjax.hub.open import open_adapted, open_base
from ftjax.hub.safetensors import Tensor
from ftjax.methods import method_of
from ftjax.models.model import Model, build_module
from ftjax.models.nn.quantise import quantise
from ftjax.models.nn.quantized import FORMATS

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model with its weights; `path` is the base model's folder or file."""

    model: Model
    params: dict[str, jax.Array]
    path: Path


def choose_dtype(name: str) -> Any:
    """Return the dtype of that name; `auto` is float32 on CPUs, where bfloat16 is not faster, and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise UserError(f"dtype: {name!r} is not known; choose one of auto, {', '.join(DTYPES)}")
    return jnp.dtype(name)


def load(
    model_path: str, adapter: Path | None, mesh: Mesh, dtype: Any, *, revision: str | None = None, merge: bool = True,
    quantization: str | None = None,
) -> Loaded:  # fmt: skip
    """Load a model in `dtype`, with its adapter merged if the method supports that, and otherwise unmerged in float32.

    With `quantization` (`int8`, `nf4`) dense layers are quantised, and an adapter is not merged.

    Raises UserError if the model or the adapter is missing, damaged or not supported.
    """
    if quantization is not None and quantization not in FORMATS:
        raise UserError(f"quantization: {quantization!r} is not known; choose one of {', '.join(FORMATS)}")
    if adapter is None:
        path, config, source = open_base(model_path, revision)
        root = build_module(config)
        if quantization:
            quantise(root, quantization)
        model = Model.of(root, config)
        return Loaded(model, load_base(model, source, mesh, dtype, str(path)), path)
    (path, config, source), root, method = open_adapted(model_path, revision, adapter, note=print_note)
    if quantization:
        quantise(root, quantization)
    model = Model.of(root, config)
    trained = load_adapter(model, adapter, mesh)
    if merge and not quantization and method_of(method).merged is not None:
        check_base(model, source, str(path))
        merged = TensorList(model_tensors(model, from_source(source, trained), trained, method, np.float32))
        plain = Model.of(build_module(config), config)
        return Loaded(plain, load_base(plain, merged, mesh, dtype, str(path)), path)
    return Loaded(model, {**load_base(model, source, mesh, dtype, str(path)), **trained}, path)


class TensorList:
    """A `TensorSource` whose tensors are computed when they are read."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors: Mapping[str, Tensor] = {tensor.name: tensor for tensor in tensors}

    def keys(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        return np.ascontiguousarray(self._tensors[name].data()[tuple(index)])
