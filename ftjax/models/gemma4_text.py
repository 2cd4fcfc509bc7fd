"""Gemma 4, text only: heads of two sizes, layers that share keys and values, inputs for each layer, and experts beside the MLP.

Source: transformers, models/gemma4/modeling_gemma4.py (`Gemma4ForCausalLM`).

Legend: B batch, T query length, E embed, N heads, K kv heads, H head dim, L layers, P size of a layer's own input, X experts,
k experts per token.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Shaped

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.causal_lm import read_sizes
from ftjax.models.facts import Facts
from ftjax.models.gemma import GemmaForCausalLM, GemmaModel
from ftjax.models.llama import LlamaAttention, LlamaMLP
from ftjax.models.nn.attention import self_attention
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context, is_virtual
from ftjax.models.nn.experts import Experts
from ftjax.models.nn.layer_types import Kind, Pattern, patterns, ropes
from ftjax.models.nn.layers import Embedding, IdentityAdapter, Linear, RMSNorm, activation, unit_rms
from ftjax.models.nn.memory import KeysValues, Shared
from ftjax.models.nn.param import Init, param
from ftjax.models.nn.remat import projected
from ftjax.models.nn.rope import Rope, angles
from ftjax.models.nn.stack import Stack

PER_LAYER = ("head_dim", "num_key_value_heads")  # what `per_layer_config` may change


def gemma4_norm(size: int, eps: float) -> RMSNorm:
    """Build Gemma 4's norm, which has no offset, unlike that of earlier Gemmas."""
    return RMSNorm(size, eps, round_first=False)


