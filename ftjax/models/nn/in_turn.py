"""Exchanges between devices that do not depend on each other, one after another on CPUs."""

from collections.abc import Callable

import jax

from ftjax.models.nn.device import on_cpu


def in_turn(exchange: Callable[[jax.Array], jax.Array], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return `exchange` of each array, for use inside `shard_map`. On CPUs each waits for the one before; so do the gradients.

    The exchanges of a `shard_map` have one name. Where two may run at once, XLA's CPU client takes a device that has come to
    the second for one that takes part in the first, and ends the process ("Id can't be larger than the number of participating
    threads"), or both wait for ever. Seen with jaxlib 0.10: rarely at times, in every run at others.
    """
    found: list[jax.Array] = []
    for x in arrays:
        if found and on_cpu():
            found[-1], x = jax.lax.optimization_barrier((found[-1], x))
        found.append(exchange(x))
    return tuple(found)
