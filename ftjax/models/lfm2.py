"""LFM2: gated short convolutions, and attention with normalised queries and keys in some layers (Liquid AI 2025,
arXiv:2511.23404).

Source: transformers, models/lfm2/modeling_lfm2.py.

Legend: B batch, T length, E embed, F mlp.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM, LlamaModel, whole_rope
from ftjax.models.nn.attention import QueriesKeysValues, self_attention
from ftjax.models.nn.cache import Memories, recall, remember
from ftjax.models.nn.chunks import feed_forward
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, Linear, RMSNorm
from ftjax.models.nn.memory import ConvState, KeysValues
from ftjax.models.nn.remat import projected
from ftjax.models.nn.rope import Rope
from ftjax.models.nn.short_convolution import ShortConvolution, causal_conv
from ftjax.models.nn.stack import Stack


class Lfm2Attention(nnx.Module):
    """Llama's attention with normalised queries and keys, under LFM2's names."""

    def __init__(self, embed: int, heads: int, kv_heads: int, head_dim: int, eps: float):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.memory = (KeysValues(kv_heads, head_dim, head_dim),)
        self.q_proj = Linear(embed, heads * head_dim, ("embed", "heads"))
        self.k_proj = Linear(embed, kv_heads * head_dim, ("embed", "kv_heads"))
        self.v_proj = Linear(embed, kv_heads * head_dim, ("embed", "kv_heads"))
        self.out_proj = Linear(heads * head_dim, embed, ("heads", "embed"))
        self.q_layernorm, self.k_layernorm = RMSNorm(head_dim, eps), RMSNorm(head_dim, eps)

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> QueriesKeysValues:
        """Project `x [B, T, E]` to queries, keys and values, `[B, T, heads, head dim]` each."""
        b, t, _ = x.shape
        q = self.q_proj(x, ctx).reshape(b, t, self.heads, self.head_dim)
        k = self.k_proj(x, ctx).reshape(b, t, self.kv_heads, self.head_dim)
        return self.q_layernorm(q), self.k_layernorm(k), self.v_proj(x, ctx).reshape(b, t, self.kv_heads, self.head_dim)

    def attend(self, qkv: tuple[jax.Array, ...], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map the result of `project` to `([B, T, E], cache)`."""
        y, cache = self_attention(*qkv, ctx, pattern, layer, cache)
        return self.out_proj(y, ctx), cache


class GatedConvolution(nnx.Module):
    """`out(c * conv(b * x))`, where b, c and x are projections of the input."""

    def __init__(self, embed: int, width: int, bias: bool):
        self.memory = (ConvState(embed, width - 1),)
        self.in_proj = Linear(embed, 3 * embed, ("embed", "heads"), bias=bias)
        self.conv = ShortConvolution(embed, width, bias=bias)
        self.out_proj = Linear(embed, embed, ("heads", "embed"), bias=bias)

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
        """Project `x [B, T, E]` to the inputs of the convolution and the gate of its outputs."""
        b, c, x = jnp.split(self.in_proj(x, ctx), 3, axis=-1)
        return b * x, c

    def attend(self, found: tuple[jax.Array, jax.Array], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map the result of `project` to `([B, T, E], cache)`."""
        (x, gate), [record] = found, self.memory
        before = recall(cache, layer, record, x.shape[0], x.dtype)
        bias = None if self.conv.bias is None else self.conv.bias[...]
        y, last = causal_conv(x, self.conv.taps, before, ctx.segment_ids, bias)
        return self.out_proj(gate * y, ctx), remember(cache, layer, record, last)


class Lfm2MLP(nnx.Module):
    """Llama's MLP under LFM2's names: `w2(silu(w1(x)) * w3(x))`."""

    def __init__(self, embed: int, mlp: int):
        self.w1, self.w3 = Linear(embed, mlp, ("embed", "mlp")), Linear(embed, mlp, ("embed", "mlp"))
        self.w2 = Linear(mlp, embed, ("mlp", "embed"))

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        return feed_forward(self, x, ctx)

    def all_at_once(self, x: Float[Array, "*of E"], ctx: Context) -> Float[Array, "*of E"]:
        return self.w2(jax.nn.silu(self.w1(x, ctx)) * self.w3(x, ctx), ctx)


class Lfm2Block(nnx.Module):
    """A mixer, attention or convolution, and an MLP."""

    def __init__(self, mixer: Lfm2Attention | GatedConvolution, mlp: nnx.Module, embed: int, eps: float):
        self.self_attn = mixer if isinstance(mixer, Lfm2Attention) else None
        self.conv = mixer if isinstance(mixer, GatedConvolution) else None
        self.feed_forward = mlp
        self.operator_norm, self.ffn_norm = RMSNorm(embed, eps), RMSNorm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        mixer = self.self_attn or self.conv
        y, cache = mixer.attend(projected(self.operator_norm, mixer, x, ctx), ctx, pattern, layer, cache)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        x = x + self.output_adapters(x, self.feed_forward(self.ffn_norm(x), ctx), ctx)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


class Lfm2Model(LlamaModel):
    """Llama's model with another name for its last norm."""

    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack, rope: Rope):
        super().__init__(vocab, embed, eps, layers, rope)
        self.embedding_norm = self.norm
        del self.norm

    def last_norm(self, x: Float[Array, "*of E"]) -> Float[Array, "*of E"]:
        return self.embedding_norm(x)


def layer_types(facts: Facts) -> tuple[str, ...]:
    """Read the kind of each layer. Raises UserError for other kinds."""
    facts.inert("full_attn_idxs")  # transformers has computed `layer_types` from it
    types = tuple(facts["layer_types"] or ())
    if set(types) - {"full_attention", "conv"} or len(types) != facts["num_hidden_layers"]:
        raise UserError(
            f"config.json of this {facts.model_type} model has layer_types {', '.join(map(str, types))} for "
            f"{facts['num_hidden_layers']} layers; expected full_attention or conv for each"
        )
    return types


def hidden_size(facts: Facts) -> int:
    """Return the width of the MLP, which config.json may give before an adjustment."""
    size, adjust = facts["intermediate_size"], facts["block_auto_adjust_ff_dim"]
    factor, multiple = facts["block_ffn_dim_multiplier"], facts["block_multiple_of"]
    if not adjust:
        return size
    size = int(2 * size / 3)
    return size if factor is None else multiple * -(-int(factor * size) // multiple)


def mixer(facts: Facts, kind: str) -> Lfm2Attention | GatedConvolution:
    """Build the mixer of a layer of this kind."""
    embed, heads, kv_heads = facts["hidden_size"], facts["num_attention_heads"], facts["num_key_value_heads"]
    if kind == "conv":
        return GatedConvolution(embed, facts["conv_L_cache"], facts["conv_bias"])
    return Lfm2Attention(embed, heads, kv_heads, head_size(facts), facts["norm_eps"])


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `lfm2` config.json."""
    embed, eps, head_dim, types = facts["hidden_size"], facts["norm_eps"], head_size(facts), layer_types(facts)
    mlp = hidden_size(facts)
    # Of the original implementation; transformers reads none of them.
    facts.inert("block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu",
                "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads",
                "use_pos_enc", "theta")  # fmt: skip
    facts.inert("conv_L_cache", "conv_bias")  # where no layer is a convolution
    blocks = {kind: Lfm2Block(mixer(facts, kind), Lfm2MLP(embed, mlp), embed, eps) for kind in sorted(set(types))}
    stack = Stack(blocks, (Pattern(head_dim**-0.5),) * len(types), types)
    model = Lfm2Model(facts["vocab_size"], embed, eps, stack, whole_rope(facts))
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
