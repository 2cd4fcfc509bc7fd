"""Presents packed tensors of a checkpoint as the weights that they represent; a part is dequantised when it is read."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.hub.source import TensorSource


class Weight(NamedTuple):
    """A weight that is stored in few bits.

    Attributes:
        shape: of the weight.
        dtype: of what `read` returns.
        read: takes a slice with bounds for each dimension and returns that part of the weight.
        parts: names of the tensors that hold it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]
    parts: frozenset[str]


class DequantisedSource:
    """A checkpoint in which some tensors stand for a weight. See `TensorSource`.

    Args:
        weights: by their names in the model.
        without: ends of the names of tensors that no weight needs, such as scales of activations.
    """

    def __init__(self, source: TensorSource, weights: Mapping[str, Weight], without: tuple[str, ...] = ()):
        self._source, self._weights = source, dict(weights)
        hidden = set(weights).union(*(weight.parts for weight in weights.values()))
        self._names = [*(n for n in source.keys() if n not in hidden and not n.endswith(without)), *sorted(weights)]

    def keys(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape if name in self._weights else self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._weights[name].dtype if name in self._weights else self._source.dtype(name)

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        if name not in self._weights:
            return self._source.read(name, index)
        weight = self._weights[name]
        whole = (*index, *(slice(None),) * (len(weight.shape) - len(index)))
        bounds = tuple(slice(*part.indices(size)[:2]) for part, size in zip(whole, weight.shape, strict=True))
        return np.ascontiguousarray(weight.read(bounds))