class Gemma4Attention(LlamaAttention):
    """Attention with normalised queries, keys and values, whose scores have no scale.

    A layer that `shares` has queries only and reads the keys and values of the last layer of its type that has some.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool,
        *,
        eps: float,
        name: str,
        shares: bool,
        one: bool,
    ):
        """Build attention for layers of type `name`; with `one`, keys before their norm are the values before theirs."""
        norms = {"q_norm": gemma4_norm(head_dim, eps), "k_norm": gemma4_norm(head_dim, eps)}
        super().__init__(embed, heads, kv_heads, head_dim, bias, **norms)
        self.eps, self.name = eps, name
        self.memory = (Shared(name),) if shares else (KeysValues(kv_heads, head_dim, head_dim, name),)
        if shares:
            self.k_proj = self.k_norm = None
        if shares or one:
            self.v_proj = None

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> tuple[Float[Array, "B T _ _"] | None, ...]:
        """Project `x [B, T, E]` to queries `[B, T, N, H]`, keys and values `[B, T, K, H]`; None for those that are shared."""
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x, ctx).reshape(b, t, self.heads, self.head_dim))
        if self.k_proj is None:
            return q, None, None
        k = self.k_proj(x, ctx).reshape(b, t, self.kv_heads, self.head_dim)
        v = k if self.v_proj is None else self.v_proj(x, ctx).reshape(k.shape)
        return q, self.k_norm(k), unit_rms(v, self.eps)

    def mixed(self, qkv: tuple[jax.Array, ...], ctx: Context, pattern: Pattern, layer, cache: Memories):
        return self_attention(*qkv, ctx, pattern, layer, cache, name=self.name)


class Gemma4Router(nnx.Module):
    """Chooses experts by a projection of the normalised input; each expert has a factor on its weight."""

    def __init__(self, embed: int, experts: int, top_k: int, eps: float):
        self.top_k, self.eps = top_k, eps
        self.proj = Linear(embed, experts, ("embed", "gate"))
        self.scale = param((embed,), ("norm",), "scale", init=Init("ones"))
        self.per_expert_scale = param((experts,), (None,), "per_expert_scale", init=Init("ones"))

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> tuple[Int32[Array, "B T k"], Float32[Array, "B T k"]]:
        """Return the chosen experts of each token, and their weights."""
        x = unit_rms(x, self.eps) * self.scale[...].astype(x.dtype) * x.shape[-1] ** -0.5
        best, chosen = jax.lax.top_k(self.proj(x, ctx).astype(jnp.float32), self.top_k)
        return chosen, jax.nn.softmax(best, axis=-1) * self.per_expert_scale[...].astype(jnp.float32)[chosen]


class Gemma4Block(nnx.Module):
    def __init__(
        self,
        attention: Gemma4Attention,
        mlp: nnx.Module,
        embed: int,
        eps: float,
        act: str,
        own_input: int,
        experts: tuple[Gemma4Router, Experts] | None,
    ):
        """Build a block; `own_input` is the size of the input that each layer has for itself, or 0."""
        self.self_attn, self.mlp, self.act = attention, mlp, activation(act)
        self.input_layernorm, self.post_attention_layernorm = gemma4_norm(embed, eps), gemma4_norm(embed, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = gemma4_norm(embed, eps), gemma4_norm(embed, eps)
        self.layer_scalar = param((1,), (None,), "layer_scalar", init=Init("ones"), constant=True)
        self.router, self.experts = experts or (None, None)
        if experts:
            self.post_feedforward_layernorm_1 = gemma4_norm(embed, eps)
            self.pre_feedforward_layernorm_2, self.post_feedforward_layernorm_2 = (
                gemma4_norm(embed, eps),
                gemma4_norm(embed, eps),
            )
        self.own_input = own_input
        if own_input:
            self.per_layer_input_gate = Linear(embed, own_input, ("embed", "mlp"))
            self.per_layer_projection = Linear(own_input, embed, ("mlp", "embed"))
            self.post_per_layer_input_norm = gemma4_norm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, kind: Kind, layer, cache: Memories):
        ctx = replace(ctx, rope=ctx.rope[kind.rope])
        found = projected(self.input_layernorm, self.self_attn, x, ctx)
        y, cache = self.self_attn.attend(found, ctx, kind.pattern, layer, cache)
        y = self.attention_adapters(x, y, ctx)
        x = constrain(x + self.post_attention_layernorm(y), "batch", "length", None)
        y = self.output_adapters(x, self.feed_forward(x, ctx), ctx)
        x = x + self.post_feedforward_layernorm(y)
        if self.own_input:
            y = self.act(self.per_layer_input_gate(x, ctx)) * ctx.own_input
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(y, ctx))
        x = x * self.layer_scalar[...].astype(x.dtype)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)

    def feed_forward(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        """Return the output of the MLP, to which that of the experts is added if there are some."""
        y = self.mlp(self.pre_feedforward_layernorm(x), ctx)
        if self.experts is None:
            return y
        routed = self.experts(self.pre_feedforward_layernorm_2(x), *self.router(x, ctx))
        return self.post_feedforward_layernorm_1(y) + self.post_feedforward_layernorm_2(routed)


class Gemma4Model(GemmaModel):
    """Gemma with an input for each layer, from a table of its own and from the embeddings."""

    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack, rope: dict[str, Rope], own: tuple[int, int]):
        """`own` is the size of the table (tokens) and of each layer's input, 0 for none."""
        super().__init__(vocab, embed, eps, layers, rope)
        self.norm = gemma4_norm(embed, eps)
        rows, self.own_input = own
        if self.own_input:
            columns = len(layers.kinds) * self.own_input
            self.embed_tokens_per_layer = Embedding(rows, columns)
            self.per_layer_model_projection = Linear(embed, columns, ("embed", None))
            self.per_layer_projection_norm = gemma4_norm(self.own_input, eps)

    def __call__(self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Memories = None):
        """Map tokens `[B, T]` to hidden states `[B, T, E]`; also return the cache and the auxiliary loss."""
        x = constrain(self.embed(tokens, ctx.dtype), "batch", "length", None)
        own = self.inputs_of_layers(tokens, x, ctx) if self.own_input else None
        ctx = replace(ctx, rope=angles(self.rope, ctx.positions, ctx.segment_ids), own_input=own)
        x, cache, aux = self.layers(x, ctx, cache)
        return self.last_norm(x), cache, aux

    def inputs_of_layers(
        self, tokens: Shaped[Array, "B T ..."], x: Float[Array, "B T E"], ctx: Context
    ) -> Float[Array, "L B T P"]:
        """Return the input of each layer; `x` is the embedding of the tokens."""
        if is_virtual(tokens):
            raise UserError(
                "method.name: virtual tokens have no ids, which this model needs for the input of each layer; use "
                "method.name: lora"
            )
        scale = jnp.asarray(self.own_input**0.5, ctx.dtype)  # rounded, as in `GemmaModel.embed`
        table = self.embed_tokens_per_layer(tokens, ctx.dtype) * scale
        of_embedding = self.per_layer_model_projection(x, ctx) * x.shape[-1] ** -0.5
        table, of_embedding = (y.reshape(*tokens.shape, -1, self.own_input) for y in (table, of_embedding))
        return jnp.moveaxis((self.per_layer_projection_norm(of_embedding) + table) * 2**-0.5, 2, 0)


