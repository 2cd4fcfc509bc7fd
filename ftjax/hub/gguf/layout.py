"""How the tensors of a GGUF file are made of those of a Hugging Face checkpoint, and the way back.

A `Part` connects some tensors of one to some of the other. What it changes, it can undo: bit for bit, except where it computes
(`Plus`, `Scaled`, `Rate`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Rows = slice | np.ndarray
Shapes = Mapping[str, tuple[int, ...]]
Factors = tuple[np.ndarray, np.ndarray]  # a and b of a low-rank update
ReadRows = Callable[[str, Rows], np.ndarray]  # (name in the file, indices into the first dimension) -> those rows


class Change(Protocol):
    """A change of one tensor that can be undone."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the file for Hugging Face's, or the other way round."""
        ...

    def stored(self, tensor: np.ndarray) -> np.ndarray:
        """Return the tensor as the file has it."""
        ...

    def restored(self, read: Callable[[Rows], np.ndarray], shape: tuple[int, ...], rows: Rows) -> np.ndarray:
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
    """The rows in another order, and then perhaps another change of each row: `order(count)` gives the place in the file of
    each of Hugging Face's rows."""

    order: Callable[[int], np.ndarray]
    then: Change = field(default_factory=Same)

    def shape(self, shape):
        return self.then.shape(shape)

    def stored(self, tensor):
        return self.then.stored(self._placed(tensor))

    def restored(self, read, shape, rows):
        return self.then.restored(read, shape, self.order(shape[0])[rows])

    def update(self, a, b):
        return a, self._placed(b)

    def _placed(self, tensor: np.ndarray) -> np.ndarray:
        out = np.empty_like(tensor)
        out[self.order(len(tensor))] = tensor
        return out


@dataclass(frozen=True)
class ReorderedColumns(Same):
    """The columns of a matrix in another order, as in `Reordered`."""

    order: Callable[[int], np.ndarray]

    def stored(self, tensor):
        out = np.empty_like(tensor)
        out[:, self.order(tensor.shape[1])] = tensor
        return out

    def restored(self, read, shape, rows):
        return np.ascontiguousarray(read(rows)[:, self.order(shape[1])])

    def update(self, a, b):
        return self.stored(a), b


class Rate(Same):
    """The logarithm of a rate of decay, `A_log`, as the rate itself, which is negative."""

    def stored(self, tensor):
        return -np.exp(tensor)

    def restored(self, read, shape, rows):
        return np.log(-read(rows))


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


@dataclass(frozen=True)
class Scaled(Same):
    """Every row times a factor: Falcon-H1's multipliers, which llama.cpp wants in the weights."""

    factor: float | np.ndarray

    def _rows(self, tensor: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        factor = np.asarray(self.factor, tensor.dtype)
        return factor[rows].reshape(-1, *[1] * (tensor.ndim - 1)) if factor.ndim else factor

    def stored(self, tensor):
        return tensor * self._rows(tensor)

    def restored(self, read, shape, rows):
        stored = read(rows)
        return stored / self._rows(stored, rows)

    def update(self, a, b):
        return a, self.stored(b)


class Squeezed(Same):
    """A depthwise convolution's taps `[C, 1, W]` as `[C, W]`."""

    def shape(self, shape):
        return (shape[0], *shape[2:]) if len(shape) == 3 else (shape[0], 1, *shape[1:])

    def stored(self, tensor):
        return tensor[:, 0]

    def restored(self, read, shape, rows):
        return read(rows)[:, None]


@dataclass(frozen=True)
class Folded(Same):
    """A vector as a matrix with a row for each group; without `groups`, a row for each number."""

    groups: int | None = None

    def shape(self, shape):
        groups = self.groups or shape[0]
        return (groups, shape[0] // groups) if len(shape) == 1 else (shape[0] * shape[1],)

    def stored(self, tensor):
        return tensor.reshape(self.shape(tensor.shape))

    def restored(self, read, shape, rows):
        return read(slice(None)).reshape(-1)[rows]


class RateColumn(Folded):
    """A `Rate` as a column."""

    def stored(self, tensor):
        return super().stored(-np.exp(tensor))

    def restored(self, read, shape, rows):
        return np.log(-super().restored(read, shape, rows))


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

    def updates(self, a: np.ndarray, b: np.ndarray) -> dict[str, Factors] | None:
        """Return the factors of a low-rank update `b @ a` for each tensor of the file; None if llama.cpp adds none here."""
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

    def updates(self, a, b):
        return {self.gguf[0]: self.change.update(a, b)}


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

    def updates(self, a, b):
        return None


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

    def updates(self, a, b):
        return None


class Halves:
    """Gate and up projection one below the other in the checkpoint, `[..., 2F, E]`, and two tensors in the file."""

    def __init__(self, hub: str, gate: str, up: str):
        self.hub, self.gguf = (hub,), (gate, up)

    def shapes(self, hub):
        *experts, rows, embed = hub[self.hub[0]]
        return {name: (*experts, rows // 2, embed) for name in self.gguf}

    def hub_shape(self, name, gguf):
        *experts, rows, embed = gguf[self.gguf[0]]
        return (*experts, 2 * rows, embed)

    def stored(self, name, read):
        return np.split(read(self.hub[0]), 2, axis=-2)[self.gguf.index(name)]

    def restored(self, name, read, gguf, rows):
        if len(gguf[self.gguf[0]]) > 2:
            return np.concatenate([read(one, rows) for one in self.gguf], axis=-2)
        size = gguf[self.gguf[0]][0]
        wanted = np.arange(2 * size)[rows]
        gate, up = wanted[wanted < size], wanted[wanted >= size] - size
        return np.concatenate([read(self.gguf[0], gate), read(self.gguf[1], up)])

    def updates(self, a, b):
        return {name: (a, half) for name, half in zip(self.gguf, np.split(b, 2), strict=True)}


def interleaved_rows(heads: int, rotated: float = 1.0) -> Reordered:
    """Return the change of q_proj and k_proj where llama.cpp rotates neighbouring dimensions of a head.

    Hugging Face pairs dimension i of a head with i + H/2; llama.cpp stores the pairs next to each other.

    Args:
        rotated: the part of each head, at its beginning, that rotates.
    """

    def order(rows: int) -> np.ndarray:
        place = np.arange(rows).reshape(heads, rows // heads)
        size = int(rows // heads * rotated)
        place[:, :size] = place[:, :size].reshape(heads, size // 2, 2).swapaxes(1, 2).reshape(heads, size)
        return place.reshape(rows)

    return Reordered(order)


def grouped_rows(heads: int) -> Reordered:
    """Return the change of GPT-NeoX's query_key_value, which holds q, k and v head by head; the file holds all q, all k, all
    v."""

    def order(rows: int) -> np.ndarray:
        return np.arange(rows).reshape(3, heads, rows // heads // 3).swapaxes(0, 1).reshape(rows)

    return Reordered(order)
