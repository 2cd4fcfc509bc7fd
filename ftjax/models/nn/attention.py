"""Causal attention over packed rows. Every backend honours segment ids, windows, softcap and sinks, or raises an error.

Causality follows the order in a row (the slot), not the RoPE position, so that the same code serves packed training rows and
the KV cache.

Legend: B batch, T query length, S key length, N heads, K kv heads, G = N / K, H head dim, D size of values.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.nn.attention_blockwise import MASKED, blockwise
from ftjax.models.nn.attention_cudnn import cudnn, missing_for, missing_here
from ftjax.models.nn.attention_sharded import on_each_device
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Branching, Context
from ftjax.models.nn.device import on_one_cpu
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.memory import KeysValues
from ftjax.models.nn.paged import PagedCache
from ftjax.models.nn.rope import apply

# Of one sequence: N heads of queries, K of keys and values, of size H
QueriesKeysValues = tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]


def visible(
    q_segments: Int[Array, "B T"] | Branching,
    k_segments: Int[Array, "B S"] | Branching | None,
    offset: Int[Array, " B"] | int,
    slots: int,
    window: int | None,
) -> Bool[Array, "B T {slots}"]:
    """Return the attention mask: key s is in query t's document, not after it, and inside the window.

    Args:
        k_segments: None for a KV cache, whose rows are one document each; `Branching` if the queries' is.
        offset: slot of the first query, per row or the same for all.
        slots: S.
    """
    if isinstance(q_segments, Branching):
        slot = jnp.arange(slots, dtype=jnp.int32)[:, None]
        return (slot >= slot.T) & (slot < q_segments.ends[:, None, :])
    q_slot = jnp.asarray(offset, jnp.int32)[..., None, None] + jnp.arange(q_segments.shape[1], dtype=jnp.int32)[:, None]
    k_slot = jnp.arange(slots, dtype=jnp.int32)
    mask = k_slot <= q_slot
    if window is not None:
        mask &= q_slot - k_slot < window
    if k_segments is None:
        return jnp.broadcast_to(mask, (*q_segments.shape, slots))
    return mask & (q_segments[:, :, None] == k_segments[:, None, :])


def xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K D"],
    q_segments: Int[Array, "B T"] | Branching,
    k_segments: Int[Array, "B S"] | Branching | None,
    offset: Int[Array, " B"] | int,
    pattern: Pattern,
    sinks: Float[Array, " N"] | None = None,
    prefix: tuple[Float[Array, "virtual K H"], Float[Array, "virtual K D"], Bool[Array, "B T virtual"]] | None = None,
) -> Float[Array, "B T N D"]:
    """Compute attention in plain XLA, the reference: the full score matrix, softmax in float32."""
    b, t, n, h = q.shape
    kv = k.shape[2]
    mask = visible(q_segments, k_segments, offset, k.shape[1], pattern.window)
    if prefix is not None:
        before = [jnp.broadcast_to(x, (b, *x.shape)).astype(k.dtype) for x in prefix[:2]]
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
        mask = jnp.concatenate([prefix[2], mask], axis=-1)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.reshape(b, t, kv, n // kv, h)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * pattern.scale
    if pattern.softcap is not None:
        scores = pattern.softcap * jnp.tanh(scores / pattern.softcap)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    if sinks is not None:  # an extra score in the softmax, without a value
        sink = sinks.astype(jnp.float32).reshape(1, kv, n // kv, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    probabilities = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(q.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probabilities, v, precision=precision).reshape(b, t, n, v.shape[-1])


def splash(*inputs: Any, interpret: bool = False) -> jax.Array:
    """Call `ftjax.models.nn.attention_splash.splash`, imported here: only TPUs need Pallas, which takes long to import."""
    from ftjax.models.nn import attention_splash

    return attention_splash.splash(*inputs, interpret=interpret)


# Self-attention of packed rows on one device; arguments and result are those of `blockwise`. `splash_interpreted` is the TPU
# kernel in interpret mode, for tests.
KERNELS: dict[str, Callable[..., jax.Array]] = {
    "blockwise": blockwise,
    "splash": splash,
    "splash_interpreted": partial(splash, interpret=True),
    "cudnn": cudnn,
}
AUTO_CUDNN = "cudnn, or xla where that cannot"
BRANCHING = ("xla", "blockwise")  # know documents that share their start


def choose(name: str, device: jax.Device, devices: int = 1) -> str:
    """Return the backend for `model.attention` on devices of this kind.

    `auto` uses splash on TPUs; cuDNN on GPUs that support it, except in layers with features that cuDNN lacks; blockwise on a
    single CPU device; and plain XLA elsewhere: on several CPU devices, which serve to try out a mesh and compile faster with
    it, and on other GPUs, with a warning, because its memory grows with the square of the length.

    Raises UserError for a backend that is not available on the device.
    """
    if name == "auto":
        if device.platform == "tpu":
            return "splash"
        if device.platform == "cpu":
            return "blockwise" if devices == 1 else "xla"
        if reason := missing_here(device):
            warnings.warn(
                f"attention: xla, whose memory grows with the square of the length; not cudnn: {reason}", stacklevel=2
            )
            return "xla"
        return AUTO_CUDNN
    if name == "splash" and device.platform != "tpu":
        raise UserError(
            f"model.attention: splash is a kernel for TPUs, and this is a {device.platform}; auto chooses what is there"
        )
    if name == "cudnn" and (reason := missing_here(device)):
        raise UserError(f"model.attention: cudnn is not available: {reason}; auto chooses what is there")
    return name


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K D"],
    q_segments: Int[Array, "B T"] | Branching,
    k_segments: Int[Array, "B S"] | Branching | None,
    offset: Int[Array, " B"] | int,
    pattern: Pattern,
    backend: str,
    sinks: Float[Array, " N"] | None = None,
    prefix: tuple[Float[Array, "virtual K H"], Float[Array, "virtual K D"], Bool[Array, "B T virtual"]] | None = None,
) -> Float[Array, "B T N D"]:
    """Compute attention of q over k and v.

    Args:
        q_segments: queries attend only to keys of the same segment, or to those that `Branching` gives them.
        k_segments: None for a KV cache, whose rows are one document each.
        offset: slot of the first query, per row or the same for all.
        pattern: scale, window and softcap of this layer.
        backend: the result of `choose`. Attention over a KV cache (few queries, so few scores) or with a prefix falls back to
            plain XLA.
        sinks: a learned score per head that takes part in the softmax without a value (gpt-oss); or None.
        prefix: keys and values that precede every document, and a mask of who sees them; or None.
    """
    size, values = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    if backend in ("cudnn", AUTO_CUDNN) and (reason := missing_for(pattern, sinks, q.dtype, size)):
        if backend == "cudnn":
            raise UserError(f"model.attention: cudnn cannot compute this model: {reason}; auto uses xla for such layers")
        backend = "xla"
    if backend == "xla" or k_segments is not q_segments or prefix is not None:
        return xla(q, k, v, q_segments, k_segments, offset, pattern, sinks, prefix)
    kernel = KERNELS["cudnn" if backend == AUTO_CUDNN else backend]
    # The kernels support a single head size; zeros change neither scores nor the other values.
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, size - x.shape[-1]),)) if x.shape[-1] < size else x for x in (q, k, v))
    return on_each_device(partial(_with_pattern, kernel, pattern), q, k, v, q_segments, sinks)[..., :values]


def _with_pattern(kernel, pattern, q, k, v, segments, sinks):
    return kernel(q, k, v, segments, sinks, pattern)


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"] | None,
    v: Float[Array, "B T K D"] | None,
    ctx: Context,
    pattern: Pattern,
    layer,
    cache: Memories,
    sinks: Float[Array, " N"] | None = None,
    name: str = "",
    rotate: Callable[..., jax.Array] = apply,
) -> tuple[Float[Array, "B T _"], Memories]:
    """Compute attention of q over the cache and the tokens' k and v; return it, heads side by side, and the cache.

    Queries and keys are rotated here unless `ctx.rope` is None, in layers without RoPE.

    Args:
        k, v: None in a layer that shares those of the last layer that wrote under `name` (`ftjax.models.nn.memory`).
        rotate: applies RoPE, to pairs of dimensions as the family's weights have them.
    """
    b, t = q.shape[:2]
    if ctx.rope is not None:
        q, k = rotate(q, *ctx.rope), None if k is None else rotate(k, *ctx.rope)
    q = constrain(q, "batch", "length", "heads", None)
    own = seen = _chunks(ctx, pattern) if ctx.ends is None else Branching(ctx.segment_ids, ctx.ends)
    offset = 0
    if isinstance(cache, PagedCache):
        record = cache.layout.named(name) if k is None else KeysValues(*k.shape[2:], v.shape[-1], name)
        if cache.attends(record, pattern, sinks is not None, ctx.prefix is not None):
            cache = cache if k is None else cache.put(layer, k, v, name)
            return cache.attend(layer, record, q, pattern).reshape(b, t, -1), cache
        if on_one_cpu():
            cache = cache if k is None else cache.put(layer, k, v, name)
            return cache.stream(layer, record, q, pattern, sinks, _before(ctx, pattern, layer)).reshape(b, t, -1), cache
    if cache is not None:
        if k is None:
            k, v = cache.shared(layer, name)
        else:
            cache, k, v = cache.write(layer, k, v, name)
        if cache.lengths is not None:  # a row that decodes is one document
            own, seen = _chunks_of_slots(ctx, pattern, k.shape[1])
            offset = cache.lengths
    y = attend(q, k, v, own, seen, offset, pattern, ctx.attention, sinks, _before(ctx, pattern, layer))
    return y.reshape(b, t, -1), cache


def _chunks(ctx: Context, pattern: Pattern) -> Int[Array, "B T"]:
    """Return segment ids in which each chunk is a document of its own, so that every backend keeps to chunks."""
    if pattern.chunk is None:
        return ctx.segment_ids
    each = -(-(ctx.positions.shape[1] + _virtual(ctx)) // pattern.chunk)  # chunks of a document at most
    return jnp.where(ctx.segment_ids == 0, 0, ctx.segment_ids * each + ctx.positions // pattern.chunk)


def _chunks_of_slots(ctx: Context, pattern: Pattern, slots: int) -> tuple[Int[Array, "B T"], Int[Array, "B {slots}"] | None]:
    """Return segment ids of queries and of the slots of a KV cache, whose rows are one document each."""
    if pattern.chunk is None:
        return ctx.segment_ids, None
    place = (jnp.arange(slots, dtype=jnp.int32) + _virtual(ctx)) // pattern.chunk
    return ctx.positions // pattern.chunk, jnp.broadcast_to(place, (ctx.positions.shape[0], slots))


def _virtual(ctx: Context) -> int:
    """Return the number of virtual tokens before each document."""
    return 0 if ctx.prefix is None else ctx.prefix.keys.shape[1]


def _before(ctx: Context, pattern: Pattern, layer) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """Return this layer's virtual tokens `[V, K, H]`, and a mask of the tokens whose window or chunk has them, or None."""
    if ctx.prefix is None:
        return None
    keys, values = ctx.prefix.keys[layer], ctx.prefix.values[layer]
    positions, virtual = ctx.positions[:, :, None], jnp.arange(keys.shape[0], dtype=jnp.int32)
    seen = jnp.ones((*ctx.positions.shape, keys.shape[0]), bool)
    if pattern.window is not None:
        seen &= positions - virtual < pattern.window
    if pattern.chunk is not None:
        seen &= positions // pattern.chunk == virtual // pattern.chunk
    return keys, values, seen
