"""Splash attention: the Pallas kernel for TPUs that comes with JAX, with what packed training asks of it.

Blocks outside of the causal (or windowed) band are never computed, scores stay on the chip, and a key head serves its group of
query heads without being repeated. The kernel is jax.experimental.pallas.ops.tpu.splash_attention; this file feeds it.

Legend: B batch, T length, N heads, K kv heads, H head dim.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

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
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids), sinks))(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :t]


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
