"""Gated DeltaNet: a layer with a short convolution, the gated delta rule, and a gated norm.

Sources: Yang et al. 2024 (arXiv:2412.06464); transformers, models/qwen3_5 (`Qwen3_5GatedDeltaNet`). Families differ in how
they project queries, keys, values and gates; a family's subclass defines `project`.

Under a mesh, each device has all tokens of its rows for some of the heads (`ftjax.models.nn.over_heads`).

Legend: B batch, T length, E embed, K key heads, N value heads, D key size, V value size, W kernel size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ftjax.models.nn.cache import Memories, recall, remember
from ftjax.models.nn.context import Context
from ftjax.models.nn.delta_rule import gated_delta_rule
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import Linear, RMSNorm, activation
from ftjax.models.nn.memory import ConvState, RecurrentState
from ftjax.models.nn.over_heads import head_axes, on_each_device
from ftjax.models.nn.param import Init, param
from ftjax.models.nn.short_convolution import ShortConvolution, causal_conv

# Places of the inputs and results of a mixer, for `on_each_device`.
TOKENS, WEIGHTS = PartitionSpec("rows", None, "heads", None), PartitionSpec(None, None, "heads", None)
BY_HEAD, STATE = PartitionSpec("rows", None, "heads"), PartitionSpec("rows", "heads", None, None)
PLACES = (TOKENS,) * 3, (TOKENS,) * 3, (WEIGHTS,) * 3, BY_HEAD, BY_HEAD, STATE, PartitionSpec("rows", None)
OUT = TOKENS, (TOKENS,) * 3, STATE


class DeltaSizes(NamedTuple):
    """Heads and sizes of a gated DeltaNet; K divides N."""

    key_heads: int  # K
    value_heads: int  # N
    key_size: int  # D
    value_size: int  # V
    width: int  # W

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values."""
        keys = self.key_heads * self.key_size
        return keys, keys, self.value_heads * self.value_size

    @property
    def state(self) -> int:
        """Numbers in the state of all heads."""
        return self.value_heads * self.key_size * self.value_size


class Projected(NamedTuple):
    """What a gated DeltaNet computes of a token alone.

    Attributes:
        q, k: [B, T, K, D], before the convolution and without normalisation.
        v: [B, T, N, V], before the convolution.
        gate: [B, T, N, V], of the outputs.
        a, b: [B, T, N], of which the decay and the strength of a token are computed.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gate: jax.Array
    a: jax.Array
    b: jax.Array


class GatedNorm(RMSNorm):
    """`norm(x) * silu(gate)`, the gate in float32."""

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        return (super().__call__(x).astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class GatedDeltaNet(nnx.Module):
    """A gated DeltaNet without its input projections, which a subclass adds.

    Attributes:
        strongest: how strongly a token may overwrite what is held under its key, at most. Above 1, states may change sign.
    """

    strongest = 1.0

    def __init__(self, embed: int, sizes: DeltaSizes, act: str, eps: float):
        self.sizes, self.act = sizes, activation(act)
        self.state_flops = 6 * sizes.state  # a token reads the state, corrects it and reads it again
        self.memory = (
            ConvState(sum(sizes.channels), sizes.width - 1),
            RecurrentState((sizes.value_heads, sizes.key_size, sizes.value_size)),
        )
        self.conv1d = ShortConvolution(sum(sizes.channels), sizes.width)
        self.dt_bias = param((sizes.value_heads,), ("heads",), "dt_bias", init=Init("ones"))
        self.A_log = param((sizes.value_heads,), ("heads",), "A_log", init=Init("zeros"))
        self.norm = GatedNorm(sizes.value_size, eps)
        self.out_proj = Linear(sizes.channels[2], embed, ("heads", "embed"))

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> Projected:
        """Project `x [B, T, E]`."""
        raise NotImplementedError

    def attend(self, found: Projected, ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map the result of `project` to `([B, T, E], cache)`."""
        inputs, memory = self.memory
        b = found.a.shape[0]
        decay = -jnp.exp(self.A_log[...].astype(jnp.float32))
        g = decay * jax.nn.softplus(found.a.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        before = self.by_heads(recall(cache, layer, inputs, b, found.q.dtype))
        state = recall(cache, layer, memory, b, jnp.float32)
        taps = self.taps()

        def mix(parts: tuple, before: tuple, taps: tuple, g, beta, state, segments):
            mixed, last = zip(*map(lambda *own: self._convolved(*own, segments), parts, before, taps), strict=True)
            y, state = gated_delta_rule(*mixed, g, beta, state, segments)
            return y.astype(parts[0].dtype), last, state

        strength = self.strongest * jax.nn.sigmoid(found.b)
        values = (found.q, found.k, found.v), before, taps, g, strength, state, ctx.segment_ids
        keys = self.sizes.key_heads
        what = f"the {keys} key heads of the linear attention (linear_num_key_heads)"
        over = {"heads": head_axes(keys, lambda devices: keys % devices == 0, what)}
        y, last, state = on_each_device(mix, values, PLACES, OUT, over, b)
        last = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in last], axis=-1)
        cache = remember(remember(cache, layer, inputs, last), layer, memory, state)
        return self.output(y, found.gate, ctx), cache

    def output(self, y: Float[Array, "B T N V"], gate: Float[Array, "B T N V"], ctx: Context) -> Float[Array, "B T E"]:
        """Map the values that were read, and their gate, both `[B, T, N, V]`, to `[B, T, E]`."""
        return self.out_proj(self.norm(y, gate).reshape(*y.shape[:2], -1), ctx)

    def taps(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the kernels of the convolutions of queries, keys and values, `[1, W, heads, size]`."""
        return self.by_heads(self.conv1d.taps[None])

    def by_heads(self, x: Float[Array, "*of C"]) -> tuple[Float[Array, "*of _ _"], ...]:
        """Split `[..., channels]` into `[..., heads, size]` of queries, keys and values."""
        sizes, (keys, _, _) = self.sizes, self.sizes.channels
        heads = (sizes.key_heads, sizes.key_heads, sizes.value_heads)
        return tuple(
            part.reshape(*part.shape[:-1], own, -1)
            for part, own in zip(jnp.split(x, (keys, 2 * keys), axis=-1), heads, strict=True)
        )

    def _convolved(self, x: jax.Array, before: jax.Array, taps: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `act(conv(x))` and the inputs to remember; all by heads, `[B, T, heads, size]`."""
        x_, before_, taps_ = (part.reshape(*part.shape[:2], -1) for part in (x, before, taps))
        y, last = causal_conv(x_, taps_[0], before_, segments)
        return self.act(y).reshape(x.shape), last.reshape(before.shape)
