"""Llama: pre-norm decoder with RoPE, grouped-query attention and a gated MLP (Touvron et al. 2023, arXiv:2307.09288).

Covers all models with `model_type: llama`: Llama 2, 3, 3.1, 3.2, SmolLM, SmolLM2, TinyLlama.

Legend: B batch, T query length, E embed, N heads, K kv heads, H head dim, F mlp, V vocab.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Shaped

from ftjax.mesh import constrain
from ftjax.models.causal_lm import Sizes, head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.nn.attention import QueriesKeysValues, self_attention
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.chunks import feed_forward
from ftjax.models.nn.context import Context, Tokens, after_virtual_tokens
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import Embedding, IdentityAdapter, Linear, RMSNorm, activation
from ftjax.models.nn.memory import KeysValues
from ftjax.models.nn.param import param
from ftjax.models.nn.remat import projected
from ftjax.models.nn.rope import Rope, angles, every, make_rope, refuse_partial
from ftjax.models.nn.stack import Stack

Norm = Callable[[int, float], nnx.Module]  # (size, eps) -> norm


class LlamaAttention(nnx.Module):
    """Grouped-query attention with rotary position embedding.

    `q_norm` and `k_norm` are applied to each head before RoPE (Qwen 3, Gemma 3); `sinks` adds a learned score per head to the
    softmax (gpt-oss); `bias_out` overrides `bias` for the output projection (Qwen 2).
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool,
        *,
        bias_out: bool | None = None,
        q_norm: nnx.Module | None = None,
        k_norm: nnx.Module | None = None,
        sinks: bool = False,
    ):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.memory = (KeysValues(kv_heads, head_dim, head_dim),)
        self.q_proj = Linear(embed, heads * head_dim, ("embed", "heads"), bias=bias)
        self.k_proj = Linear(embed, kv_heads * head_dim, ("embed", "kv_heads"), bias=bias)
        self.v_proj = Linear(embed, kv_heads * head_dim, ("embed", "kv_heads"), bias=bias)
        self.o_proj = Linear(heads * head_dim, embed, ("heads", "embed"), bias=bias if bias_out is None else bias_out)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.sinks = param((heads,), ("heads",), "sinks") if sinks else None

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> QueriesKeysValues:
        """Project `x [B, T, E]` to queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, before RoPE."""
        b, t, _ = x.shape
        q = self.q_proj(x, ctx).reshape(b, t, self.heads, self.head_dim)
        k = self.k_proj(x, ctx).reshape(b, t, self.kv_heads, self.head_dim)
        v = self.v_proj(x, ctx).reshape(b, t, self.kv_heads, self.head_dim)
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map `x [B, T, E]` to `([B, T, E], cache)`."""
        return self.attend(self.project(x, ctx), ctx, pattern, layer, cache)

    def attend(self, qkv: tuple[jax.Array, ...], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map the result of `project` to `([B, T, E], cache)`."""
        y, cache = self.mixed(qkv, ctx, pattern, layer, cache)
        return self.o_proj(y, ctx), cache

    def mixed(self, qkv: tuple[jax.Array, ...], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map the result of `project` to the heads' outputs, `([B, T, N H], cache)`."""
        sinks = None if self.sinks is None else self.sinks[...]
        return self_attention(*qkv, ctx, pattern, layer, cache, sinks)


class LlamaMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, embed: int, mlp: int, act: str, bias: bool):
        self.act = activation(act)
        self.gate_proj = Linear(embed, mlp, ("embed", "mlp"), bias=bias)
        self.up_proj = Linear(embed, mlp, ("embed", "mlp"), bias=bias)
        self.down_proj = Linear(mlp, embed, ("mlp", "embed"), bias=bias)

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        return feed_forward(self, x, ctx)

    def all_at_once(self, x: Float[Array, "*of E"], ctx: Context) -> Float[Array, "*of E"]:
        return self.down_proj(self.act(self.gate_proj(x, ctx)) * self.up_proj(x, ctx), ctx)


class LlamaBlock(nnx.Module):
    def __init__(self, attention: nnx.Module, mlp: nnx.Module, embed: int, eps: float, norm: Norm = RMSNorm):
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = norm(embed, eps)
        self.post_attention_layernorm = norm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        qkv = projected(self.input_layernorm, self.self_attn, x, ctx)
        y, cache = self.self_attn.attend(qkv, ctx, pattern, layer, cache)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        x = x + self.output_adapters(x, self.mlp(self.post_attention_layernorm(x), ctx), ctx)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


