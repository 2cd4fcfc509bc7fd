"""Splash attention: JAX's Pallas kernel for TPUs, set up for packed training.

Blocks outside the causal (or windowed) band are skipped, scores stay on chip, and key heads are not repeated for their query
heads. The kernel is jax.experimental.pallas.ops.tpu.splash_attention.

Legend: B batch, T length, N heads, K kv heads, H head dim.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jaxtyping import Array, Float, Int

from ftjax.models.nn.attention_blockwise import MASKED
from ftjax.models.nn.gathered import in_order
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.remat import ATTENTION

LANES = 128  # the size of a block is a multiple of this
BLOCK = 512  # maximum block size in tokens


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None,
    pattern: Pattern,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute self-attention of packed rows.

    Args:
        interpret: run the kernel in interpret mode, which works on any backend.
    """
    t = q.shape[1]
    padding = -t % LANES
    if padding:  # padded queries see only padded keys, and their results are dropped
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, padding)))
    kernel = _kernel(t + padding, q.shape[2], pattern.window, pattern.softcap, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in ((q * pattern.scale).astype(q.dtype), k.astype(q.dtype), v.astype(q.dtype)))

    def rows(q, k, v, segments, sinks):
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids), sinks))(q, k, v, segments)

    return _transposed(rows, q, k, v, segments, sinks)[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed(attend: Callable, *values) -> jax.Array:
    """Return `attend(*values)`, [B, N, T, H], transposed to [B, T, N, H], with less saved for the backward pass.

    The kernel saves its output, and the output projection saves the same values transposed; here the former is rebuilt from
    the latter. The kernel also returns the log-sum-exp of a query once per lane, 128 times. XLA would select one of the copies
    only in the backward pass and hold all of them until then.
    """
    return attend(*values).swapaxes(1, 2)


def _transposed_forward(attend: Callable, *values):
    out, pull = jax.vjp(attend, *values)
    kept, structure = jax.tree.flatten(pull)
    own = [place for place, leaf in enumerate(kept) if leaf is out]
    floats = {place: leaf for place, leaf in enumerate(kept) if place not in own and jnp.issubdtype(leaf.dtype, jnp.floating)}
    b, n, t, h = out.shape
    # Use the shape that the output projection reads: with a separate dimension for heads, TPU tiles would be heads by head dim.
    y, floats = jax.lax.optimization_barrier((in_order(out.swapaxes(1, 2).reshape(b, t, n * h)), floats))

    def backward(y, kept, gradient):
        y, gradient = jax.lax.optimization_barrier((y, gradient))  # wait for the gradient
        kept = [in_order(y.reshape(b, t, n, h).swapaxes(1, 2)) if place in own else leaf for place, leaf in enumerate(kept)]
        return jax.tree.unflatten(structure, kept)(gradient.swapaxes(1, 2))

    kept = [None if place in own else floats.get(place, leaf) for place, leaf in enumerate(kept)]
    return y.reshape(b, t, n, h), jax.tree_util.Partial(backward, y, kept)


def _transposed_backward(attend: Callable, backward: Callable, gradient: jax.Array):
    return backward(gradient)


_transposed.defvjp(_transposed_forward, _transposed_backward)


@lru_cache
def _kernel(length: int, heads: int, window: int | None, softcap: float | None, interpret: bool):
    """Return the kernel, with its block tables as numpy arrays.

    JAX creates the tables as jax arrays. A separate thread keeps them out of the current trace and mesh, whose devices may be
    abstract (ahead-of-time compilation for another machine).
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
