"""Attention over keys and values in pages on one CPU: some pages of every row at a time, as far as the longest text goes.

Plain XLA first gathers all pages of every table: it writes a copy of the keys and values to memory and reads it again, for
texts that do not need the whole table, too. Here a loop gathers a block that stays in the processor's cache, and adds to a
softmax that is kept up to date (Milakov and Gimelshein 2018, arXiv:1805.02867). How often it runs is known only at run time, so
one program serves texts of every length. Blocks that a row does not see leave its result as it is, to the bit.

Legend: B rows, T query length, N heads, K kv heads, G = N / K, H head dim, D size of values, P pages, W tokens of a page, n
pages of a row's table, S slots of a block, l layers with the same record.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from ftjax.models.nn.attention_blockwise import MASKED
from ftjax.models.nn.layer_types import Pattern

BLOCK = 1 << 22  # most bytes of a block's keys and values, and of its scores, about what the second-level caches hold
LONGEST = 256  # most tokens of a block
FEW_HEADS = 8  # most key heads that are multiplied side by side: the products grow with their number

Sums = tuple[jax.Array, jax.Array, jax.Array]  # of each query: highest score, sum of weights, sum of weighted values


def streamed(
    q: Float[Array, "B T N H"], keys: Float[Array, "l P W K H"], values: Float[Array, "l P W K D"], place: jax.Array | int,
    table: Int32[Array, "B n"], before: Int32[Array, " B"], counts: Int32[Array, " B"], pattern: Pattern,
    sinks: Float[Array, " N"] | None = None,
    prefix: tuple[Float[Array, "virtual K H"], Float[Array, "virtual K D"], Bool[Array, "B T virtual"]] | None = None,
) -> Float[Array, "B T N D"]:  # fmt: skip
    """Compute attention of each row's next T tokens, whose keys and values are in its pages already.

    Args:
        place: index of the layer's pages.
        before: tokens of the row before these.
        counts: how many of the T are not padding, for whose queries the results mean nothing.
        sinks, prefix: as in `ftjax.models.nn.attention.attend`; virtual tokens come before slot 0.
    """
    b, t, n, h = q.shape
    kv, size = keys.shape[3], keys.shape[2]
    q = q.reshape(b, t, kv, n // kv, h)
    pages = _pages_of_a_block(q, keys, values, table.shape[1])
    slots, virtual = pages * size, 0 if prefix is None else prefix[0].shape[0]
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))
    query = before[:, None] + jnp.arange(t, dtype=jnp.int32)

    def block(number: jax.Array, sums: Sums) -> Sums:
        here = jax.lax.dynamic_slice_in_dim(table, number * pages, pages, axis=1)
        k, v = (x.at[place, here].get(mode="promise_in_bounds").reshape(b, slots, kv, -1) for x in (keys, values))
        return _add(sums, q, k, v, _seen(query, number * slots + jnp.arange(slots, dtype=jnp.int32), pattern, virtual), pattern)

    sums = _start(q, values.shape[-1], sinks)
    if prefix is not None:
        sums = _add(sums, q, *(jnp.broadcast_to(x, (b, *x.shape)) for x in prefix[:2]), prefix[2], pattern)
    active = counts > 0
    first = jnp.min(jnp.where(active, _first_seen(before, pattern, virtual), jnp.iinfo(jnp.int32).max))
    end = jnp.max(jnp.where(active, before + counts, 0))
    _, weights, sums = jax.lax.fori_loop(first // slots, (end + slots - 1) // slots, block, sums)
    return jnp.moveaxis(sums / weights[..., None], 3, 1).reshape(b, t, n, -1).astype(q.dtype)


def _pages_of_a_block(q: jax.Array, keys: jax.Array, values: jax.Array, longest: int) -> int:
    (b, t, kv, g, _), size = q.shape, keys.shape[2]
    bytes_of_slot = max(b * kv * (keys.shape[-1] + values.shape[-1]) * keys.dtype.itemsize, 4 * b * t * kv * g)
    return min(longest, max(1, min(LONGEST, BLOCK // bytes_of_slot) // size))


def _first_seen(before: Int32[Array, " B"], pattern: Pattern, virtual: int) -> Int32[Array, " B"]:
    """Return the first slot that the first of a row's queries sees."""
    first = jnp.zeros_like(before)
    if pattern.window is not None:
        first = jnp.maximum(first, before - pattern.window + 1)
    if pattern.chunk is not None:
        first = jnp.maximum(first, (before + virtual) // pattern.chunk * pattern.chunk - virtual)
    return first


def _seen(query: Int32[Array, "B T"], slot: Int32[Array, " S"], pattern: Pattern, virtual: int) -> Bool[Array, "B T S"]:
    """Return the attention mask of a block: key s is not after query t, and inside its window and chunk."""
    query = query[..., None]
    mask = slot <= query
    if pattern.window is not None:
        mask &= query - slot < pattern.window
    if pattern.chunk is not None:
        mask &= (query + virtual) // pattern.chunk == (slot + virtual) // pattern.chunk
    return mask


def _start(q: Float[Array, "B T K G H"], size: int, sinks: Float[Array, " N"] | None) -> Sums:
    """Return the sums before the first block: a sink is a score without a value."""
    b, t, kv, g, _ = q.shape
    shape = b, kv, g, t
    if sinks is None:
        highest, weights = jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        highest = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(kv, g, 1), shape)
        weights = jnp.ones(shape, jnp.float32)
    return highest, weights, jnp.zeros((*shape, size), jnp.float32)


