"""One row per parameter: its shape, logical axes, Hugging Face name and initialiser stand together.

Modules are always built *abstract*: a parameter holds a `jax.ShapeDtypeStruct` until a loader or an initialiser
materialises it. Sharding, streaming import, export, the memory plan, LoRA targets and PEFT's key names all derive
from these rows.

A module tree mirrors Hugging Face's module names, so that the Hugging Face name of a parameter is its path with two
exceptions: `block` (or `<name>_block`) under a stack stands for the layer index, and `base` (the layer that a method
wrapped) is left out. Where checkpoints name or cut a parameter otherwise, its row says how (`Layout`).
Parameters also keep Hugging Face's shapes -- a linear layer's weight is (out, in) -- so that import and export only
stack and unstack. Matrix products are as fast either way: forward and backward want opposite orders.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models.quantized import Quantization, Quantized

INDEXED = {"layers"}  # stacked axes: one Hugging Face tensor for each index


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
class Layout:
    """Another way in which checkpoints hold a parameter than under its module's name, one tensor a layer.

    Mixtral's experts, one array `[layers, experts, gate and up, mlp, embed]`, are two tensors for each expert:
    `Layout("{}.{}.weight", labels=(None, ("w1", "w3")), module=("mlp", "block_sparse_moe"))`.

    Attributes:
        name: takes the place of the row's name, with `{}` for each further axis that has a tensor for each index.
        labels: what stands in the name for the indices of each of those axes; None for the number itself.
        module: a part of the module's name, and what checkpoints have in its place.
    """

    name: str
    labels: tuple[tuple[str, ...] | None, ...] = ()
    module: tuple[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """The metadata of one parameter.

    Attributes:
        axes: logical axis of each dimension in memory (the table in `ftjax.mesh` maps them to the mesh).
        name: the last part of the Hugging Face name, such as `weight`.
        init: where the parameter starts when it is not loaded.
        trainable: a method sets this; everything else is frozen.
        adapter: a method added the parameter; it is initialised, not loaded with the base model.
        ranks: for each stacked index, how much of the `rank` axis exists (0: that layer has no adapter, whether or not the
            parameter has that axis). The rest is padding, which neither trains nor is exported.
        hf_shape: Hugging Face's shape of one layer's tensor, where memory splits one of its dimensions in two.
        layouts: how checkpoints hold the parameter, where they do it otherwise; the first is what is written. Under
            its own name it can always be read.
        quantization: how a frozen weight is held in few bits; its value is then a pytree of arrays.
    """

    axes: tuple[str | None, ...]
    name: str
    init: Init = Init("normal", 0.02)
    trainable: bool = False
    adapter: bool = False
    ranks: tuple[int, ...] | None = None
    hf_shape: tuple[int, ...] | None = None
    layouts: tuple[Layout, ...] = ()
    quantization: Quantization | None = None


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


@runtime_checkable
class Stacked(Protocol):
    """A module that holds several layers in one block."""

    def layers_of(self, name: str) -> tuple[int, ...]:
        """Which layers of the model are stacked in the block that is this attribute."""
        ...


@dataclass(frozen=True)
class Spec:
    """A parameter as seen from outside the module tree: where it is, and its row.

    Shape and dtype are those of the weight; what stands for a quantised one is `abstract`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    row: Row
    layers: tuple[int, ...] | None = None  # which layers are stacked, where they are not all in order

    @property
    def module(self) -> str:
        """Hugging Face's module name, with `{}` for each stacked index: `model.layers.{}.self_attn.q_proj`."""
        parts = [part for part in self.path.split(".")[:-1] if part != "base"]
        return ".".join("{}" if part == "block" or part.endswith("_block") else part for part in parts)

    @property
    def hf_template(self) -> str:
        return f"{self.module}.{self.row.name}" if self.module else self.row.name

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the leading stacked dimensions."""
        return tuple(size for size, axis in zip(self.shape, self.row.axes, strict=True) if axis in INDEXED)

    def pieces(self, layout: Layout | None = None) -> Iterator[Piece]:
        """Every Hugging Face tensor that this parameter is stacked from, under the names that transformers' modules and
        PEFT have for it; with a layout, under those of a checkpoint."""
        template, labels = self.hf_template, ()
        if layout is not None:
            module = self.module.replace(*layout.module) if layout.module else self.module
            template, labels = f"{module}.{layout.name}", layout.labels
        depth = len(self.stacked) + len(labels)
        own = self.shape[depth:]
        for number, index in enumerate(itertools.product(*map(range, self.shape[:depth]))):
            cut = tuple(slice(0, size) for size in own)
            if self.row.ranks is not None:
                if not self.row.ranks[number]:
                    continue
                if "rank" in self.row.axes:
                    at = self.row.axes.index("rank") - depth
                    cut = (*cut[:at], slice(0, self.row.ranks[number]), *cut[at + 1 :])
            shape = self.row.hf_shape if self.row.hf_shape and layout is None else tuple(c.stop for c in cut)
            yield Piece(template.format(*self._labels(index, labels)), index + cut, shape)

    def _labels(self, index: tuple[int, ...], labels: tuple[tuple[str, ...] | None, ...]) -> Iterator[int | str]:
        stacked = len(self.stacked)
        yield from (self.layers[i] if self.layers else i for i in index[:stacked])
        yield from (text[i] if text else i for i, text in zip(index[stacked:], labels, strict=True))

    @property
    def abstract(self) -> jax.ShapeDtypeStruct | Quantized:
        """What the parameter's value looks like."""
        if self.row.quantization is not None:
            return self.row.quantization.abstract(self.shape)
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def written(self) -> Iterator[Piece]:
        """The tensors of the checkpoints that are written."""
        return self.pieces(self.row.layouts[0] if self.row.layouts else None)

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
    stacks = {path: node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Module) and isinstance(node, Stacked)}
    found = {}
    for path, leaf in nnx.iter_graph(module):
        if isinstance(leaf, nnx.Param):
            value, name = leaf.get_value(), ".".join(map(str, path))
            above = next((path[:end] for end in range(len(path) - 1) if path[:end] in stacks), None)
            layers = None if above is None else stacks[above].layers_of(path[len(above)])
            dtype = jnp.float32 if leaf.row.quantization else value.dtype
            found[name] = Spec(name, tuple(value.shape), jnp.dtype(dtype), leaf.row, layers)
    return dict(sorted(found.items()))
