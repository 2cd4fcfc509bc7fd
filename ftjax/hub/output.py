"""A complete output folder: weights, tokenizer and model card. It replaces the one before it in one move."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.hub.card import run_card
from ftjax.hub.model_folder import model_tensors, write_folder
from ftjax.hub.peft import adapter_tensors, write_adapter
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
    merge: bool = False,
) -> None:
    """A PEFT folder, or a whole model where the method trains in full or `merge` is asked for.

    Args:
        params: all parameters, frozen ones too.
        source: the base model's folder or file.
        data: lines that say what it was trained on, for the card.
    """
    whole = merge or config.method.name == "full"
    if jax.process_index():  # arrays that are spread over processes are fetched by all of them together
        tensors = model_tensors(model, params, config.method, config.model.dtype) if whole else adapter_tensors(model, params)
        for tensor in tensors:
            tensor.data()
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if whole:
            write_folder(partial, model, params, config.method, config.model.dtype, source)
        else:
            write_adapter(partial, model, params, config.method, config.model.path)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(run_card(config, step=step, data=data, metrics=metrics or {}, whole=whole))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
