"""What a method offers to the rest of ftjax: a handful of functions, most of them optional."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ftjax.config.base import Section
from ftjax.models.model import Model
from ftjax.models.param import Piece, Spec

# (path of a parameter, which part of it) -> that part on the host
Fetch = Callable[[str, tuple], np.ndarray]


class Stored(NamedTuple):
    """One tensor of an adapter file; `data()` gives it, and is called once."""

    name: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Start:
    """What the first values of a method's parameters may be made from.

    Attributes:
        fetch: a base weight, or a new parameter as its row's initialiser left it, by path and index.
        tokenize: the ids of a text, as the base model's tokenizer gives them.
        seed: of the run.
    """

    fetch: Fetch
    tokenize: Callable[[str], list[int]]
    seed: int


def own_name(model: Model, spec: Spec, piece: Piece) -> str:
    """PEFT's name of a tensor: `base_model.model.` and the Hugging Face name that its row gives."""
    return f"base_model.model.{piece.name}"


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning.

    Attributes:
        config: its section of the configuration.
        attach: puts the method into an abstract model, in place; raises UserError where the model cannot have it.
        adapter: what a run leaves is a small folder beside the base model; otherwise a whole model.
        reads: whether an `adapter_config.json` is this method's.
        kind: what messages call such a file.
        saved_config: `(config, base_model, model)` -> `adapter_config.json`.
        from_saved: `(config, adapter_config.json)` -> the settings of a folder, for a model that is to hold its tensors.
            What a folder cannot say (dropout) is taken from `config`. Raises UserError for what ftjax does not have.
        known: the keys of `adapter_config.json` that `from_saved` honours, or that change nothing in this method; any other
            that is set is refused. None: `from_saved` looks at them itself.
        weights_file: beside `adapter_config.json`.
        file_name: `(model, spec, piece)` -> what the file calls a tensor.
        ignored: endings of tensors that the file may hold beside those of the model, and that say nothing new.
        copies: `(model)` -> tensors that the file holds a second time, by name, each with the path of the parameter whose
            transpose it is.
        stored: `(config, model, fetch)` -> the tensors of the file, where they are not the trained parameters themselves.
        start: `(config, model, Start)` -> `{path: array}` of those new parameters whose first values are not their
            row's initialiser's.
        merged: `(model, path, index, weight, fetch)` -> one base weight with what was trained in it; weights that the
            method leaves alone come back as they are.
        no_merge: why the base model cannot take up what was trained, or None.
        library: whose files the folder holds, `peft` or `adapters`.
    """

    config: type[Section]
    attach: Callable[[nnx.Module, Any], None]
    adapter: bool = True
    reads: Callable[[Mapping[str, Any]], bool] = lambda saved: False
    kind: str = ""
    saved_config: Callable[[Any, str, Model], dict[str, Any]] | None = None
    from_saved: Callable[[Any, dict[str, Any]], Any] | None = None
    known: frozenset[str] | None = None
    weights_file: str = "adapter_model.safetensors"
    file_name: Callable[[Model, Spec, Piece], str] = own_name
    ignored: tuple[str, ...] = ()
    copies: Callable[[Model], Mapping[str, str]] = lambda model: {}
    stored: Callable[[Any, Model, Fetch], Iterator[Stored]] | None = None
    start: Callable[[Any, Model, Start], Mapping[str, np.ndarray]] | None = None
    merged: Callable[[Model, str, tuple, np.ndarray, Fetch], np.ndarray] | None = None
    no_merge: str | None = None
    library: str = "peft"
