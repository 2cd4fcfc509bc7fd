"""PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, written and read.

A key is `base_model.model.` plus the Hugging Face name that the parameter's row gives.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ftjax.config import LoraConfig, MethodConfig
from ftjax.errors import UserError
from ftjax.hub.gather import host_piece
from ftjax.hub.load import load_params
from ftjax.hub.safetensors import SafetensorsFolder, Tensor, write_file
from ftjax.methods import method_module
from ftjax.models.model import Model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


def adapter_tensors(model: Model, params: Mapping[str, jax.Array]) -> list[Tensor]:
    """Everything that trains, under PEFT's names, in float32."""
    return [
        Tensor(PREFIX + piece.name, piece.shape, np.dtype(np.float32), host_piece(params[path], piece.index, piece.shape))
        for path, spec in model.trainable.items()
        for piece in spec.pieces()
    ]


def write_adapter(folder: Path, model: Model, params: Mapping[str, jax.Array], config: MethodConfig, base_model: str) -> None:
    """A folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        base_model: what `base_model_name_or_path` says: a Hub id or a folder.
    """
    settings = method_module(config).peft_config(config, base_model, model)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    write_file(folder / WEIGHTS, adapter_tensors(model, params))


def read_adapter_config(folder: Path) -> dict:
    """UserError where the folder is not PEFT's."""
    path = folder / CONFIG
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: expected a PEFT adapter folder with {CONFIG}; found {found}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(saved, dict) or "peft_type" not in saved:
        raise UserError(f"{path}: it has no peft_type, so it is not an adapter of PEFT's")
    return saved


def attach_adapter(root: nnx.Module, folder: Path) -> MethodConfig:
    """Put an adapter's layers into an abstract model, in place; its settings come back."""
    saved = read_adapter_config(folder)
    if saved["peft_type"] != "LORA":
        raise UserError(f"{folder}: peft_type {saved['peft_type']!r} is not supported; those that are: LORA")
    config = method_module(LoraConfig()).from_peft(LoraConfig(adapter_path=str(folder)), saved)
    method_module(config).attach(root, config)
    return config


class _Prefixed:
    """An adapter file under the names that the model's rows use."""

    def __init__(self, folder: Path):
        if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder}: its weights are a pickle (adapter_model.bin), which is never loaded; save as safetensors"
            )
        self._source = SafetensorsFolder(folder, single=WEIGHTS)
        self._names = {name.removeprefix(PREFIX): name for name in self._source.keys()}

    def keys(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(self._names[name])

    def read(self, name: str, index=()) -> np.ndarray:
        return self._source.read(self._names[name], index)


def load_adapter(model: Model, folder: Path, mesh: Mesh) -> dict[str, jax.Array]:
    """The trained parameters of a PEFT folder, float32. Raises UserError where its tensors are not those of the model."""
    return load_params(model.trainable, _Prefixed(folder), mesh, jnp.float32, where=str(folder))
