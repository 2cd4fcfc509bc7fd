"""A complete output folder: weights, tokenizer and model card. It replaces the one before it in one move."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.hub.card import run_card
from ftjax.hub.model_folder import from_params, model_tensors, write_folder
from ftjax.hub.peft import adapter_tensors, write_adapter
from ftjax.hub.safetensors import Tensor
from ftjax.methods import method_of
from ftjax.models.model import Model


def write_output(
    folder: Path,
    config: Config,
    model: Model,
    params: Mapping[str, jax.Array],
    tokenizer: Any,
    source: Path,
    *,
    step: int,
    data: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
) -> None:
    """What a run leaves: an adapter folder, or a whole model where the method trains the base model itself.

    Args:
        params: all parameters, frozen ones too.
        source: the base model's folder or file.
        data: lines that say what it was trained on, for the card.
    """
    whole = not method_of(config.method).adapter
    if jax.process_index():  # arrays that are spread over processes are fetched by all of them together
        tensors = _whole(model, params, config) if whole else adapter_tensors(model, params, config.method)
        for tensor in tensors:
            tensor.data()
        return
    with replacing(folder) as partial:
        if whole:
            write_folder(partial, model, _whole(model, params, config), config.model.dtype, source)
        else:
            write_adapter(partial, model, params, config.method, config.model.path)
        tokenizer.save_pretrained(partial)
        rows = model.config["vocab_size"] if config.model.adds_tokens or config.model.pad_vocab_to_multiple_of else None
        card = run_card(config, step=step, data=data, metrics=metrics or {}, whole=whole, rows=rows)
        (partial / "README.md").write_text(card)


def _whole(model: Model, params: Mapping[str, jax.Array], config: Config) -> list[Tensor]:
    return model_tensors(model, from_params(params), params, config.method, jnp.dtype(config.model.dtype))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place when the block ends well and vanishes when it does not.

    Raises UserError where the disk is full or the place cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
