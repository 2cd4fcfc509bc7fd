"""Llama 4, text only: chunked attention, layers without RoPE, and experts whose inputs are scaled.

Source: transformers, models/llama4/modeling_llama4.py (`Llama4ForCausalLM`).

Legend: B batch, T query length, E embed, F mlp, N heads, K kv heads, H head dim, X experts, k experts per token.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP, LlamaModel, attention, whole_rope
from ftjax.models.nn.attention import QueriesKeysValues, self_attention
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.experts import ExpertMatrices, Group, Router
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, RMSNorm, activation, project, unit_rms
from ftjax.models.nn.param import param
from ftjax.models.nn.remat import projected
from ftjax.models.nn.rope import apply_interleaved
from ftjax.models.nn.stack import Stack
from ftjax.models.smollm3 import Kind


class Llama4Attention(LlamaAttention):
    """Attention that normalises queries and keys after RoPE; in layers without RoPE, queries grow with their position."""

    def __init__(self, *sizes, eps: float | None, growth: tuple[int, float] | None):
        """Build attention.

        Args:
            sizes: those of `LlamaAttention`.
            eps: that of the norm of queries and keys; None without one.
            growth: tokens until queries grow, and by how much (`floor_scale`, `attn_scale`); None if they do not.
        """
        super().__init__(*sizes)
        self.eps, self.growth = eps, growth

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> QueriesKeysValues:
        q, k, v = super().project(x, ctx)
        if ctx.rope is None and self.growth is not None:
            tokens, strength = self.growth
            scale = 1 + strength * jnp.log1p(((ctx.positions + 1) // tokens).astype(jnp.float32))
            q = (q.astype(jnp.float32) * scale[..., None, None]).astype(q.dtype)
        return q, k, v

    def rotated(
        self, x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
    ) -> Float[Array, "B T N H"]:
        y = apply_interleaved(x, cos, sin)
        return y if self.eps is None else unit_rms(y, self.eps)

    def mixed(self, qkv: tuple[jax.Array, ...], ctx: Context, pattern: Pattern, layer, cache: Memories):
        return self_attention(*qkv, ctx, pattern, layer, cache, rotate=self.rotated)


class Llama4Router(Router):
    def __call__(self, x: Float[Array, "B T E"]) -> tuple[Float[Array, "B T X"], Int[Array, "B T k"], Float[Array, "B T k"]]:
        """Return the logits, the chosen experts of each token, and the factors on the inputs of these."""
        logits = project(x, self.weight[...]).astype(jnp.float32)
        best, chosen = jax.lax.top_k(logits, self.top_k)
        return logits, chosen, jax.nn.sigmoid(best)


class Llama4Experts(ExpertMatrices):
    """X experts, each `down(act(gate(s x)) * up(s x))` with the factor s of the router."""

    AXES = {"gate_up_proj": ("experts", "embed", None, "mlp"), "down_proj": ("experts", "mlp", "embed")}  # noqa: RUF012
    INPUT_AXES = {"gate_up_proj": -3, "down_proj": -2}  # noqa: RUF012
    ADAPTABLE = False

    def __init__(self, embed: int, mlp: int, experts: int, act: str):
        self.act = activation(act)
        self.gate_up_proj = param(
            (experts, embed, 2, mlp), self.AXES["gate_up_proj"], "gate_up_proj", hf_shape=(experts, embed, 2 * mlp)
        )
        self.down_proj = param((experts, mlp, embed), self.AXES["down_proj"], "down_proj")
        self.leave_room()

    def __call__(
        self, x: Float[Array, "B T E"], chosen: Int[Array, "B T k"], factors: Float[Array, "B T k"]
    ) -> Float[Array, "B T E"]:
        def feedforward(group: Group, params: dict[str, jax.Array]) -> jax.Array:
            gate, up = (self.product(group, group.rows, params, "gate_up_proj", part) for part in range(2))
            return self.product(group, up * self.act(gate), params, "down_proj")

        b, t, k = chosen.shape
        scaled = (x[:, :, None] * factors[..., None].astype(x.dtype)).reshape(b, t * k, -1)  # each expert has its own input
        y = self.routed(scaled, chosen.reshape(b, t * k, 1), jnp.ones((b, t * k, 1), jnp.float32), feedforward)
        return jnp.sum(y.reshape(b, t, k, -1), axis=2)


class Llama4Moe(nnx.Module):
    """Routed experts beside one that every token uses."""

    def __init__(self, router: Llama4Router, experts: Llama4Experts, shared: LlamaMLP):
        self.router, self.experts, self.shared_expert = router, experts, shared

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        _, chosen, factors = self.router(x)
        return self.shared_expert(x, ctx) + self.experts(x, chosen, factors)


class Llama4Block(nnx.Module):
    def __init__(self, attention: Llama4Attention, feed_forward: Llama4Moe | LlamaMLP, embed: int, eps: float):
        self.self_attn, self.feed_forward = attention, feed_forward
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(embed, eps), RMSNorm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, kind: Kind, layer, cache: Memories):
        inside = ctx if kind.rope else replace(ctx, rope=None)
        qkv = projected(self.input_layernorm, self.self_attn, x, inside)
        y, cache = self.self_attn.attend(qkv, inside, kind.pattern, layer, cache)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        x = x + self.output_adapters(x, self.feed_forward(self.post_attention_layernorm(x), ctx), ctx)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


def kinds_of(facts: Facts) -> tuple[Kind, ...]:
    """Read which layers see a chunk and which have RoPE. Raises UserError for other layer types, and without a chunk size."""
    facts.inert("no_rope_layer_interval")  # transformers has computed `no_rope_layers` and `layer_types` from it
    types, with_rope, chunk = facts["layer_types"], facts["no_rope_layers"], facts["attention_chunk_size"]
    layers = facts["num_hidden_layers"]
    if set(types) - {"chunked_attention", "full_attention"} or len(types) != layers or len(with_rope) < layers:
        raise UserError(
            f"config.json of this {facts.model_type} model has layer_types {', '.join(map(str, types))} and "
            f"{len(with_rope)} no_rope_layers for {layers} layers; expected chunked_attention or full_attention, and a 1 "
            "(RoPE) or a 0 (none), for each"
        )
    if not isinstance(chunk, int) or chunk < 1:
        raise UserError(
            f"config.json of this {facts.model_type} model has attention_chunk_size = {chunk!r}; give the number of tokens of "
            "a chunk"
        )
    scale = head_size(facts) ** -0.5
    patterns = (Pattern(scale, chunk=chunk if kind == "chunked_attention" else None) for kind in types)
    return tuple(map(Kind, patterns, map(bool, with_rope[:layers])))


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `llama4_text` config.json."""
    embed, eps, act, bias = facts["hidden_size"], facts["rms_norm_eps"], facts["hidden_act"], facts["attention_bias"]
    # Without effect in transformers: its class has neither noise nor a loss for the router.
    facts.inert("interleave_moe_layer_step", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    growth = (facts["floor_scale"], facts["attn_scale"]) if facts["attn_temperature_tuning"] else None
    facts.inert("floor_scale", "attn_scale")
    options = {"eps": eps if facts["use_qk_norm"] else None, "growth": growth}
    mlp, dense, experts, top_k = (
        facts[name] for name in ("intermediate_size", "intermediate_size_mlp", "num_local_experts", "num_experts_per_tok")
    )

    def block(sparse: bool) -> Llama4Block:
        if sparse:
            routed = Llama4Experts(embed, mlp, experts, act)
            feed_forward = Llama4Moe(
                Llama4Router(embed, experts, top_k, normalise=False), routed, LlamaMLP(embed, mlp, act, False)
            )
        else:
            feed_forward = LlamaMLP(embed, dense, act, False)
        return Llama4Block(attention(facts, bias=bias, kind=Llama4Attention, **options), feed_forward, embed, eps)

    kinds, with_experts = kinds_of(facts), set(facts["moe_layers"])
    choice = tuple("sparse" if layer in with_experts else "dense" for layer in range(len(kinds)))
    stack = Stack({name: block(name == "sparse") for name in sorted(set(choice))}, kinds, choice)
    model = LlamaModel(facts["vocab_size"], embed, eps, stack, whole_rope(facts))
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
