"""Expert parallelism: rows go to the devices of their experts and come back, by an all-to-all each way.

A device sends to each device of the `expert` axis the rows for its experts: at most `capacity` at a time, a quarter more than
its even share, so that buffers have a fixed size. Rows beyond that wait for another round. All devices run as many rounds as
the fullest queue needs, so no row is dropped; with even routing that is one. Each round's own backward pass sends again, so
that only the first round's activations are kept.

Legend: R rows of a device (tokens times experts per token), D width, n devices of the `expert` axis, C capacity.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.models.nn.in_turn import in_turn
from ftjax.models.nn.loops import about

AXIS = "expert"
SLACK = 1.25  # capacity, in even shares

# (rows [M, D], the device's own expert of each row, parameters) -> [M, D]
Compute = Callable[[jax.Array, jax.Array, Any, Any], jax.Array]


class Queues(NamedTuple):
    """The rows of a device in the order of their experts, and so of the devices that they go to.

    Attributes:
        order: [R] the number of each row.
        expert: [R] its expert among those of its device.
        counts: [n] rows for each device.
        starts: [n] where these begin.
    """

    order: jax.Array
    expert: jax.Array
    counts: jax.Array
    starts: jax.Array


def exchanged(
    x: Float[Array, "tokens D"], chosen: Int[Array, "tokens k"], here: int, compute: Compute, trained: Any, frozen: Any
) -> Float[Array, "R D"]:
    """Return the output of each row's expert, for use inside `shard_map`.

    Args:
        here: number of experts of each device.
        compute: applies a device's experts to rows; the expert `here` is none, and its rows are ignored.
        trained, frozen: parameters for `compute`, with and without gradients.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices, rows = mesh.shape[AXIS], chosen.size
    capacity = min(rows, -(-int(rows * SLACK) // devices))
    owner = chosen.reshape(-1)
    order = jnp.argsort(owner)
    counts = jnp.bincount(owner // here, length=devices).astype(jnp.int32)
    queues = Queues(order, owner[order] % here, counts, jnp.cumsum(counts) - counts)
    run = partial(_round, compute, here, capacity, chosen.shape[1])
    number = jnp.int32(0)
    y = jnp.zeros((rows, x.shape[1]), x.dtype)
    y = _placed(y, run(trained, x, frozen, queues, number), queues, capacity, number)
    if capacity == rows:
        return y
    # Every device runs as many rounds as the one with most, because each round is an exchange between them.
    needed = jax.lax.pmax(jnp.max((counts + capacity - 1) // capacity), mesh.axis_names)
    return _further(run, capacity, trained, x, y, frozen, queues, needed)


def _places(queues: Queues, capacity: int, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `(the place of each row of a round in its queues [n, C], whether there is one)`."""
    place = number * capacity + jnp.arange(capacity, dtype=jnp.int32)
    return queues.starts[:, None] + place, place < queues.counts[:, None]


def _round(
    compute: Compute,
    here: int,
    capacity: int,
    k: int,
    trained: Any,
    x: jax.Array,
    frozen: Any,
    queues: Queues,
    number: jax.Array,
) -> Float[Array, "n C D"]:
    """Send the rows of a round, compute those that arrive, and return what comes back."""
    at, there = _places(queues, capacity, number)
    at = jnp.minimum(at, len(queues.order) - 1)
    swap = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    rows, expert = in_turn(swap, x[queues.order[at] // k], jnp.where(there, queues.expert[at], here))
    y = compute(rows.reshape(-1, x.shape[1]), expert.reshape(-1), trained, frozen)
    return swap(y.reshape(rows.shape))


def _targets(queues: Queues, capacity: int, number: jax.Array) -> Int[Array, "n C"]:
    """Return the number of each row of a round; R and more where there is none."""
    at, there = _places(queues, capacity, number)
    rows = len(queues.order)
    beyond = rows + jnp.arange(at.size, dtype=jnp.int32).reshape(at.shape)
    return jnp.where(there, queues.order[jnp.minimum(at, rows - 1)].astype(jnp.int32), beyond)


def _placed(y: jax.Array, out: jax.Array, queues: Queues, capacity: int, number: jax.Array) -> Float[Array, "R D"]:
    """Add the results of a round, each row's in its place."""
    return y.at[_targets(queues, capacity, number)].add(out, mode="drop", unique_indices=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _further(
    run: Callable, capacity: int, trained: Any, x: jax.Array, y: jax.Array, frozen: Any, queues: Queues, needed: jax.Array
):
    """Run the rounds after the first, and add their results to y."""

    def one(number: jax.Array, y: jax.Array) -> jax.Array:
        return _placed(y, run(trained, x, frozen, queues, number), queues, capacity, number)

    with about(0):
        return jax.lax.fori_loop(jnp.int32(1), needed, one, y)


def _forward(run, capacity, trained, x, y, frozen, queues, needed):
    return _further(run, capacity, trained, x, y, frozen, queues, needed), (trained, x, frozen, queues, needed)


def _backward(run, capacity, saved, gradient):
    trained, x, frozen, queues, needed = saved

    def one(number: jax.Array, sums: Any) -> Any:
        _, back = jax.vjp(lambda trained, x: run(trained, x, frozen, queues, number), trained, x)
        out = gradient.at[_targets(queues, capacity, number)].get(mode="fill", fill_value=0, unique_indices=True)
        return jax.tree.map(jnp.add, sums, back(out))

    with about(0):
        d_trained, d_x = jax.lax.fori_loop(jnp.int32(1), needed, one, jax.tree.map(jnp.zeros_like, (trained, x)))
    return d_trained, d_x, gradient, None, None, None


_further.defvjp(_forward, _backward)