def attention_sizes(facts: Facts) -> dict[str, tuple[int, int]]:
    """Read the head size and the number of key heads of each layer type. Raises UserError if layers of a type differ."""
    types, own = facts["layer_types"], facts.get("per_layer_config") or {}
    other = sorted({name for values in own.values() for name in values} - set(PER_LAYER))
    if other:
        raise UserError(
            f"config.json of this {facts.model_type} model has {', '.join(other)} in per_layer_config, which may have "
            f"{' and '.join(PER_LAYER)}"
        )
    changed: Mapping[int, Mapping[str, int]] = {int(layer): values for layer, values in own.items()}
    found: dict[str, set[tuple[int, ...]]] = {kind: set() for kind in types}
    for layer, kind in enumerate(types):
        found[kind].add(tuple(changed.get(layer, {}).get(name, facts[name]) for name in PER_LAYER))
    for kind, sizes in found.items():
        if len(sizes) > 1:
            raise UserError(
                f"config.json of this {facts.model_type} model gives its {kind} layers several sizes in per_layer_config: "
                f"{' and '.join(PER_LAYER)} are {' or '.join(map(str, sorted(sizes)))}; give all of them the same"
            )
    return {kind: sizes.pop() for kind, sizes in found.items()}


def sharing(facts: Facts) -> tuple[bool, ...]:
    """Return for each layer whether it shares the keys and values of an earlier one: the last `num_kv_shared_layers` do.

    Raises UserError if a layer type has no layer to share those of.
    """
    types, shared = facts["layer_types"], facts["num_kv_shared_layers"]
    first = len(types) - shared
    if shared and (not 0 < shared < len(types) or set(types[:first]) != set(types)):
        raise UserError(
            f"config.json of this {facts.model_type} model has num_kv_shared_layers = {shared} for {len(types)} layers; the "
            "layers before these must have one of each layer type, whose keys and values they share"
        )
    return tuple(layer >= first for layer in range(len(types)))


def decoder(facts: Facts, own_input: int, table: int, experts: int) -> GemmaForCausalLM:
    """Build the abstract model.

    Args:
        own_input: size of each layer's own input, or 0.
        table: tokens in the table for these inputs.
        experts: number of experts of each layer, or 0.
    """
    embed, eps, act, vocab = facts["hidden_size"], facts["rms_norm_eps"], facts["hidden_activation"], facts["vocab_size"]
    facts.only("use_bidirectional_attention", None, "vision", why="it makes an encoder, not a causal language model")
    facts.dropout("attention_dropout")
    sizes, shares, kinds = attention_sizes(facts), sharing(facts), patterns(facts, 1.0)
    heads, bias, one = facts["num_attention_heads"], facts["attention_bias"], facts["attention_k_eq_v"]
    mlp, wider = facts["intermediate_size"], facts["use_double_wide_mlp"]

    def block(kind: str, shared: bool) -> Gemma4Block:
        head_dim, kv_heads = sizes[kind]
        options = {"eps": eps, "name": kind, "shares": shared, "one": one and kind == "full_attention"}
        attention = Gemma4Attention(embed, heads, kv_heads, head_dim, bias, **options)
        routed = None
        if experts:
            router = Gemma4Router(embed, experts, facts["top_k_experts"], eps)
            routed = router, Experts(embed, facts["moe_intermediate_size"], experts, act, None, None)
        feed_forward = LlamaMLP(embed, mlp * 2 if wider and shared else mlp, act, False)
        return Gemma4Block(attention, feed_forward, embed, eps, act, own_input, routed)

    def name(kind: str, shared: bool) -> str:
        return f"{kind}_shared" if shared else kind

    choice = tuple(zip(facts["layer_types"], shares, strict=True))
    blocks = {name(*each): block(*each) for each in sorted(set(choice))}
    layers = Stack(blocks, tuple(map(Kind, kinds, facts["layer_types"])), tuple(name(*each) for each in choice))
    for layer in (layer for layer, shared in enumerate(shares) if shared):  # published files have them, and nobody reads them
        facts.carried += [f"model.layers.{layer}.self_attn.{part}." for part in ("k_proj", "v_proj", "k_norm", "v_norm")]
    rope = ropes(facts, {kind: size for kind, (size, _) in sizes.items()})
    model = Gemma4Model(vocab, embed, eps, layers, rope, (table, own_input))
    largest = replace(read_sizes(facts), kv_heads=max(kv_heads for _, kv_heads in sizes.values()))
    return GemmaForCausalLM(model, largest, facts["tie_word_embeddings"], facts["final_logit_softcapping"])


def build(facts: Facts) -> GemmaForCausalLM:
    """Build the abstract model of a `gemma4_text` config.json."""
    own_input, table = facts["hidden_size_per_layer_input"], facts["vocab_size_per_layer_input"]
    sizes = {name: facts[name] for name in ("num_experts", "top_k_experts", "moe_intermediate_size")}
    if facts["enable_moe_block"] and not all(sizes.values()):
        found = ", ".join(f"{name} = {size!r}" for name, size in sizes.items())
        raise UserError(
            f"config.json of this {facts.model_type} model has enable_moe_block, and {found}; give sizes of at least 1"
        )
    return decoder(facts, own_input, table, sizes["num_experts"] if facts["enable_moe_block"] else 0)
