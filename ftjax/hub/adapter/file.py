"""Presents an adapter's weights under PEFT's current names, whatever wrote the file.

Files may include the adapter's name in tensor names (`lora_A.default.weight`). A fully trained module may occur under three
names: its own, `modules_to_save`, and `original_module` for the base model's; PEFT reads the first.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ftjax.errors import UserError
from ftjax.hub.safetensors import SafetensorsFolder
from ftjax.hub.source import TensorSource

NAMED = re.compile(r"\.lora_(?:[AB]|embedding_[AB])\.(?!weight$|bias$)([^.]+)(?:\.weight)?$")
PARTS = r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|trainable_tokens_delta|modules_to_save)"
ORIGINAL = ".original_module."  # the base model's weights of a fully trained module


class Renamed:
    """A `TensorSource` with other names: `{name: the source's}`."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        self._source, self._names = source, dict(names)

    def keys(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._source.shape(self._names[name]))

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(self._names[name])

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        return self._source.read(self._names[name], index)


class AdapterFile(Renamed):
    """The tensors of an adapter folder.

    Attributes:
        original: the base model's tensors that the file also holds, by module name; they are not among the keys.
    """

    def __init__(self, folder: Path, weights_file: str):
        source = SafetensorsFolder(folder, single=weights_file)
        names = _plain_names(source.keys(), str(folder / weights_file))
        kept = {name: stored for name, stored in names.items() if ORIGINAL not in name}
        super().__init__(source, kept)
        self.original = Renamed(source, {n.replace(ORIGINAL, "."): stored for n, stored in names.items() if n not in kept})


def _plain_names(stored: Iterable[str], where: str) -> dict[str, str]:
    """Return `{name that PEFT would write: name in the file}`. Raises UserError if the file holds several adapters."""
    stored = list(stored)
    adapters = sorted({match[1] for name in stored if (match := NAMED.search(name))}) or ["default"]
    if len(adapters) > 1:
        raise UserError(f"{where}: it holds several adapters ({', '.join(adapters)}); save one by itself")
    named = re.compile(rf"{PARTS}\.{re.escape(adapters[0])}(?=\.|$)")
    names: dict[str, str] = {}
    for name in stored:
        plain = named.sub(r".\1", name).replace(".token_adapter.base_layer.", ".base_layer.")
        plain = re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", plain)
        own = plain.replace(".modules_to_save.", ".")
        if own == plain or own not in stored:  # PEFT reads the module's own name
            names[own] = name
    return names
