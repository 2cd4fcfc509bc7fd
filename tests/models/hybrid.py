"""Builds a tiny model whose layers remember different things, from the parts of real families.

Legend: B batch, T query length, E embed, N heads, K kv heads, H head dim, C channels.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ftjax.models.causal_lm import Sizes
from ftjax.models.llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from ftjax.models.model import Model
from ftjax.models.nn.attention import self_attention
from ftjax.models.nn.cache import Memories, recall, remember
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import Linear, RMSNorm
from ftjax.models.nn.memory import ConvState, KeysValues, RecurrentState, Shared
from ftjax.models.nn.param import param
from ftjax.models.nn.recurrence import recur
from ftjax.models.nn.rope import Rope
from ftjax.models.nn.short_convolution import causal_conv
from ftjax.models.nn.stack import Stack

V, E, N, H = 96, 24, 4, 8


class Mixer(nnx.Module):
    """Computes `x + mix(norm(x))`; subclasses define `mix`."""

    def __init__(self, mix: nnx.Module):
        self.norm, self.mix = RMSNorm(E, 1e-5), mix

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        y, cache = self.mix(self.norm(x), ctx, pattern, layer, cache)
        return x + y, cache, jnp.float32(0)


class OtherSizes(nnx.Module):
    """Attention whose values have another size than its keys; later layers may share both."""

    def __init__(self, kv_heads: int, key_dim: int, value_dim: int, name: str = ""):
        self.memory = (KeysValues(kv_heads, key_dim, value_dim, name),)
        self.q = Linear(E, N * key_dim, ("embed", "heads"))
        self.k = Linear(E, kv_heads * key_dim, ("embed", "kv_heads"))
        self.v = Linear(E, kv_heads * value_dim, ("embed", "kv_heads"))
        self.o = Linear(N * value_dim, E, ("heads", "embed"))

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        [own], (b, t, _) = self.memory, x.shape
        q, k = self.q(x, ctx).reshape(b, t, N, -1), self.k(x, ctx).reshape(b, t, own.kv_heads, -1)
        v = self.v(x, ctx).reshape(b, t, own.kv_heads, -1)
        y, cache = self_attention(q, k, v, replace(ctx, rope=None), pattern, layer, cache, name=own.name)
        return self.o(y, ctx), cache


class Sharing(nnx.Module):
    """Attention with its own queries, on the keys and values of an earlier layer."""

    def __init__(self, key_dim: int, value_dim: int, name: str):
        self.memory = (Shared(name),)
        self.q = Linear(E, N * key_dim, ("embed", "heads"))
        self.o = Linear(N * value_dim, E, ("heads", "embed"))

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        q = self.q(x, ctx).reshape(*x.shape[:2], N, -1)
        y, cache = self_attention(q, None, None, replace(ctx, rope=None), pattern, layer, cache, name=self.memory[0].name)
        return self.o(y, ctx), cache


class Conv(nnx.Module):
    """A gated causal convolution of `width + 1` tokens."""

    def __init__(self, width: int):
        self.memory = (ConvState(E, width),)
        self.gate = Linear(E, E, ("embed", None))
        self.weight = param((width + 1, E), (None, "embed"), "weight")

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        [own] = self.memory
        before = recall(cache, layer, own, x.shape[0], x.dtype)
        y, last = causal_conv(x, self.weight[...], before, ctx.segment_ids)
        return y * jax.nn.silu(self.gate(x, ctx)), remember(cache, layer, own, last)


class Recurrence(nnx.Module):
    """Gated linear attention after a convolution: `S = decay * S + k v^T`, `y = q S`. It remembers two things."""

    def __init__(self):
        self.memory = (ConvState(E, 1, "inputs"), RecurrentState((N, H, H)))
        self.state_flops = 4 * N * H * H  # k v^T and q S
        self.weight = param((2, E), (None, "embed"), "weight")
        self.qkvg = Linear(E, 4 * N * H, ("embed", "heads"))
        self.o = Linear(N * H, E, ("heads", "embed"))

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        inputs, state = self.memory
        b, t, _ = x.shape
        x, last = causal_conv(x, self.weight[...], recall(cache, layer, inputs, b, x.dtype), ctx.segment_ids)
        q, k, v, g = jnp.split(self.qkvg(x, ctx).reshape(b, t, N, 4 * H), 4, axis=-1)

        def step(memory: jax.Array, own: tuple) -> tuple[jax.Array, jax.Array]:
            q, k, v, g = own
            memory = jax.nn.sigmoid(g)[..., None] * memory + jnp.einsum("bnk,bnv->bnkv", k, v)
            return memory, jnp.einsum("bnh,bnhv->bnv", q, memory)

        y, after = recur(step, recall(cache, layer, state, b, x.dtype), (q, k, v, g), ctx.segment_ids)
        cache = remember(remember(cache, layer, inputs, last), layer, state, after)
        return self.o(y.reshape(b, t, N * H), ctx), cache


BLOCKS = {
    "plain": lambda: LlamaAttention(E, N, 2, H, False),
    "wide": lambda: OtherSizes(1, 12, 6, "wide"),
    "reader": lambda: Sharing(12, 6, "wide"),
    "conv": lambda: Conv(3),
    "recurrent": Recurrence,
}
# Repeating layers are scanned: "wide", "reader" twice, then once more; "recurrent", "conv" twice.
HYBRID = (
    "plain", "wide", "reader", "wide", "reader", "reader", "recurrent", "conv", "recurrent", "conv", "plain", "plain",
)  # fmt: skip
MIXED = ("wide", "reader", "recurrent") * 2  # every kind of memory, in one scan
SHARING = ("wide", "plain", "reader", "plain", "reader", "wide", "reader")


def make(choice: tuple[str, ...], *, trainable: bool = False, seed: int = 0) -> tuple[Model, dict[str, jax.Array]]:
    """Return a model of these layers, and random parameters."""
    blocks = {name: Mixer(BLOCKS[name]()) for name in sorted(set(choice))}
    stack = Stack(blocks, (Pattern(H**-0.5),) * len(choice), choice)
    sizes = Sizes(len(choice), N, 2, H, E, V, positions=256)
    root = LlamaForCausalLM(LlamaModel(V, E, 1e-5, stack, Rope((1.0, 0.3, 0.1, 0.03))), sizes, tied=False)
    root.notes, root.max_positions, root.carried = (), None, ()
    if trainable:
        for _, variable in nnx.iter_graph(root):
            if isinstance(variable, nnx.Param):
                variable.set_metadata("row", replace(variable.row, trainable=True))
    model, rng = Model.of(root, {"model_type": "llama"}), np.random.default_rng(seed)
    return model, {path: jnp.asarray(rng.normal(size=s.shape) * 0.5, jnp.float32) for path, s in model.specs.items()}
