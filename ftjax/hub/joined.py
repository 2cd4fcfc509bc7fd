"""Presents one tensor of a checkpoint, whose rows are those of several in the model, as these."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.hub.source import TensorSource
from ftjax.models.nn.param import Spec


class _Part(NamedTuple):
    whole: str
    first: int
    shape: tuple[int, ...]


class Joined:
    """A `TensorSource` with tensors that the file has joined along their first dimension.

    For example OLMo Hybrid's three convolutions, which transformers 5 joins when it loads, and which a file in its layout in
    memory (`save_pretrained(..., save_original_format=False)`) has as one.

    Args:
        specs: the model's parameters, by path.
        joined: `{name of a module in the file: names of the modules in the model}`.
    """

    def __init__(self, source: TensorSource, specs: Mapping[str, Spec], joined: Mapping[str, Sequence[str]]):
        self._source, self._parts = source, dict[str, _Part]()
        shapes = {piece.name: piece.shape for spec in specs.values() for piece in spec.pieces()}
        have = set(source.keys())
        for name in have:
            *above, module, last = name.split(".")
            own = [".".join((*above, part, last)) for part in joined.get(module, ())]
            if not own or not all(one in shapes for one in own) or any(one in have for one in own):
                continue
            if sum(shapes[one][0] for one in own) != source.shape(name)[0]:
                continue  # of another shape; the error names it
            first = 0
            for one in own:
                self._parts[one] = _Part(name, first, shapes[one])
                first += shapes[one][0]
        used = {part.whole for part in self._parts.values()}
        self._names = [name for name in source.keys() if name not in used] + list(self._parts)

    def keys(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        part = self._parts.get(name)
        return tuple(self._source.shape(name)) if part is None else part.shape

    def dtype(self, name: str) -> np.dtype:
        part = self._parts.get(name)
        return self._source.dtype(name if part is None else part.whole)

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        part = self._parts.get(name)
        if part is None:
            return self._source.read(name, index)
        rows = range(part.shape[0])[index[0]] if index else range(part.shape[0])
        return self._source.read(part.whole, (slice(part.first + rows.start, part.first + rows.stop), *index[1:]))
