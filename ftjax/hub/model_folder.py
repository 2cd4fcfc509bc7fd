"""A merged model as a Hugging Face folder: what `AutoModelForCausalLM.from_pretrained` loads."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from ftjax.config import MethodConfig
from ftjax.hub.gather import host_piece
from ftjax.hub.safetensors import Tensor, write_model
from ftjax.methods import method_module
from ftjax.models.model import Model


def model_tensors(model: Model, params: Mapping[str, jax.Array], config: MethodConfig, dtype) -> list[Tensor]:
    """The base model's tensors under Hugging Face's names, with the adapter merged in float32 and then rounded to `dtype`."""
    merge = getattr(method_module(config), "merged", None)
    dtype = np.dtype(dtype)

    def fetch(path: str, index: tuple) -> np.ndarray:
        return host_piece(params[path], index)()

    def data(path: str, index: tuple, stacked: int):
        def one() -> np.ndarray:
            weight = fetch(path, index)
            if merge is not None:
                weight = merge(model, path, index[:stacked], weight, fetch)
            return weight.astype(dtype)

        return one

    return [
        Tensor(piece.name, piece.shape, dtype, data(path, piece.index, len(spec.stacked)))
        for path, spec in model.specs.items()
        if not spec.row.adapter
        for piece in spec.pieces()
    ]


def write_config(folder: Path, config: Mapping, dtype: str, source: Path) -> None:
    """config.json, and generation_config.json where the source has one."""
    from transformers import CONFIG_MAPPING

    values = {**config, "dtype": dtype}
    text = CONFIG_MAPPING[config["model_type"]].from_dict(values).to_json_string()
    (folder / "config.json").write_text(text)
    generation = source / "generation_config.json"
    if source.is_dir() and generation.is_file():
        shutil.copyfile(generation, folder / "generation_config.json")
    else:
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
        (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n")


def write_folder(
    folder: Path, model: Model, params: Mapping[str, jax.Array], config: MethodConfig, dtype: str, source: Path
) -> None:
    """config.json, generation_config.json and the weights, in shards of at most 5 GB.

    Args:
        dtype: `float32`, `bfloat16` or `float16`: what the file stores.
        source: the base model's folder or file.
    """
    import jax.numpy as jnp

    write_config(folder, model.config, dtype, source)
    write_model(folder, model_tensors(model, params, config, jnp.dtype(dtype)))
