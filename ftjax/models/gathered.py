"""Fully sharded parameters: each weight is gathered where a product needs it, once forward and once backward.

Left to itself, the partitioner often gathers a weight for each of its uses, moves it in the masters' float32, or turns the
product into a loop that passes parts around. Here the weight is cast first, then gathered over `fsdp`, and its gradient is
reduced straight into the shards (Rajbhandari et al. 2020, ZeRO-3, arXiv:1910.02054, section 5.3). Cuts along `tensor` stay.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from ftjax.chips import chip_of
from ftjax.mesh import CUT, constrain

Axes = tuple[str | None, ...]


def fully_sharded() -> bool:
    """Whether parameters are cut along `fsdp` (or `expert`) here."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(mesh.shape.get(axis, 1) > 1 for axis in CUT)


def in_order(x: jax.Array) -> jax.Array:
    """With the last dimension contiguous in memory; for use inside `shard_map` (the partitioner would gather it).

    Left to itself, XLA may pick a layout for a whole loop, or for the optimizer's update, that suits one product in it, and
    copy stacked weights, activations or moments into that layout.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(weight: jax.Array, axes: Axes, over: tuple[str, ...] = CUT) -> jax.Array:
    """A weight (or activations) with these logical axes, whole along `over`; the gradient is reduced into the parts."""
    return constrain(weight, *axes, without=over)


def _forward(weight: jax.Array, axes: Axes, over: tuple[str, ...]) -> tuple[jax.Array, None]:
    return gathered(weight, axes, over), None


def _backward(axes: Axes, over: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, *axes),)


gathered.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def joined_parts(part: jax.Array, over: str | tuple[str, ...], dimension: int) -> jax.Array:
    """`jax.lax.all_gather` of the devices' parts of a dimension, inside `shard_map`; the gradient is reduced into the parts."""
    return jax.lax.all_gather(part, over, axis=dimension, tiled=True)


def _joined_forward(part: jax.Array, over: str | tuple[str, ...], dimension: int) -> tuple[jax.Array, None]:
    return joined_parts(part, over, dimension), None


def _joined_backward(over: str | tuple[str, ...], dimension: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (reduced_parts(gradient, over, dimension),)


joined_parts.defvjp(_joined_forward, _joined_backward)


def reduced_parts(x: jax.Array, over: str | tuple[str, ...], dimension: int) -> jax.Array:
    """`jax.lax.psum_scatter`: the sum over the devices, of which each keeps its part of a dimension; inside `shard_map`.

    XLA for TPUs makes an all-reduce of it, which moves twice the bytes, wherever the devices are a whole plane or cube of
    chips. It keeps two reduce-scatters: each half of the dimension among half of the devices, and what they have of both
    among pairs of devices, one from each half. Together they move as many bytes as the one.
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
    """Whether XLA makes an all-reduce of a reduce-scatter over so many devices, and not of those over half of them.

    Tried with libtpu 0.0.42. Of a dimension that is contiguous in memory a part is cut in two, for the two directions of a
    ring, and each has to fill the 128 lanes.
    """
    chip = chip_of(getattr(getattr(mesh, "abstract_device", None), "device_kind", ""))
    if chip is None or not chip.torus or size % 2 or part < 256:
        return False
    return size >= 16 and math.isqrt(size) ** 2 == size if chip.torus == 2 else size >= 8