def _add(
    sums: Sums, q: Float[Array, "B T K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K D"],
    mask: Bool[Array, "B T S"], pattern: Pattern,
) -> Sums:  # fmt: skip
    """Return the sums after another block of keys and values."""
    highest, weights, values = sums
    kv, precision = k.shape[2], jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    side_by_side = q.shape[1] == 1 and 1 < kv <= FEW_HEADS
    scores = _scores_side_by_side(q, k, precision) if side_by_side else jnp.einsum(
        "btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip
    scores = scores * pattern.scale
    if pattern.softcap is not None:
        scores = pattern.softcap * jnp.tanh(scores / pattern.softcap)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    new = jnp.maximum(highest, jnp.max(scores, axis=-1))
    kept, found = jnp.exp(highest - new), jnp.exp(scores - new[..., None])
    probabilities = found.astype(q.dtype)
    more = _values_side_by_side(probabilities, v, precision) if side_by_side else jnp.einsum(
        "bkgts,bskh->bkgth", probabilities, v, precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip
    return new, weights * kept + jnp.sum(found, axis=-1), values * kept[..., None] + more


def _scores_side_by_side(
    q: Float[Array, "B 1 K G H"], k: Float[Array, "B S K H"], precision: Any
) -> Float[Array, "B K G 1 S"]:  # fmt: skip
    """Return the products of each row's only query with its keys, one matrix product per row.

    The heads of a key are one vector here, and a query has zeros for the other heads. For one product per head, XLA first
    copies all keys into another order on a CPU, which takes longer than to multiply by zeros.
    """
    b, _, kv, g, h = q.shape
    wide = jnp.where(jnp.eye(kv, dtype=bool)[:, None, :, None], q[:, 0, :, :, None], 0).reshape(b, kv * g, kv * h)
    over = (((2,), (2,)), ((0,), (0,)))
    scores = jax.lax.dot_general(  # keys first: as the second operand they would be transposed
        k.reshape(b, -1, kv * h), wide, over, precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip
    scores = jax.lax.optimization_barrier(scores)  # or XLA swaps the operands back
    return jnp.swapaxes(scores, 1, 2).reshape(b, kv, g, 1, -1)


def _values_side_by_side(
    probabilities: Float[Array, "B K G 1 S"], v: Float[Array, "B S K D"], precision: Any
) -> Float[Array, "B K G 1 D"]:  # fmt: skip
    """Return the sums of the values, weighted by head; each product also has those of the other heads, which are left out."""
    b, kv, g, _, slots = probabilities.shape
    over = (((2,), (1,)), ((0,), (0,)))
    wide = jax.lax.dot_general(
        probabilities.reshape(b, kv * g, slots), v.reshape(b, slots, -1), over, precision=precision,
        preferred_element_type=jnp.float32,
    ).reshape(b, kv, g, kv, -1)  # fmt: skip
    return jnp.stack([wide[:, head, :, head] for head in range(kv)], axis=1)[:, :, :, None]
