"""Writes a complete output folder (weights, tokenizer and model card) and replaces an older one in one move."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.hub.adapter.own_base import write_base
from ftjax.hub.adapter.peft import adapter_tensors, write_adapter
from ftjax.hub.card import run_card
from ftjax.hub.model_folder import from_params, model_tensors, write_folder
from ftjax.hub.public import public_name
from ftjax.hub.safetensors import Tensor
from ftjax.hub.tokenizer.files import write_tokenizer
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
    """Write a run's result: an adapter folder, or a whole model if the method trains the base model itself.

    Args:
        params: all parameters, frozen ones too.
        source: the base model's folder or file.
        data: lines that describe the training data, for the card.
    """
    whole = not method_of(config.method).adapter
    if jax.process_index():  # all processes fetch arrays that are sharded over processes
        tensors = _whole(model, params, config) if whole else adapter_tensors(model, params, config.method)
        for tensor in tensors:
            tensor.data()
        return
    with replacing(folder) as partial:
        if whole:
            write_folder(partial, model, _whole(model, params, config), config.model.dtype, source)
        else:
            write_adapter(partial, model, params, config.method, public_name(config.model.path))
            write_base(partial, source)
        write_tokenizer(partial, tokenizer, config.model, source)
        rows = model.sizes.vocab if config.model.adds_tokens or config.model.pad_vocab_to_multiple_of else None
        card = run_card(config, step=step, data=data, metrics=metrics or {}, whole=whole, rows=rows)
        (partial / "README.md").write_text(card)


def _whole(model: Model, params: Mapping[str, jax.Array], config: Config) -> list[Tensor]:
    return model_tensors(model, from_params(params), params, config.method, jnp.dtype(config.model.dtype))


def refuse_what_is_there(out: Path, command: str) -> None:
    """Raise UserError if `--out` of a command is a file, or a folder with something in it."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{command}: --out {out} is not empty; choose another folder, or remove it first")
    if out.exists() and not out.is_dir():
        raise UserError(f"{command}: --out {out} is a file; choose a folder, which may be new")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`; it takes that place when the block succeeds, and is deleted when it fails.

    The old folder is moved away first and deleted last: if the process is killed in between, the old one is beside its
    place, and `recover` puts it back.

    Raises UserError if the disk is full or the place cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        take_place(partial, folder)
    except OSError as error:
        raise UserError(f"{folder}: could not be written: {error.strerror or error}") from None
    except Exception as error:
        if "(os error " not in str(error):  # how the tokenizer's Rust writer reports it
            raise
        raise UserError(f"{folder}: could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def take_place(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; until then the old folder is complete, in its place or beside it."""
    recover(folder)
    old = _old(folder)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """Finish an interrupted `take_place`: restore the old folder if there is no new one, else delete it."""
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
