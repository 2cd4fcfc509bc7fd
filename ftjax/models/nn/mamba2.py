"""Mamba-2: a layer with a short convolution, a state space whose steps depend on the token, and a gated norm.

Sources: Dao and Gu 2024 (arXiv:2405.21060); transformers, models/bamba (`BambaMixer`), from which other families inherit.

Under a mesh, each device has all tokens of its rows for some of the heads (`ftjax.models.nn.over_heads`). Where there are more
devices than groups, each has the keys and queries of all groups, and uses those of its heads.

Legend: B batch, T length, E embed, N heads, D size of a head, K groups, H size of the state, W kernel size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ftjax.models.nn.cache import Memories, recall, remember
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import Linear, activation, unit_rms
from ftjax.models.nn.memory import ConvState, RecurrentState
from ftjax.models.nn.over_heads import head_axes, on_each_device
from ftjax.models.nn.param import Init, param
from ftjax.models.nn.short_convolution import ShortConvolution, causal_conv
from ftjax.models.nn.ssd import state_space

# Places of the inputs and results of the mixer, for `on_each_device`.
TOKENS = tuple(PartitionSpec("rows", None, name, None) for name in ("heads", "groups", "groups"))
WEIGHTS = tuple(PartitionSpec(None, None, name, None) for name in ("heads", "groups", "groups"))
STATE, OF_HEADS = PartitionSpec("rows", "heads", None, None), PartitionSpec("heads")
PLACES = (
    TOKENS, TOKENS, WEIGHTS, WEIGHTS, PartitionSpec("rows", None, "heads"), OF_HEADS, OF_HEADS, STATE,
    PartitionSpec("rows", None),
)  # fmt: skip
OUT = TOKENS[0], TOKENS, STATE


class MambaSizes(NamedTuple):
    """Heads and sizes of a Mamba-2 layer; K divides N."""

    heads: int  # N
    head_dim: int  # D
    groups: int  # K
    state: int  # H
    width: int  # W

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of values, keys and queries (x, B and C), which are convolved."""
        return self.heads * self.head_dim, self.groups * self.state, self.groups * self.state

    def fit(self, devices: int) -> bool:
        """Return whether the heads can be split over so many devices, each with whole groups or with a part of one."""
        return self.heads % devices == 0 and (self.groups % devices == 0 or devices % self.groups == 0)


class GatedGroupNorm(nnx.Module):
    """`norm(x * silu(gate))`, an RMS norm over the channels of each group, in float32.

    With `gate_last`, it is `norm(x) * silu(gate)`; with `eps` None there is no norm, and no weight.
    """

    def __init__(self, size: int, groups: int, eps: float | None, *, gate_last: bool = False):
        self.groups, self.eps, self.gate_last = groups, eps, gate_last
        self.weight = None if eps is None else param((size,), ("norm",), "weight", init=Init("ones"))

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        y, gate = x.astype(jnp.float32), jax.nn.silu(gate.astype(jnp.float32))
        if self.weight is None:
            return (y * gate).astype(x.dtype)
        y = y if self.gate_last else y * gate
        y = unit_rms(y.reshape(*y.shape[:-1], self.groups, -1), self.eps).reshape(y.shape)
        y = y * self.weight[...].astype(jnp.float32)
        return (y * gate if self.gate_last else y).astype(x.dtype)


