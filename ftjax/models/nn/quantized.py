"""Quantise frozen weights to 8 or 4 bits.

`int8`: one scale per output channel. `nf4`: NormalFloat4 in blocks of 64 with double quantisation (Dettmers et al. 2023,
arXiv:2305.14314, sections 3 and 4), about 4.14 bits per weight. A quantised array is a pytree of its parts, which are stacked,
scanned and sharded like any other parameter.

Two things differ from bitsandbytes, whose blocks run through the flattened matrix, so that any part of a matrix can be
quantised and used by itself: blocks do not cross rows, and neither do the groups of 256 in which the scales of a row's blocks
are rounded to 8 bits. A group stores the midpoint of its scales, where bitsandbytes subtracts one mean from all scales.

qwix's arrays were considered (0.1.8). They have no double quantisation (4.25 bits per weight with bfloat16 scales, 100 MB more
for an 8B model), and they reject dimensions that are not divisible by the block size (Llama's 172, 11008).

Legend: R rows, C columns of a matrix in memory.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Integer, Shaped, UInt8

BLOCK = 64  # weights per scale
GROUP = 256  # scales per group scale

# The quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


Place = tuple[tuple[str, ...] | None, ...]  # the mesh axes of each dimension


class Part(NamedTuple):
    """Shape, dtype and axes of one array of a quantised weight."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Int8:
    """`values * scale`, rounded to the nearest of 255 steps, so that the error is at most half of `scale`.

    Attributes:
        values: int8 [..., R, C].
        scale: float32, like `values` but with one entry along the axis of the inputs.
    """

    values: jax.Array
    scale: jax.Array

    @staticmethod
    def parts(shape: tuple[int, ...], axes: tuple[str | None, ...], inputs: int) -> dict[str, Part]:
        scale_shape, scale_axes = list(shape), list(axes)
        scale_shape[inputs], scale_axes[inputs] = 1, None
        return {
            "values": Part(shape, jnp.dtype(jnp.int8), axes),
            "scale": Part(tuple(scale_shape), jnp.dtype(jnp.float32), tuple(scale_axes)),
        }

    @staticmethod
    def whole_axis(inputs: int) -> int:
        """Return the axis that must be whole for quantization."""
        return inputs

    @classmethod
    def of_parts(cls, shape: tuple[int, ...], parts: dict) -> Self:
        return cls(**parts)

    @classmethod
    def quantise(cls, weight: Float[Array, "*stack R C"], inputs: int) -> "Int8":
        weight = weight.astype(jnp.float32)
        scale = jnp.max(jnp.abs(weight), axis=inputs, keepdims=True) / 127
        return cls(jnp.round(weight / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def placed(self, place: Place, sizes: Mapping[str, int]) -> "Int8":
        """Return where the arrays are on a mesh of these sizes, if the weight is at `place`."""
        both = zip(place, self.scale.shape, self.shape, strict=True)
        return Int8(PartitionSpec(*place), PartitionSpec(*(axis if size == whole else None for axis, size, whole in both)))

    def take(self, axis: int, index: int | Int[Array, ""]) -> "Int8":
        """Return one index of an axis before those of the matrix."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, axis, keepdims=False), self)

    def dequantise(self, dtype) -> Float[Array, "*stack R C"]:
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "group_scale", "group_middle", "start"],
    meta_fields=["columns"],
)
@dataclass(frozen=True)
class Nf4:
    """`NF4[code] * s`, where `s = group_middle + group_scale * scales` is about the largest magnitude of the block.

    Attributes:
        codes: uint8 [..., R, C / 2], two columns per byte, the first in the low bits.
        scales: int8 [..., R, blocks].
        group_scale, group_middle: float32 [..., R, groups].
        columns: C.
        start: of a device's share of the columns, the first of them: the share need not begin with a block. Scales are then
            those of all columns, and codes those of the share or of all.
    """

    codes: jax.Array
    scales: jax.Array
    group_scale: jax.Array
    group_middle: jax.Array
    columns: int
    start: jax.Array | None = None

    @staticmethod
    def parts(shape: tuple[int, ...], axes: tuple[str | None, ...], inputs: int) -> dict[str, Part]:
        rows, columns = shape[:-1], shape[-1]
        blocks = -(-columns // BLOCK)
        groups = Part((*rows, -(-blocks // GROUP)), jnp.dtype(jnp.float32), (*axes[:-1], None))
        return {
            "codes": Part((*rows, -(-columns // 2)), jnp.dtype(jnp.uint8), axes),
            "scales": Part((*rows, blocks), jnp.dtype(jnp.int8), axes),
            "group_scale": groups,
            "group_middle": groups,
        }

    @staticmethod
    def whole_axis(inputs: int) -> int:
        return -1

    @classmethod
    def of_parts(cls, shape: tuple[int, ...], parts: dict) -> Self:
        return cls(**parts, columns=shape[-1])

    @classmethod
    def quantise(cls, weight: Float[Array, "*stack R C"], inputs: int) -> "Nf4":
        columns = weight.shape[-1]
        blocks = -(-columns // BLOCK)
        padding = [(0, 0)] * (weight.ndim - 1) + [(0, blocks * BLOCK - columns)]
        weight = jnp.pad(weight.astype(jnp.float32), padding).reshape(*weight.shape[:-1], blocks, BLOCK)
        scales, group_scale, group_middle = _double(jnp.max(jnp.abs(weight), axis=-1))
        # Divide by the rounded scale, so that its rounding error does not add to that of the weights.
        s = _scales(scales, group_scale, group_middle)[..., None]
        weight = weight / jnp.where(s > 0, s, 1)
        codes = jnp.zeros(weight.shape, jnp.uint8)
        for low, high in itertools.pairwise(NF4):
            codes += (weight > (low + high) / 2).astype(jnp.uint8)
        codes = codes.reshape(*weight.shape[:-2], -1)[..., : columns + columns % 2]
        return cls(codes[..., 0::2] | codes[..., 1::2] << 4, scales, group_scale, group_middle, columns)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.columns)

    def placed(self, place: Place, sizes: Mapping[str, int]) -> "Nf4":
        """Return where the arrays are on a mesh of these sizes, if the weight is at `place`: see `share`."""
        *rows, last = place
        count = math.prod(sizes[axis] for axis in last or ())
        whole = PartitionSpec(*rows, None)
        alone = self.columns % (2 * count) == 0  # two columns per byte
        return replace(
            self, codes=PartitionSpec(*rows, last if alone else None), scales=whole, group_scale=whole, group_middle=whole
        )

    def take(self, axis: int, index: int | Int[Array, ""]) -> "Nf4":
        """Return one index of an axis before those of the matrix."""
        parts = self.codes, self.scales, self.group_scale, self.group_middle
        parts = (jax.lax.dynamic_index_in_dim(part, index, axis, keepdims=False) for part in parts)
        return Nf4(*parts, self.columns, self.start)

    def share(self, columns: int, start: Int[Array, ""]) -> "Nf4":
        """Return a device's share of the columns, whose codes it may have alone."""
        return replace(self, columns=columns, start=start)

    def dequantise(self, dtype) -> Float[Array, "*stack R C"]:
        codes = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1).reshape(*self.codes.shape[:-1], -1)
        s = jnp.repeat(_scales(self.scales, self.group_scale, self.group_middle), BLOCK, axis=-1)
        return (_look_up(self._own(codes)) * self._own(s)).astype(dtype)

    def _own(self, x: Shaped[Array, "*stack R _"]) -> Shaped[Array, "*stack R C"]:
        """Return the columns that are here, of all or of these with padding."""
        if self.start is None or x.shape[-1] == self.columns:
            return x[..., : self.columns]
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.columns, axis=-1)


