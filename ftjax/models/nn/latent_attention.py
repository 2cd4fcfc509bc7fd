"""Multi-head latent attention (MLA): DeepSeek-AI 2024 (arXiv:2405.04434, section 2.1).

The keys and values of all heads are computed from one small vector per token, its latent. RoPE applies to a part of each query
and to one more key, which all heads share. A cache holds only the latent and that key.

Legend: B batch, T query length, S key length, E embed, N heads, R size of the latent, V size of a value.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.mesh import constrain
from ftjax.models.nn.attention import attend
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import Linear, RMSNorm
from ftjax.models.nn.memory import LATENT, KeysValues
from ftjax.models.nn.rope import apply_interleaved

NORM_EPS = 1e-6  # of the norms of latents, whatever config.json says


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of latent attention.

    Attributes:
        queries: size of the latent of queries; None: queries are projected from the hidden states.
        latent: R, the size of the latent of keys and values.
        plain, rotated: sizes of the parts of a query and key without and with RoPE.
        value: V.
    """

    queries: int | None
    latent: int
    plain: int
    rotated: int
    value: int

    @property
    def head(self) -> int:
        """Size of a query and of a key."""
        return self.plain + self.rotated


class LatentAttention(nnx.Module):
    """Attention whose keys and values are computed from one latent per token.

    The rotated key and the latent are remembered as the key and the value of one head.
    """

    def __init__(
        self, embed: int, heads: int, sizes: LatentSizes, bias: bool, rotate: Callable[..., jax.Array] = apply_interleaved
    ):
        self.heads, self.head_dim, self.value_dim, self.sizes, self.rotate = heads, sizes.head, sizes.value, sizes, rotate
        self.memory = (KeysValues(1, sizes.rotated, sizes.latent, LATENT),)
        if sizes.queries is None:
            self.q_proj = Linear(embed, heads * sizes.head, ("embed", "heads"))
        else:  # a latent's axis is named `embed` where it is an input, so that these weights are sharded too
            self.q_a_proj = Linear(embed, sizes.queries, ("embed", None), bias=bias)
            self.q_a_layernorm = RMSNorm(sizes.queries, NORM_EPS)
            self.q_b_proj = Linear(sizes.queries, heads * sizes.head, ("embed", "heads"))
        self.kv_a_proj_with_mqa = Linear(embed, sizes.latent + sizes.rotated, ("embed", None), bias=bias)
        self.kv_a_layernorm = RMSNorm(sizes.latent, NORM_EPS)
        self.kv_b_proj = Linear(sizes.latent, heads * (sizes.plain + sizes.value), ("embed", "heads"))
        self.o_proj = Linear(heads * sizes.value, embed, ("heads", "embed"), bias=bias)

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map `x [B, T, E]` to `([B, T, E], cache)`."""
        assert ctx.prefix is None  # `ftjax.models.nn.memory.one_for_all` refuses virtual tokens
        b, t, _ = x.shape
        q, k, latent = self.project(x, ctx)
        segments, offset = ctx.segment_ids, 0
        if cache is not None:
            cache, k, latent = cache.write(layer, k, latent, LATENT)
            if cache.lengths is not None:  # a row that decodes is one document
                segments, offset = None, cache.lengths
        if segments is None and t == 1:
            y = self.absorbed(q, k.astype(q.dtype), latent.astype(q.dtype), ctx, offset, pattern)
        else:
            keys, values = self.expand(k.astype(q.dtype), latent.astype(q.dtype), ctx)
            y = attend(q, keys, values, ctx.segment_ids, segments, offset, pattern, ctx.attention)
        return self.o_proj(y.reshape(b, t, -1), ctx), cache

    def project(
        self, x: Float[Array, "B T E"], ctx: Context
    ) -> tuple[Float[Array, "B T N _"], Float[Array, "B T 1 rotated"], Float[Array, "B T 1 R"]]:
        """Project `x [B, T, E]` to queries `[B, T, N, plain + rotated]`, shared keys `[B, T, 1, rotated]`, both after RoPE, and
        latents `[B, T, 1, R]`."""
        b, t, _ = x.shape
        plain, rotated = jnp.split(self.queries(x, ctx).reshape(b, t, self.heads, -1), [self.sizes.plain], axis=-1)
        q = jnp.concatenate([plain, self.rotate(rotated, *ctx.rope)], axis=-1)
        latent, k = jnp.split(self.kv_a_proj_with_mqa(x, ctx), [self.sizes.latent], axis=-1)
        k = self.rotate(k[:, :, None], *ctx.rope)
        return constrain(q, "batch", "length", "heads", None), k, self.kv_a_layernorm(latent)[:, :, None]

    def queries(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T _"]:
        if self.sizes.queries is None:
            return self.q_proj(x, ctx)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x, ctx)), ctx)

    def expand(
        self, k: Float[Array, "B S 1 rotated"], latent: Float[Array, "B S 1 R"], ctx: Context
    ) -> tuple[Float[Array, "B S N _"], Float[Array, "B S N V"]]:
        """Compute the keys `[B, S, N, plain + rotated]` and values `[B, S, N, V]` of all heads."""
        b, s = latent.shape[:2]
        both = self.kv_b_proj(latent[:, :, 0], ctx).reshape(b, s, self.heads, -1)
        plain, values = jnp.split(both, [self.sizes.plain], axis=-1)
        keys = jnp.concatenate([plain, jnp.broadcast_to(k, (b, s, self.heads, k.shape[-1]))], axis=-1)
        return tuple(constrain(x, "batch", "length", "heads", None) for x in (keys, values))

    def absorbed(
        self, q: Float[Array, "B T N _"], k: Float[Array, "B S 1 rotated"], latent: Float[Array, "B S 1 R"], ctx: Context,
        offset: jax.Array, pattern: Pattern,
    ) -> Float[Array, "B T N V"]:  # fmt: skip
        """Compute attention over latents without expanding them: `q . (W c) = (W^T q) . c`, and likewise for the values.

        With few queries this takes a fraction of the arithmetic. The matrix W of `kv_b_proj` is its value at the unit vectors,
        which includes an adapter's update.
        """
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        units = jnp.eye(self.sizes.latent, dtype=q.dtype)[None]
        matrix = self.kv_b_proj(units, replace(ctx, dropout=None))[0].reshape(self.sizes.latent, self.heads, -1)
        of_keys, of_values = jnp.split(matrix, [self.sizes.plain], axis=-1)
        plain, rotated = jnp.split(q, [self.sizes.plain], axis=-1)
        q = jnp.concatenate([jnp.einsum("btnh,rnh->btnr", plain, of_keys, precision=precision), rotated], axis=-1)
        keys = jnp.concatenate([latent, k], axis=-1)
        y = attend(q, keys, latent, ctx.segment_ids, None, offset, pattern, ctx.attention)
        return jnp.einsum("btnr,rnv->btnv", y, of_values, precision=precision)
