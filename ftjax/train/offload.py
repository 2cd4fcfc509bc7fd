"""Optimizer state in device memory, sharded like its parameters, or offloaded to host memory."""

import math
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

HOST = "pinned_host"


class OnHost(NamedTuple):
    """A part of the optimizer state that is in host memory between updates."""

    state: Any


def on_the_host(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Mark the state of `inner` for host memory. `moved` transfers the arrays, outside of the update itself."""

    def update(updates, state, params=None):
        updates, state = inner.update(updates, state.state, params)
        return updates, OnHost(state)

    return optax.GradientTransformation(lambda params: OnHost(inner.init(params)), update)


def _is_on_host(node: Any) -> bool:
    return isinstance(node, OnHost)


def moved(state: Any, space: jax.memory.Space) -> Any:
    """Move the arrays of every `OnHost` to another memory space; scalars stay. For use inside jit."""

    def move(node):
        if not _is_on_host(node):
            return node
        return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, node)

    return jax.tree.map(move, state, is_leaf=_is_on_host)


def on_devices(state: Any) -> list[Any]:
    """Return the arrays of a state that are in device memory between updates."""
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_on_host) if not _is_on_host(leaf)]


def on_host(shardings: Any, shapes: Any) -> Any:
    """Return the shardings of a state, with host memory for the arrays of every `OnHost`."""

    def to_host(where, shape):
        if not _is_on_host(where):
            return where
        return jax.tree.map(lambda one, leaf: one.with_memory_kind(HOST) if leaf.ndim else one, where, shape)

    return jax.tree.map(to_host, shardings, shapes, is_leaf=_is_on_host)


def sharding_of_state(leaf: Any, where: NamedSharding) -> NamedSharding:
    """Return the sharding of an optimizer array: that of its parameter, as far as the axes are the same.

    Scales of blocks have a shorter last axis, and factored moments lack one: an axis that does not divide is replicated.
    """
    mesh, axes = where.mesh, where.spec
    if leaf.ndim < len(axes):
        return NamedSharding(mesh, PartitionSpec())

    def parts(axis) -> int:
        return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))

    kept = [axis if size % parts(axis) == 0 else None for size, axis in zip(leaf.shape, axes, strict=False)]
    return NamedSharding(mesh, PartitionSpec(*kept))