def _double(
    s: Float32[Array, "*rows blocks"],
) -> tuple[Integer[Array, "*rows blocks"], Float32[Array, "*rows groups"], Float32[Array, "*rows groups"]]:
    """Quantise the scales of blocks `[..., blocks]` to 8 bits: int8 steps around the midpoint of each group."""
    blocks = s.shape[-1]
    groups = -(-blocks // GROUP)
    padded = jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(0, groups * GROUP - blocks)], mode="edge")
    padded = padded.reshape(*s.shape[:-1], groups, GROUP)
    low, high = jnp.min(padded, axis=-1), jnp.max(padded, axis=-1)
    middle, step = (low + high) / 2, (high - low) / 254
    steps = jnp.round((padded - middle[..., None]) / jnp.where(step > 0, step, 1)[..., None])
    return steps.reshape(*s.shape[:-1], -1)[..., :blocks].astype(jnp.int8), step, middle


def _scales(
    steps: Integer[Array, "*rows blocks"], step: Float32[Array, "*rows groups"], middle: Float32[Array, "*rows groups"]
) -> Float32[Array, "*rows blocks"]:
    """Return the dequantised scales."""
    size = min(GROUP, steps.shape[-1])
    step, middle = (jnp.repeat(x, size, axis=-1)[..., : steps.shape[-1]] for x in (step, middle))
    return jnp.maximum(middle + step * steps.astype(jnp.float32), 0)


def _look_up(codes: UInt8[Array, "*weights"]) -> Float32[Array, "*weights"]:
    """Return the values of codes by a tree of selects: a gather from a table of 16 is slow on most devices.

    The first level is arithmetic, because JAX hoists constant arrays out of a scan and keeps them in memory.
    """
    bits = [codes >> bit & 1 for bit in range(4)]
    first = bits[0].astype(jnp.float32)
    level = [low + (high - low) * first for low, high in zip(NF4[::2], NF4[1::2], strict=True)]
    for bit in bits[1:]:
        level = [jnp.where(bit.astype(bool), high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]


Quantized = Int8 | Nf4
FORMATS: dict[str, type[Int8] | type[Nf4]] = {"int8": Int8, "nf4": Nf4}


@dataclass(frozen=True)
class Quantization:
    """Quantization of a parameter.

    Attributes:
        kind: the format.
        inputs: axis of the inputs, counted from the end: -1, or -2 where columns are the outputs, as in GPT-2.
    """

    kind: Literal["int8", "nf4"]
    inputs: int = -1

    def parts(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, Part]:
        """Describe the arrays of a quantised weight with this shape and these logical axes."""
        return FORMATS[self.kind].parts(shape, axes, self.inputs)

    def of_parts(self, shape: tuple[int, ...], parts: dict) -> Quantized:
        return FORMATS[self.kind].of_parts(shape, parts)

    def abstract(self, shape: tuple[int, ...]) -> Quantized:
        parts = self.parts(shape, (None,) * len(shape))
        return self.of_parts(shape, {name: jax.ShapeDtypeStruct(part.shape, part.dtype) for name, part in parts.items()})

    @property
    def whole_axis(self) -> int:
        """Axis that must be whole for quantization, counted from the end."""
        return FORMATS[self.kind].whole_axis(self.inputs)

    def quantise(self, weight: Float[Array, "*stack R C"]) -> Quantized:
        return FORMATS[self.kind].quantise(weight, self.inputs)
