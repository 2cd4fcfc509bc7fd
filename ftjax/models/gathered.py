"""Fully sharded parameters: each weight is gathered where a product needs it, once forward and once backward.

Left to itself, the partitioner often gathers a weight for each of its uses, moves it in the masters' float32, or turns the
product into a loop that passes parts around. Here the weight is cast first, then gathered over `fsdp`, and its gradient is
reduced straight into the shards (Rajbhandari et al. 2020, ZeRO-3, arXiv:1910.02054, section 5.3). Cuts along `tensor` stay.
"""

from functools import partial

import jax
from jax.experimental.layout import Layout, with_layout_constraint

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
