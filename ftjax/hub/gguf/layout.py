"""How the tensors of a GGUF file are made of those of a Hugging Face checkpoint, and the way back.

A `Part` connects some tensors of one to some of the other. What it changes, it can undo: bit for bit, except for `Plus`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Rows = slice | np.ndarray
Shapes = Mapping[str, tuple[int, ...]]
ReadRows = Callable[[str, Rows], np.ndarray]  # (name in the file, indices into the first dimension) -> those rows


class Change(Protocol):
    """A change of one tensor that can be undone."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the file for Hugging Face's, or the other way round."""
        ...

    def stored(self, tensor: np.ndarray) -> np.ndarray:
        """Return the tensor as the file has it."""
        ...

    def restored(self, read: Callable[[Rows], np.ndarray], shape: tuple[int, ...], rows: slice) -> np.ndarray:
        """Return these rows of Hugging Face's tensor of this shape; `read` gives rows of the file's."""
        ...

    def update(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors of a low-rank update `b @ a` as the file has it."""
        ...


class Same:
    """No change."""

    def shape(self, shape):
        return shape

    def stored(self, tensor):
        return tensor

    def restored(self, read, shape, rows):
        return read(rows)

    def update(self, a, b):
        return a, b


@dataclass(frozen=True)
class Reordered(Same):
    """The rows in another order: `order(count)` gives the place in the file of each of Hugging Face's rows."""

    order: Callable[[int], np.ndarray]

    def stored(self, tensor):
        out = np.empty_like(tensor)
        out[self.order(len(tensor))] = tensor
        return out

    def restored(self, read, shape, rows):
        return read(self.order(shape[0])[rows])

    def update(self, a, b):
        return a, self.stored(b)


@dataclass(frozen=True)
class Plus(Same):
    """A number added to every value: Gemma's norms multiply by 1 + weight, llama.cpp's by the weight."""

    amount: float

    def stored(self, tensor):
        return tensor + np.asarray(self.amount, tensor.dtype)

    def restored(self, read, shape, rows):
        stored = read(rows)
        return stored - np.asarray(self.amount, stored.dtype)


class Transposed(Same):
    """The last two dimensions swapped: of GPT-2's Conv1D and of gpt-oss's experts."""

    def shape(self, shape):
        return (*shape[:-2], shape[-1], shape[-2])

    def stored(self, tensor):
        return np.ascontiguousarray(tensor.swapaxes(-1, -2))

    def restored(self, read, shape, rows):
        if len(shape) > 2:
            return np.ascontiguousarray(read(rows).swapaxes(-1, -2))
        return np.ascontiguousarray(read(slice(None)).T[rows])

    # PEFT's factors of a Conv1D are those of a linear layer already.


class Part(Protocol):
    """Some tensors of a checkpoint (`hub`) and those of a file (`gguf`) that hold the same numbers."""

    hub: tuple[str, ...]
    gguf: tuple[str, ...]

    def shapes(self, hub: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the shapes in the file."""
        ...

    def hub_shape(self, name: str, gguf: Shapes) -> tuple[int, ...]: ...

    def stored(self, name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Return a tensor of the file; `read` gives those of the checkpoint."""
        ...

    def restored(self, name: str, read: ReadRows, gguf: Shapes, rows: slice) -> np.ndarray:
        """Return rows of a tensor of the checkpoint; `read` gives those of the file."""
        ...


class One:
    """One tensor in each."""

    def __init__(self, hub: str, gguf: str, change: Change):
        self.hub, self.gguf, self.change = (hub,), (gguf,), change

    def shapes(self, hub):
        return {self.gguf[0]: self.change.shape(hub[self.hub[0]])}

    def hub_shape(self, name, gguf):
        return self.change.shape(gguf[self.gguf[0]])

    def stored(self, name, read):
        return self.change.stored(read(self.hub[0]))

    def restored(self, name, read, gguf, rows):
        return self.change.restored(lambda these: read(self.gguf[0], these), self.hub_shape(name, gguf), rows)


class Experts:
    """A tensor of each expert in the checkpoint, and all of them in one tensor of the file."""

    def __init__(self, hub: Sequence[str], gguf: str):
        self.hub, self.gguf = tuple(hub), (gguf,)

    def shapes(self, hub):
        return {self.gguf[0]: (len(self.hub), *hub[self.hub[0]])}

    def hub_shape(self, name, gguf):
        return gguf[self.gguf[0]][1:]

    def stored(self, name, read):
        return np.stack([read(one) for one in self.hub])

    def restored(self, name, read, gguf, rows):
        expert = self.hub.index(name)
        return np.ascontiguousarray(read(self.gguf[0], slice(expert, expert + 1))[0, rows])


class Interleaved:
    """gpt-oss's gate and up projections: columns that alternate in the checkpoint, two tensors in the file."""

    def __init__(self, hub: str, gate: str, up: str, bias: bool):
        self.hub, self.gguf, self.bias = (hub,), (gate, up), bias

    def shapes(self, hub):
        shape = hub[self.hub[0]]  # [X, 2F], or [X, E, 2F]
        return {name: (shape[0], shape[-1] // 2, *shape[1:-1]) for name in self.gguf}

    def hub_shape(self, name, gguf):
        experts, size, *embed = gguf[self.gguf[0]]
        return (experts, *embed, 2 * size)

    def stored(self, name, read):
        half = read(self.hub[0])[..., self.gguf.index(name) :: 2]
        return np.ascontiguousarray(half if self.bias else half.swapaxes(-1, -2))

    def restored(self, name, read, gguf, rows):
        halves = [read(one, rows) for one in self.gguf]
        halves = halves if self.bias else [half.swapaxes(-1, -2) for half in halves]
        return np.stack(halves, axis=-1).reshape(*halves[0].shape[:-1], -1)


def interleaved_rows(heads: int) -> Reordered:
    """Return the change of q_proj and k_proj where llama.cpp rotates neighbouring dimensions of a head.

    Hugging Face pairs dimension i of a head with i + H/2; llama.cpp stores the pairs next to each other.
    """

    def order(rows: int) -> np.ndarray:
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)

    return Reordered(order)


def grouped_rows(heads: int) -> Reordered:
    """Return the change of GPT-NeoX's query_key_value, which holds q, k and v head by head; the file holds all q, all k, all
    v."""

    def order(rows: int) -> np.ndarray:
        return np.arange(rows).reshape(3, heads, rows // heads // 3).swapaxes(0, 1).reshape(rows)

    return Reordered(order)
