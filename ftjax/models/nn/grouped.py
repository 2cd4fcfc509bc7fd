"""Multiply rows, sorted by group, by the matrix of their group (the experts of a mixture).

A matrix in 8 or 4 bits is dequantised by itself, just before its rows are multiplied, so that those of all groups never exist
in full precision at one time. Groups without rows cost nothing.

Legend: M rows, X groups, I in, O out.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.models.nn.loops import about
from ftjax.models.nn.quantized import Quantized
from ftjax.models.nn.remat import saved_product

TILE = 256  # the most rows of a group that are multiplied at once


class Part(NamedTuple):
    """One index of an axis of the weight, after that of the groups."""

    axis: int
    index: int


def grouped(
    x: Float[Array, "M I"],
    weight: Float[Array, "X ..."] | Quantized,
    sizes: Int[Array, " X"],
    contract: int,
    part: Part | None = None,
) -> Float[Array, "M O"]:
    """Multiply the rows of x, sorted by group, by the matrix of their group.

    Args:
        weight: [X, I, O] or [X, O, I], and one axis more if it has several parts.
        sizes: number of rows per group.
        contract: axis of the input dimension, without that of the parts.
    """
    if isinstance(weight, Quantized):
        return saved_product(grouped_quantized(x, weight, sizes, contract, part))
    if part is not None:
        weight = jax.lax.index_in_dim(weight, part.index, part.axis, keepdims=False)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = jax.lax.RaggedDotDimensionNumbers(
        (((1,), (contract,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return saved_product(jax.lax.ragged_dot_general(x, weight.astype(x.dtype), sizes, dims, precision=precision))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_quantized(
    x: Float[Array, "M I"], weight: Quantized, sizes: Int[Array, " X"], contract: int, part: Part | None
) -> Float[Array, "M O"]:
    """Run `grouped` with quantised matrices, each dequantised to the dtype of x only for this product.

    The backward pass saves the quantised weight, not a part of it, which would be a copy; it computes a gradient only for x.
    """
    return _multiply(x, weight, sizes, contract, part)


def _forward(x, weight, sizes, contract, part):
    return _multiply(x, weight, sizes, contract, part), (weight, sizes)


def _backward(contract, part, saved, gradient):
    weight, sizes = saved
    return _multiply(gradient, weight, sizes, 3 - contract, part), None, None


grouped_quantized.defvjp(_forward, _backward)


def _multiply(x: jax.Array, weight: Quantized, sizes: jax.Array, contract: int, part: Part | None) -> jax.Array:
    """Loop over the groups that have rows, and over tiles of their rows."""
    rows, groups = x.shape[0], weight.shape[0]
    shape = [size for axis, size in enumerate(weight.shape) if part is None or axis != part.axis]
    mean = -(-rows // groups)
    tile = min(rows, TILE, 2 ** math.ceil(math.log2(mean)))
    ends = jnp.cumsum(sizes)
    filled = jnp.nonzero(sizes, size=groups)[0].astype(jnp.int32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def group(number: jax.Array, y: jax.Array) -> jax.Array:
        own = filled[number]
        matrix = weight.take(0, own)
        matrix = (matrix if part is None else matrix.take(part.axis - 1, part.index)).dequantise(x.dtype)
        first, end = ends[own] - sizes[own], ends[own]

        def step(number: jax.Array, y: jax.Array) -> jax.Array:
            start = first + number * tile
            at = jnp.minimum(start, rows - tile)  # the last tile overlaps the rows before it, and leaves them as they are
            found = jax.lax.dynamic_slice_in_dim(x, at, tile)
            found = jax.lax.dot_general(found, matrix, (((1,), (contract - 1,)), ((), ())), precision=precision)
            place = at + jnp.arange(tile, dtype=jnp.int32)
            mine = (place >= start) & (place < end)
            found = jnp.where(mine[:, None], found, jax.lax.dynamic_slice_in_dim(y, at, tile))
            return jax.lax.dynamic_update_slice_in_dim(y, found, at, 0)

        with about(-(-mean // tile)):
            return jax.lax.fori_loop(0, (sizes[own] + tile - 1) // tile, step, y)

    with about(groups):
        return jax.lax.fori_loop(0, jnp.sum(sizes > 0, dtype=jnp.int32), group, jnp.zeros((rows, shape[3 - contract]), x.dtype))
