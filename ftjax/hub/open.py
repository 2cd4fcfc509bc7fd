"""The single path from a model's name to its configuration and tensors, as an adapter or an objective needs them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from ftjax.hub.adapter.own_base import warn_of_another_base
from ftjax.hub.adapter.peft import attach_adapter, read_adapter_config
from ftjax.hub.adapter.untied import with_adapters_output
from ftjax.hub.classifier import with_adapters_head
from ftjax.hub.fetch import resolve_model
from ftjax.hub.load import open_model
from ftjax.hub.source import TensorSource
from ftjax.hub.vocabulary import with_adapters_tokens
from ftjax.models.model import build_module
from ftjax.objectives.objective import Head


class BaseModel(NamedTuple):
    """An opened base model.

    Attributes:
        path: its folder, or .gguf file.
        config: config.json completed by transformers, with an adapter's changes.
        source: the tensors for that config.
    """

    path: Path
    config: dict[str, Any]
    source: TensorSource


def open_base(name: str, revision: str | None = None, adapter: Path | None = None) -> BaseModel:
    """Open a base model, with the vocabulary rows and the output that an adapter folder needs.

    Warns if the adapter was trained on another model. Raises UserError if a file is missing, damaged or not supported.

    Args:
        name: Hub id, local folder or .gguf file.
    """
    path = resolve_model(name, revision)
    config, source = open_model(path)
    if adapter is not None:
        warn_of_another_base(adapter, read_adapter_config(adapter), name, source)
        config, source = with_adapters_output(adapter, config, source)
        config, source = with_adapters_tokens(adapter, config, source)
    return BaseModel(path, config, source)


def open_adapted(
    name: str, revision: str | None, adapter: Path, *, head: Head | None = None, note: Callable[[str], None]
) -> tuple[BaseModel, nnx.Module, Any]:
    """Return `(base model, its abstract module with the adapter's method, settings of the method)`.

    Args:
        head: what a run knows about the head of a classification adapter.
        note: called with remarks on the adapter's settings for the user.
    """
    base = open_base(name, revision, adapter)
    config, source = with_adapters_head(adapter, base.config, base.source, *(head or ()))
    root = build_module(config)
    notes = root.notes
    method = attach_adapter(root, adapter)
    for text in root.notes[len(notes) :]:
        note(text)
    return base._replace(config=config, source=source), root, method
