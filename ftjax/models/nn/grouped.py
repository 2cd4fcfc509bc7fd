"""Multiply rows, sorted by group, by the matrix of their group (the experts of a mixture).

A matrix in 8 or 4 bits is dequantised by itself, just before its rows are multiplied, so that those of all groups never exist
in full precision at one time. Groups without rows cost nothing.

Legend: M rows, X groups, I in, O out.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.models.nn.loops import about
from ftjax.models.nn.quantized import Quantized
from ftjax.models.nn.remat import saved_product

TILE = 256  # the most rows of a group that are multiplied at once


def grouped(
    x: Float[Array, "M I"], weight: Float[Array, "X _ _"] | Quantized, sizes: Int[Array, " X"], contract: int
) -> Float[Array, "M O"]:
    """Multiply the rows of x, sorted by group, by the matrix of their group.

    Args:
        weight: [X, I, O] or [X, O, I]; `contract` is the axis of its input dimension.
        sizes: number of rows per group.
    """
    if isinstance(weight, Quantized):
        return saved_product(grouped_quantized(x, weight, sizes, contract))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = jax.lax.RaggedDotDimensionNumbers(
        (((1,), (contract,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return saved_product(jax.lax.ragged_dot_general(x, weight.astype(x.dtype), sizes, dims, precision=precision))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_quantized(x: Float[Array, "M I"], weight: Quantized, sizes: Int[Array, " X"], contract: int) -> Float[Array, "M O"]:
    """Run `grouped` with quantised matrices, each dequantised to the dtype of x only for this product.

    The backward pass saves the quantised weight and computes a gradient only for x.
    """
    return _multiply(x, weight, sizes, contract)


def _forward(x, weight, sizes, contract):
    return _multiply(x, weight, sizes, contract), (weight, sizes)


def _backward(contract, saved, gradient):
    weight, sizes = saved
    return _multiply(gradient, weight, sizes, 3 - contract), None, None


grouped_quantized.defvjp(_forward, _backward)


def _multiply(x: jax.Array, weight: Quantized, sizes: jax.Array, contract: int) -> jax.Array:
    """Loop over the groups that have rows, and over tiles of their rows."""
    rows, groups = x.shape[0], weight.shape[0]
    mean = -(-rows // groups)
    tile = min(rows, TILE, 2 ** math.ceil(math.log2(mean)))
    ends = jnp.cumsum(sizes)
    filled = jnp.nonzero(sizes, size=groups)[0].astype(jnp.int32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def group(number: jax.Array, y: jax.Array) -> jax.Array:
        own = filled[number]
        matrix = weight.take(0, own).dequantise(x.dtype)
        first, end = ends[own] - sizes[own], ends[own]

        def step(number: jax.Array, y: jax.Array) -> jax.Array:
            start = first + number * tile
            at = jnp.minimum(start, rows - tile)  # the last tile overlaps the rows before it, and leaves them as they are
            part = jax.lax.dynamic_slice_in_dim(x, at, tile)
            part = jax.lax.dot_general(part, matrix, (((1,), (contract - 1,)), ((), ())), precision=precision)
            place = at + jnp.arange(tile, dtype=jnp.int32)
            mine = (place >= start) & (place < end)
            part = jnp.where(mine[:, None], part, jax.lax.dynamic_slice_in_dim(y, at, tile))
            return jax.lax.dynamic_update_slice_in_dim(y, part, at, 0)

        with about(-(-mean // tile)):
            return jax.lax.fori_loop(0, (sizes[own] + tile - 1) // tile, step, y)

    with about(groups):
        return jax.lax.fori_loop(
            0, jnp.sum(sizes > 0, dtype=jnp.int32), group, jnp.zeros((rows, weight.shape[3 - contract]), x.dtype)
        )
