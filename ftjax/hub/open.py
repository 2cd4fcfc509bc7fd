"""The one way from a model's name to its configuration and tensors, as an adapter or an objective needs them."""

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
    """A base model's files, opened.

    Attributes:
        path: its folder, or .gguf file.
        config: config.json as transformers completes it, with what an adapter changes of it.
        source: the tensors that belong to it.
    """

    path: Path
    config: dict[str, Any]
    source: TensorSource


def open_base(name: str, revision: str | None = None, adapter: Path | None = None) -> BaseModel:
    """Opens a base model, with the rows of the vocabulary and the output that an adapter's folder needs.

    Warns where the adapter was trained on another model. Raises UserError where a file is missing, damaged or not supported.

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
    """`(base model, its abstract module with the adapter's method, settings of the method)`.

    Args:
        head: what a run knows of the head of a classifier's adapter.
        note: called with what the person should know about the adapter's settings.
    """
    base = open_base(name, revision, adapter)
    config, source = with_adapters_head(adapter, base.config, base.source, *(head or ()))
    root = build_module(config)
    notes = root.notes
    method = attach_adapter(root, adapter)
    for text in root.notes[len(notes) :]:
        note(text)
    return base._replace(config=config, source=source), root, method