class Mamba2(nnx.Module):
    """A Mamba-2 layer. Its input projection has gate, values, keys, queries and step of a token side by side."""

    def __init__(
        self,
        embed: int,
        sizes: MambaSizes,
        act: str,
        norm: GatedGroupNorm,
        *,
        bias: bool,
        conv_bias: bool,
        bias_out: bool | None = None,
        limits: tuple[float, float] = (0.0, math.inf),
    ):
        """Create abstract weights.

        Args:
            act: activation after the convolution.
            bias, bias_out: whether the projections have biases; `bias_out` overrides that of the output's.
            limits: smallest and largest step.
        """
        self.sizes, self.act, self.limits = sizes, activation(act), limits
        self.state_flops = 4 * sizes.heads * sizes.head_dim * sizes.state  # a token writes to the state, and reads it
        self.memory = (
            ConvState(sum(sizes.channels), sizes.width - 1),
            RecurrentState((sizes.heads, sizes.state, sizes.head_dim)),
        )
        values = sizes.channels[0]
        self.in_proj = Linear(embed, values + sum(sizes.channels) + sizes.heads, ("embed", "heads"), bias=bias)
        self.conv1d = ShortConvolution(sum(sizes.channels), sizes.width, bias=conv_bias)
        self.dt_bias = param((sizes.heads,), ("heads",), "dt_bias", init=Init("ones"))
        self.A_log = param((sizes.heads,), ("heads",), "A_log", init=Init("zeros"))
        self.D = param((sizes.heads,), ("heads",), "D", init=Init("ones"))
        self.norm = norm
        self.out_proj = Linear(values, embed, ("heads", "embed"), bias=bias if bias_out is None else bias_out)

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T _"]:
        """Project `x [B, T, E]`."""
        return self.in_proj(x, ctx)

    def attend(self, found: Float[Array, "B T _"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map the result of `project` to `([B, T, E], cache)`."""
        (inputs, memory), sizes, (b, t, size) = self.memory, self.sizes, found.shape
        gate, convolved, step = jnp.split(found, (sizes.channels[0], size - sizes.heads), axis=-1)
        step = jax.nn.softplus(step.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        step = step if self.limits == (0.0, math.inf) else jnp.clip(step, *self.limits)
        rate, skip = -jnp.exp(self.A_log[...].astype(jnp.float32)), self.D[...].astype(jnp.float32)
        bias = jnp.zeros(sum(sizes.channels)) if self.conv1d.bias is None else self.conv1d.bias[...]
        before = recall(cache, layer, inputs, b, found.dtype)
        state = recall(cache, layer, memory, b, jnp.float32)
        split = map(self.by_heads, (convolved, before, self.conv1d.taps[None], bias[None, None]))
        over = head_axes(sizes.heads, sizes.fit, f"the {sizes.heads} heads of Mamba-2, in {sizes.groups} groups,")
        devices = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in over)
        axes = {"heads": over, "groups": over if sizes.groups % devices == 0 else ()}

        def mix(parts: tuple, before: tuple, taps: tuple, biases: tuple, step, rate, skip, state, segments):
            mixed, last = zip(*map(lambda *own: self._convolved(*own, segments), parts, before, taps, biases), strict=True)
            x, keys, queries = mixed
            if over and not axes["groups"]:
                own = jax.lax.axis_index(over) * sizes.groups // devices
                keys, queries = (jax.lax.dynamic_slice_in_dim(part, own, 1, axis=2) for part in (keys, queries))
            y, state = state_space(x, keys, queries, step, rate, state, segments)
            return (y + skip[:, None] * x.astype(jnp.float32)).astype(x.dtype), last, state

        y, last, state = on_each_device(mix, (*split, step, rate, skip, state, ctx.segment_ids), PLACES, OUT, axes, b)
        last = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in last], axis=-1)
        cache = remember(remember(cache, layer, inputs, last), layer, memory, state)
        return self.out_proj(self.norm(y.reshape(b, t, -1), gate), ctx), cache

    def by_heads(self, x: Float[Array, "*of C"]) -> tuple[Float[Array, "*of _ _"], ...]:
        """Split `[..., channels]` into `[..., heads or groups, size]` of values, keys and queries."""
        values, keys, _ = self.sizes.channels
        heads = (self.sizes.heads, self.sizes.groups, self.sizes.groups)
        parts = jnp.split(x, (values, values + keys), axis=-1)
        return tuple(part.reshape(*part.shape[:-1], own, -1) for part, own in zip(parts, heads, strict=True))

    def _convolved(self, x, before, taps, bias, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `act(conv(x))` and the inputs to remember; all by heads, `[B, T, heads, size]`."""
        x_, before_, taps_, bias_ = (part.reshape(*part.shape[:2], -1) for part in (x, before, taps, bias))
        y, last = causal_conv(x_, taps_[0], before_, segments, bias_[0, 0])
        return self.act(y).reshape(x.shape), last.reshape(before.shape)
