"""One row per parameter: its shape, logical axes, Hugging Face name and initialiser stand together.

Modules are always built *abstract*: a parameter holds a `jax.ShapeDtypeStruct` until a loader or an initialiser
materialises it. Sharding, streaming import, export, the memory plan, LoRA targets and PEFT's key names all derive
from these rows.

A module tree mirrors Hugging Face's module names, so that the Hugging Face name of a parameter is its path with two
exceptions: `block` under a stack stands for the layer index, and `base` (the layer that a method wrapped) is left out.
Parameters also keep Hugging Face's shapes -- a linear layer's weight is (out, in) -- so that import and export only
stack and unstack. Matrix products are as fast either way: forward and backward want opposite orders.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

INDEXED = {"layers", "experts"}  # stacked axes: one Hugging Face tensor for each index


@dataclass(frozen=True)
class Init:
    """How a parameter that is not loaded starts.

    `normal` and `uniform` have standard deviation, respectively half width, `scale`.
    """

    kind: Literal["zeros", "ones", "normal", "uniform"]
    scale: float = 1.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        if self.kind == "normal":
            return (jax.random.normal(key, shape, jnp.float32) * self.scale).astype(dtype)
        if self.kind == "uniform":
            return jax.random.uniform(key, shape, jnp.float32, -self.scale, self.scale).astype(dtype)
        return jnp.full(shape, 0 if self.kind == "zeros" else 1, dtype)


@dataclass(frozen=True)
class Row:
    """The metadata of one parameter.

    Attributes:
        axes: logical axis of each dimension in memory (the table in `ftjax.mesh` maps them to the mesh).
        name: the last part of the Hugging Face name, such as `weight`.
        init: where the parameter starts when it is not loaded.
        trainable: a method sets this; everything else is frozen.
        adapter: a method added the parameter; it is initialised, not loaded with the base model.
        ranks: for each stacked index, how much of the `rank` axis exists (0: that layer has no adapter). The rest is
            padding, which neither trains nor is exported.
    """

    axes: tuple[str | None, ...]
    name: str
    init: Init = Init("normal", 0.02)
    trainable: bool = False
    adapter: bool = False
    ranks: tuple[int, ...] | None = None


def param(shape: tuple[int, ...], axes: tuple[str | None, ...], name: str, dtype=jnp.float32, **row) -> nnx.Param:
    """An abstract parameter with its row."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), row=Row(axes, name, **row))


class Buffer(nnx.Variable):
    """An array that is neither loaded nor trained nor saved, such as the LoRA scale of each layer."""


class Piece(NamedTuple):
    """One Hugging Face tensor: its name, where it lies in the stacked array, and its shape."""

    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """A parameter as seen from outside the module tree: where it is, and its row."""

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    row: Row

    @property
    def module(self) -> str:
        """Hugging Face's module name, with `{}` for each stacked index: `model.layers.{}.self_attn.q_proj`."""
        parts = [part for part in self.path.split(".")[:-1] if part != "base"]
        return ".".join("{}" if part == "block" else part for part in parts)

    @property
    def hf_template(self) -> str:
        return f"{self.module}.{self.row.name}" if self.module else self.row.name

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the leading stacked dimensions."""
        return tuple(size for size, axis in zip(self.shape, self.row.axes, strict=True) if axis in INDEXED)

    def pieces(self) -> Iterator[Piece]:
        """Every Hugging Face tensor that this parameter is stacked from."""
        own = self.shape[len(self.stacked) :]
        for number, index in enumerate(itertools.product(*map(range, self.stacked))):
            cut = tuple(slice(0, size) for size in own)
            if self.row.ranks is not None:
                if not self.row.ranks[number]:
                    continue
                at = self.row.axes.index("rank") - len(self.stacked)
                cut = (*cut[:at], slice(0, self.row.ranks[number]), *cut[at + 1 :])
            yield Piece(self.hf_template.format(*index), index + cut, tuple(c.stop for c in cut))

    def astype(self, dtype) -> "Spec":
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    @property
    def size(self) -> int:
        """Number of weights, padding not counted."""
        return sum(math.prod(piece.shape) for piece in self.pieces())


def variables(module: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """`(path, variable)` of every parameter and buffer below a module."""
    for path, leaf in nnx.iter_graph(module):
        if isinstance(leaf, nnx.Variable):
            yield ".".join(map(str, path)), leaf


def specs(module: nnx.Module) -> dict[str, Spec]:
    """Every parameter of a module by path (buffers are not parameters)."""
    found = {}
    for path, leaf in variables(module):
        if isinstance(leaf, nnx.Param):
            value = leaf.get_value()
            found[path] = Spec(path, tuple(value.shape), jnp.dtype(value.dtype), leaf.row)
    return dict(sorted(found.items()))
