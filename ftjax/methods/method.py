"""Interface of a method: a record of functions, most of them optional."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ftjax.config.base import Section
from ftjax.models.model import Model
from ftjax.models.nn.param import Piece, Spec

# (path of a parameter, index of a part) -> that part on the host
Fetch = Callable[[str, tuple], np.ndarray]


class Stored(NamedTuple):
    """One tensor of an adapter file; `data()` returns it, and is called once."""

    name: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Start:
    """Inputs for the initial values of a method's parameters.

    Attributes:
        fetch: returns a base weight, or a new parameter with the value of its spec's initialiser, by path and index.
        tokenize: returns the ids of a text by the base model's tokenizer.
        seed: seed of the run.
    """

    fetch: Fetch
    tokenize: Callable[[str], list[int]]
    seed: int


def own_name(model: Model, spec: Spec, piece: Piece) -> str:
    """Return PEFT's name of a tensor: `base_model.model.` and the Hugging Face name of its spec."""
    return f"base_model.model.{piece.name}"


@dataclass(frozen=True)
class Method:
    """One fine-tuning method.

    Attributes:
        config: its section of the configuration.
        attach: adds the method to an abstract model, in place; raises UserError if it does not fit the model.
        adapter: a run writes a small folder beside the base model; otherwise a whole model.
        reads: whether an `adapter_config.json` is this method's.
        kind: name of such a file in messages.
        saved_config: `(config, base_model, model)` -> `adapter_config.json`.
        from_saved: `(config, adapter_config.json)` -> the settings of a folder, for a model that is to load its tensors.
            What a folder does not store (dropout) is taken from `config`. Raises UserError for what ftjax does not support.
        known: the keys of `adapter_config.json` that `from_saved` honours, or that have no effect in this method; any other
            key that is set is refused. None: `from_saved` checks them itself.
        weights_file: name of the file beside `adapter_config.json`.
        file_name: `(model, spec, piece)` -> the name of a tensor in the file.
        ignored: endings of redundant tensors that the file may have besides those of the model.
        copies: `(model)` -> tensors that the file has a second time, by name, each with the path of the parameter whose
            transpose it is.
        stored: `(config, model, fetch)` -> the tensors of the file, if they are not the trained parameters themselves.
        start: `(config, model, Start)` -> `{path: array}` of the new parameters whose initial values do not come from their
            spec's initialiser.
        merged: `(model, path, index, weight, fetch)` -> one base weight with the trained change; other weights are returned
            unchanged.
        no_merge: why the result cannot be merged into the base model, or None.
        library: library whose format the folder has, `peft` or `adapters`.
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
