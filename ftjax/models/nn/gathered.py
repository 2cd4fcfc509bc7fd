"""Fully sharded parameters: each weight is gathered for the product that needs it, once forward and once backward.

By default the partitioner often gathers a weight for each of its uses, transfers it in the float32 of the master weights, or
turns the product into a loop that passes shards around. Here the weight is cast first, then gathered along `fsdp`, and its
gradient is reduce-scattered into the shards (Rajbhandari et al. 2020, ZeRO-3, arXiv:1910.02054, section 5.3). Sharding along
`tensor` is kept.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from ftjax.chips import chip_of
from ftjax.mesh import WEIGHT_AXES, constrain

Axes = tuple[str | None, ...]


def fully_sharded() -> bool:
    """Return whether the current mesh shards parameters along `fsdp` (or `expert`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(mesh.shape.get(axis, 1) > 1 for axis in WEIGHT_AXES)


def in_order(x: jax.Array) -> jax.Array:
    """Constrain x to a row-major layout; for use inside `shard_map`, as the partitioner would gather x.

    Otherwise XLA may choose a layout that suits one product for a whole loop or for the optimizer update, and copy stacked
    weights, activations or moments into that layout.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(weight: jax.Array, axes: Axes, over: tuple[str, ...] = WEIGHT_AXES) -> jax.Array:
    """Gather a weight (or activations) with these logical axes along `over`; the gradient is reduce-scattered."""
    return constrain(weight, *axes, without=over)


def _forward(weight: jax.Array, axes: Axes, over: tuple[str, ...]) -> tuple[jax.Array, None]:
    return gathered(weight, axes, over), None


def _backward(axes: Axes, over: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, *axes),)


gathered.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def joined_parts(part: jax.Array, over: str | tuple[str, ...], dimension: int) -> jax.Array:
    """All-gather a dimension inside `shard_map` (`jax.lax.all_gather`); the gradient is reduce-scattered (`reduced_parts`)."""
    return jax.lax.all_gather(part, over, axis=dimension, tiled=True)


def _joined_forward(part: jax.Array, over: str | tuple[str, ...], dimension: int) -> tuple[jax.Array, None]:
    return joined_parts(part, over, dimension), None


def _joined_backward(over: str | tuple[str, ...], dimension: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (reduced_parts(gradient, over, dimension),)


joined_parts.defvjp(_joined_forward, _joined_backward)


def reduced_parts(x: jax.Array, over: str | tuple[str, ...], dimension: int) -> jax.Array:
    """Reduce-scatter a dimension inside `shard_map`, like `jax.lax.psum_scatter`.

    XLA for TPUs turns a reduce-scatter over a whole plane or cube of chips into an all-reduce, which transfers twice the bytes.
    It does not do so with two reduce-scatters, used in that case: each half of the dimension among half of the devices, then
    both halves among pairs of devices, one from each half. Together they transfer as many bytes as a single one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    over = (over,) if isinstance(over, str) else over
    axes = tuple(axis for axis in over if mesh.shape[axis] > 1)
    size = math.prod(mesh.shape[axis] for axis in axes)
    if len(axes) != 1 or not _by_halves(mesh, size, x.shape[dimension] // size):
        return jax.lax.psum_scatter(x, over, scatter_dimension=dimension, tiled=True)
    half = size // 2
    halves = [list(range(half)), list(range(half, size))]
    pairs = [[place, place + half] for place in range(half)]
    scatter = partial(jax.lax.psum_scatter, axis_name=axes[0])
    of_both = [
        scatter(part, scatter_dimension=dimension, axis_index_groups=halves, tiled=True) for part in jnp.split(x, 2, dimension)
    ]
    return scatter(jnp.stack(of_both), scatter_dimension=0, axis_index_groups=pairs)


def _by_halves(mesh: jax.sharding.AbstractMesh, size: int, part: int) -> bool:
    """Return whether XLA turns a reduce-scatter over `size` devices into an all-reduce, but not one over half of them.

    Measured with libtpu 0.0.42. A part of a contiguous dimension is divided in two, for the two directions of a ring, and each
    half has to fill the 128 lanes.
    """
    chip = chip_of(getattr(getattr(mesh, "abstract_device", None), "device_kind", ""))
    if chip is None or not chip.torus or size % 2 or part < 256:
        return False
    return size >= 16 and math.isqrt(size) ** 2 == size if chip.torus == 2 else size >= 8
