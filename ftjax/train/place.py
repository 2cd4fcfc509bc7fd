"""Where the optimizer's arrays lie: like their parameters, on the device or in the host's memory."""

import math
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

HOST = "pinned_host"


class OnHost(NamedTuple):
    """A part of the optimizer's state that is in the host's memory between updates."""

    state: Any


def on_the_host(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, with its state marked for the host. The arrays move by `moved`, outside of the update itself."""

    def update(updates, state, params=None):
        updates, state = inner.update(updates, state.state, params)
        return updates, OnHost(state)

    return optax.GradientTransformation(lambda params: OnHost(inner.init(params)), update)


def _is_on_host(node: Any) -> bool:
    return isinstance(node, OnHost)


def moved(state: Any, space: jax.memory.Space) -> Any:
    """The state with the arrays of every `OnHost` in another memory; numbers stay. For use inside jit."""

    def move(node):
        if not _is_on_host(node):
            return node
        return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, node)

    return jax.tree.map(move, state, is_leaf=_is_on_host)


def on_devices(state: Any) -> list[Any]:
    """The arrays of a state that the devices hold between updates."""
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_on_host) if not _is_on_host(leaf)]


def on_host(shardings: Any, shapes: Any) -> Any:
    """Shardings of a state, with those of the arrays of every `OnHost` in the host's memory."""

    def place(where, shape):
        if not _is_on_host(where):
            return where
        return jax.tree.map(lambda one, leaf: one.with_memory_kind(HOST) if leaf.ndim else one, where, shape)

    return jax.tree.map(place, shardings, shapes, is_leaf=_is_on_host)


def along(leaf: Any, where: NamedSharding) -> NamedSharding:
    """Where an array of the optimizer lies: as its parameter does, as far as it has the same axes.

    Scales of blocks have a shorter last axis, and factored moments lack one: what does not divide is on every device.
    """
    mesh, axes = where.mesh, where.spec
    if leaf.ndim < len(axes):
        return NamedSharding(mesh, PartitionSpec())

    def parts(axis) -> int:
        return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))

    kept = [axis if size % parts(axis) == 0 else None for size, axis in zip(leaf.shape, axes, strict=False)]
    return NamedSharding(mesh, PartitionSpec(*kept))