class LlamaModel(nnx.Module):
    """The model without its output projection. Blocks get the angles of `rope` as `ctx.rope`: of a single RoPE, or by name;
    None if it is empty."""

    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack, rope: Rope | dict[str, Rope], norm: Norm = RMSNorm):
        self.rope = rope
        self.embed_tokens = Embedding(vocab, embed)
        self.layers = layers
        self.norm = norm(embed, eps)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return every(self.rope)

    def embed(self, tokens: Tokens, dtype) -> Float[Array, "B T E"]:
        """Map tokens `[B, T]` to the input of the first layer, `[B, T, E]`."""
        return self.embed_tokens(tokens, dtype)

    def __call__(self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Memories = None):
        """Map tokens `[B, T]` to hidden states `[B, T, E]`; also return the cache and the auxiliary loss."""
        x = constrain(self.embed(tokens, ctx.dtype), "batch", "length", None)
        ctx = replace(ctx, rope=angles(self.rope, ctx.positions, ctx.segment_ids) or None)
        x, cache, aux = self.layers(x, ctx, cache)
        return self.last_norm(x), cache, aux

    def last_norm(self, x: Float[Array, "*of E"]) -> Float[Array, "*of E"]:
        return self.norm(x)


class LlamaForCausalLM(nnx.Module):
    """The model with its projection to the vocabulary, which may be tied to the embedding."""

    def __init__(self, model: LlamaModel, sizes: Sizes, tied: bool):
        self.sizes, self.ropes = sizes, model.ropes
        self.embedding = "model.embed_tokens"
        # Older exports also contain the RoPE table, and a copy of the tied head.
        self.ignored = (".rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ()))
        self.output = self.embedding if tied else "lm_head"
        self.model = model
        self.lm_head = None if tied else Linear(sizes.embed, sizes.vocab, ("embed", "vocab"))

    def hidden(self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Memories = None):
        return self.model(tokens, after_virtual_tokens(self, tokens, ctx), cache)

    def unembed(self, x: Float[Array, "*of E"], ctx: Context) -> Float32[Array, "*of V"]:
        """Project hidden states `[..., E]` to float32 logits `[..., V]`."""
        logits = self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x, ctx)
        return logits.astype(jnp.float32)


def attention(facts: Facts, *, bias: bool, kind: type[LlamaAttention] = LlamaAttention, **options) -> LlamaAttention:
    """Build the attention of a config.json with Llama's field names."""
    facts.dropout("attention_dropout")
    heads, kv_heads = facts["num_attention_heads"], facts["num_key_value_heads"]
    return kind(facts["hidden_size"], heads, kv_heads, head_size(facts), bias, **options)


def mlp(facts: Facts, *, bias: bool = False) -> LlamaMLP:
    return LlamaMLP(facts["hidden_size"], facts["intermediate_size"], facts["hidden_act"], bias)


def whole_rope(facts: Facts) -> Rope:
    """Build the RoPE of a model that rotates whole heads, in the same way in all layers."""
    return make_rope(refuse_partial(facts["rope_parameters"]), head_size(facts), facts["max_position_embeddings"])


def decoder(facts: Facts, block: nnx.Module, kinds: tuple, rope: Rope | dict[str, Rope]) -> LlamaForCausalLM:
    """Build the whole model around a block; `kinds` has the static properties of each layer."""
    sizes = read_sizes(facts)
    model = LlamaModel(sizes.vocab, sizes.embed, facts["rms_norm_eps"], Stack(block, kinds), rope)
    return LlamaForCausalLM(model, sizes, facts["tie_word_embeddings"])


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `llama` config.json."""
    facts.inert("pretraining_tp")  # transformers 5 has dropped sliced matrix products and ignores it
    parts = attention(facts, bias=facts["attention_bias"]), mlp(facts, bias=facts["mlp_bias"])
    block = LlamaBlock(*parts, facts["hidden_size"], facts["rms_norm_eps"])
    kinds = (Pattern(scale=head_size(facts) ** -0.5),) * facts["num_hidden_layers"]
    return decoder(facts, block, kinds, whole_rope(facts))
