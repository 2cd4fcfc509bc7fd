"""Splash attention: the Pallas kernel for TPUs that comes with JAX, with what packed training asks of it.

Blocks outside of the causal (or windowed) band are never computed, scores stay on the chip, and a key head serves its group of
query heads without being repeated. The kernel is jax.experimental.pallas.ops.tpu.splash_attention; this file feeds it.

Legend: B batch, T length, N heads, K kv heads, H head dim.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from ftjax.models.gathered import in_order
from ftjax.models.kept import ATTENTION
from ftjax.models.pattern import MASKED, Pattern

LANES = 128  # a block is a multiple of so many tokens
BLOCK = 512  # tokens of a block at most


def splash(q, k, v, segments, sinks, pattern: Pattern, interpret: bool = False) -> jax.Array:
    """`[B, T, N, H]`: q `[B, T, N, H]` attends to k and v `[B, T, K, H]` of the same rows.

    Args:
        segments: [B, T] int32.
        sinks: [N], or None.
        interpret: run the kernel as plain JAX, which any backend can.
    """
    t = q.shape[1]
    padding = -t % LANES
    if padding:  # padded queries see padded keys only, and nothing reads them
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, padding)))
    kernel = _kernel(t + padding, q.shape[2], pattern.window, pattern.softcap, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in ((q * pattern.scale).astype(q.dtype), k.astype(q.dtype), v.astype(q.dtype)))

    def rows(q, k, v, segments, sinks):
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids), sinks))(q, k, v, segments)

    return _turned(rows, q, k, v, segments, sinks)[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turned(attend: Callable, *values) -> jax.Array:
    """`attend(*values)`, [B, N, T, H], as [B, T, N, H]; it keeps less for the backward pass than it would by itself.

    The kernel keeps its result, and the product after it keeps the same in an order of its own: here the first is made from the
    second again. And the kernel gives the log-sum-exp of a query once for each of 128 lanes: XLA would take the one that is
    kept when the backward pass comes to it, and hold all of them until then.
    """
    return attend(*values).swapaxes(1, 2)


def _turned_forward(attend: Callable, *values):
    out, pull = jax.vjp(attend, *values)
    kept, structure = jax.tree.flatten(pull)
    own = [place for place, leaf in enumerate(kept) if leaf is out]
    floats = {place: leaf for place, leaf in enumerate(kept) if place not in own and jnp.issubdtype(leaf.dtype, jnp.floating)}
    b, n, t, h = out.shape
    # As the product after it reads it: with heads for a dimension, a TPU's tiles would be of heads by their sizes.
    y, floats = jax.lax.optimization_barrier((in_order(out.swapaxes(1, 2).reshape(b, t, n * h)), floats))

    def backward(y, kept, gradient):
        y, gradient = jax.lax.optimization_barrier((y, gradient))  # not before the gradient is there
        kept = [in_order(y.reshape(b, t, n, h).swapaxes(1, 2)) if place in own else leaf for place, leaf in enumerate(kept)]
        return jax.tree.unflatten(structure, kept)(gradient.swapaxes(1, 2))

    kept = [None if place in own else floats.get(place, leaf) for place, leaf in enumerate(kept)]
    return y.reshape(b, t, n, h), jax.tree_util.Partial(backward, y, kept)


def _turned_backward(attend: Callable, backward: Callable, gradient: jax.Array):
    return backward(gradient)


_turned.defvjp(_turned_forward, _turned_backward)


@lru_cache
def _kernel(length: int, heads: int, window: int | None, softcap: float | None, interpret: bool):
    """The kernel and its tables of blocks, which are numpy arrays.

    JAX makes the tables as arrays of its own. In a thread of their own these belong to no trace and no mesh, whose devices
    may be described only (a program that is compiled for a machine which is not there).
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_make, length, heads, window, softcap, interpret).result()


def _make(length: int, heads: int, window: int | None, softcap: float | None, interpret: bool):
    shape = (length, length)
    mask = kernels.CausalMask(shape) if window is None else kernels.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in range(min(BLOCK, length), 0, -LANES) if length % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        mask_value=MASKED,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    return jax.tree.map(np.asarray, kernel)
