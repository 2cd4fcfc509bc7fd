"""Parameters and their metadata: one row per parameter with logical axes, Hugging Face name and initialiser.

Modules are always built *abstract*: a parameter holds a `jax.ShapeDtypeStruct` until a loader or an initialiser materialises
it. Sharding, streaming import, export, the memory plan, LoRA targets and PEFT's key names are all derived from these rows.

The module tree mirrors Hugging Face's module names, so that the Hugging Face name of a parameter is its path, with two
exceptions: `block` (or `<name>_block`) under a stack becomes the layer index, and `base` (the layer that a method wraps) is
omitted. If checkpoints name or split a parameter differently, its row says how (`Layout`). Parameters also keep Hugging Face's
shapes -- a linear layer's weight is (out, in) -- so that import and export only stack and unstack. Matrix products are equally
fast either way: forward and backward pass prefer opposite orders.
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

from ftjax.models.nn.quantized import Quantization, Quantized

INDEXED = {"layers"}  # stacked axes: one Hugging Face tensor per index


@dataclass(frozen=True)
class Init:
    """Initialiser of a parameter that is not loaded.

    `scale` is the standard deviation of `normal` and the half width of `uniform`.
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
    """Layout of a parameter in checkpoints, if it is not one tensor per layer under its module's name.

    For example, Mixtral's experts are one array `[layers, experts, gate and up, mlp, embed]` in memory and two tensors per
    expert in checkpoints: `Layout("{}.{}.weight", labels=(None, ("w1", "w3")), module=("mlp", "block_sparse_moe"))`.

    Attributes:
        name: replaces the row's name, with `{}` for each further axis that has one tensor per index.
        labels: for each of these axes, the names of its indices; None for the numbers themselves.
        module: a part of the module name, and its replacement in checkpoints.
    """

    name: str
    labels: tuple[tuple[str, ...] | None, ...] = ()
    module: tuple[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """Metadata of one parameter.

    Attributes:
        axes: logical axis of each dimension in memory (the table in `ftjax.mesh` maps them to mesh axes).
        name: last part of the Hugging Face name, such as `weight`.
        init: initialiser, used if the parameter is not loaded.
        trainable: set by the fine-tuning method; all other parameters are frozen.
        adapter: whether a method added the parameter; it is then initialised, not loaded with the base model.
        ranks: for each stacked index, the used length of the `rank` axis (0: that layer has no adapter, whether or not the
            parameter has that axis). The rest is padding, which is neither trained nor exported.
        hf_shape: Hugging Face's shape of one layer's tensor, if one of its dimensions is split in two in memory and no layout
            splits the tensor.
        layouts: layouts in checkpoints, if different from one tensor per layer; the first is used for writing. The parameter
            can always be read under its own name.
        quantization: quantization of a frozen weight, whose value is then a pytree of arrays.
        constant: trained by no method: a buffer of transformers, such as the scalar of a layer of Gemma 4.
        float32: float32 in memory and in checkpoints, whatever the model's dtype, such as the correction bias of a router.
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
    constant: bool = False
    float32: bool = False


def param(shape: tuple[int, ...], axes: tuple[str | None, ...], name: str, dtype=jnp.float32, **row) -> nnx.Param:
    """Create an abstract parameter with its row."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), row=Row(axes, name, **row))


class Buffer(nnx.Variable):
    """An array that is neither loaded nor trained nor saved, such as the LoRA scale of each layer."""


class Piece(NamedTuple):
    """One Hugging Face tensor: its name, its index in the stacked array, and its shape."""

    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


@runtime_checkable
class Stacked(Protocol):
    """A module that holds several layers in one block."""

    def layers_of(self, name: str) -> tuple[int, ...]:
        """Return the layers of the model that are stacked in the block with this attribute name."""
        ...


@dataclass(frozen=True)
class Spec:
    """Description of a parameter outside the module tree: its path, shape, dtype and row.

    Shape and dtype are those of the unquantised weight; `abstract` describes its actual value.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    row: Row
    layers: tuple[int, ...] | None = None  # the stacked layers; None if these are all layers in order

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
        """Yield every Hugging Face tensor that this parameter is stacked from, named as in transformers' modules and PEFT, or
        with a layout as in checkpoints."""
        template, labels = self.hf_template, ()
        if layout is not None:
            module = self.module.replace(*layout.module) if layout.module else self.module
            template, labels = f"{module}.{layout.name}", layout.labels
        depth = len(self.stacked) + len(labels)
        own = self.shape[depth:]
        for number, index in enumerate(itertools.product(*map(range, self.shape[:depth]))):
            slices = tuple(slice(0, size) for size in own)
            if self.row.ranks is not None:
                if not self.row.ranks[number]:
                    continue
                if "rank" in self.row.axes:
                    at = self.row.axes.index("rank") - depth
                    slices = (*slices[:at], slice(0, self.row.ranks[number]), *slices[at + 1 :])
            shape = self.row.hf_shape if self.row.hf_shape and not labels else tuple(s.stop for s in slices)
            yield Piece(template.format(*self._labels(index, labels)), index + slices, shape)

    def _labels(self, index: tuple[int, ...], labels: tuple[tuple[str, ...] | None, ...]) -> Iterator[int | str]:
        stacked = len(self.stacked)
        yield from (self.layers[i] if self.layers else i for i in index[:stacked])
        yield from (text[i] if text else i for i, text in zip(index[stacked:], labels, strict=True))

    @property
    def abstract(self) -> jax.ShapeDtypeStruct | Quantized:
        """Shape and dtype of the parameter's value, or a pytree of these if it is quantised."""
        if self.row.quantization is not None:
            return self.row.quantization.abstract(self.shape)
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def written(self) -> Iterator[Piece]:
        """Yield the tensors that are written to checkpoints."""
        return self.pieces(self.row.layouts[0] if self.row.layouts else None)

    def astype(self, dtype) -> "Spec":
        """Return the spec with another dtype; some keep theirs."""
        return self if self.row.float32 else dataclasses.replace(self, dtype=jnp.dtype(dtype))

    @property
    def size(self) -> int:
        """Number of weights, not counting padding."""
        return sum(math.prod(piece.shape) for piece in self.pieces())


def variables(module: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """Yield `(path, variable)` of every parameter and buffer in a module."""
    for path, leaf in nnx.iter_graph(module):
        if isinstance(leaf, nnx.Variable):
            yield ".".join(map(str, path)), leaf


def specs(module: nnx.Module) -> dict[str, Spec]:
    """Return the spec of every parameter of a module by path; buffers are not included."""
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
