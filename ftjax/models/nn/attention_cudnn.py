"""cuDNN's flash attention on NVIDIA GPUs, with packed documents.

jax.nn.dot_product_attention calls cuDNN but does not support packed documents. The private function that it calls does, with
offsets and lengths of at most `DOCUMENTS` documents per row, on Hopper and later. As it is private to JAX, it may be missing,
which is reported and does not crash. Keys and values are repeated for each query head because JAX before 0.12 strides through
packed keys by the number of query heads.

Legend: B batch, T length, N heads, K kv heads, H head dim, M maximum number of documents per row.
"""

import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from ftjax.models.nn.attention_blockwise import blockwise
from ftjax.models.nn.layer_types import Pattern

DOCUMENTS = 64  # rows with more fall back to `blockwise`; cuDNN's statistics take M x N x T floats per row


def _private():
    """Return JAX's private cuDNN module if it exists and supports packed rows, or None."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as module

        known = inspect.signature(module.dot_product_attention).parameters
    except (ImportError, AttributeError):
        return None
    needed = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "mask_type", "sliding_window_length", "scale"}
    return module if needed <= set(known) else None


def missing_here(device: jax.Device) -> str | None:
    """Return the reason why cuDNN's attention cannot be used on this device, or None."""
    if device.platform not in ("gpu", "cuda"):
        return "it needs an NVIDIA GPU"
    capability = float(getattr(device, "compute_capability", 0))
    if capability < 9:
        return f"packed rows need compute capability 9.0 (Hopper) or later, and this GPU has {capability}"
    return None if _private() else f"jax {jax.__version__} has no cuDNN attention that takes packed rows"


def missing_for(pattern: Pattern, sinks: jax.Array | None, dtype, head_dim: int) -> str | None:
    """Return the reason why cuDNN cannot compute this layer, or None."""
    if pattern.softcap is not None:
        return "it has no softcap"
    if sinks is not None:
        return "it has no attention sinks"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, and model.compute_dtype is {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes head dimensions that are multiples of 8 up to 256, and this model has {head_dim}"
    return None


def documents(
    segments: Int[Array, "B T"], most: int
) -> tuple[Int32[Array, "B {most}"], Int32[Array, "B {most}+1"], Int[Array, " B"]]:
    """Return lengths and offsets of the documents in each row, counting padding as one more document.

    Args:
        segments: a document is a run of equal numbers.
        most: M.

    Returns:
        lengths and offsets, filled with -1 in rows with fewer documents; and the number of documents. For rows
        with more than M documents, only the first M are returned.
    """
    b, t = segments.shape
    begins = jnp.concatenate([jnp.ones((b, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    starts = jax.vmap(lambda row: jnp.nonzero(row, size=most + 1, fill_value=t)[0])(begins).astype(jnp.int32)
    lengths = jnp.diff(starts, axis=1)
    return jnp.where(lengths > 0, lengths, -1), jnp.where(starts < t, starts, -1), jnp.sum(begins, axis=1)


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None,
    pattern: Pattern,
) -> Float[Array, "B T N H"]:
    """Compute self-attention of packed rows."""
    module = _private()
    lengths, offsets, count = documents(segments, DOCUMENTS)

    def fused(q, k, v):
        groups = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x.astype(q.dtype), groups, axis=2) for x in (k, v))
        return module.dot_product_attention(
            q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets, scale=pattern.scale,
            mask_type=module.MaskType.PADDING_CAUSAL, sliding_window_length=pattern.window,
        )  # fmt: skip

    def plain(q, k, v):
        return blockwise(q, k, v, segments, sinks, pattern)

    return jax.lax.cond(jnp.max(count) <= DOCUMENTS, fused, plain, q, k, v)
