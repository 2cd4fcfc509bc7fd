"""GPT-2: learned positions, LayerNorm with biases, fused projections stored (in, out) (Radford et al. 2019).

Other models with this architecture: DistilGPT-2, DialoGPT, Cerebras-GPT, Stanford's Mistral runs.

Legend: B batch, T query length, E embed, N heads, H head dim, F mlp, V vocab.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Shaped

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.causal_lm import Sizes
from ftjax.models.facts import Facts
from ftjax.models.nn.attention import self_attention
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context, after_virtual_tokens
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import Embedding, IdentityAdapter, LayerNorm, Linear, activation
from ftjax.models.nn.memory import KeysValues
from ftjax.models.nn.stack import Stack


class GPT2Attention(nnx.Module):
    """Multi-head attention without rotary positions; `by_layer` divides the scores by the layer's number, from 1."""

    def __init__(self, embed: int, heads: int, by_layer: bool):
        self.heads, self.head_dim, self.by_layer = heads, embed // heads, by_layer
        self.memory = (KeysValues(heads, self.head_dim, self.head_dim),)
        self.c_attn = Linear(embed, 3 * embed, ("embed", "heads"), bias=True, conv1d=True)
        self.c_proj = Linear(embed, embed, ("heads", "embed"), bias=True, conv1d=True)

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map `x [B, T, E]` to `([B, T, E], cache)`."""
        b, t, _ = x.shape
        q, k, v = (y.reshape(b, t, self.heads, self.head_dim) for y in jnp.split(self.c_attn(x, ctx), 3, axis=-1))
        if self.by_layer:  # scale queries, not `pattern.scale`, so that all layers share one scan
            q = (q.astype(jnp.float32) / jnp.asarray(layer + 1, jnp.float32)).astype(q.dtype)
        y, cache = self_attention(q, k, v, ctx, pattern, layer, cache)
        return self.c_proj(y, ctx), cache


class GPT2MLP(nnx.Module):
    def __init__(self, embed: int, mlp: int, act: str):
        self.act = activation(act)
        self.c_fc = Linear(embed, mlp, ("embed", "mlp"), bias=True, conv1d=True)
        self.c_proj = Linear(mlp, embed, ("mlp", "embed"), bias=True, conv1d=True)

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        return self.c_proj(self.act(self.c_fc(x, ctx)), ctx)


class GPT2Block(nnx.Module):
    def __init__(self, attn: GPT2Attention, mlp: GPT2MLP, embed: int, eps: float):
        self.attn = attn
        self.mlp = mlp
        self.ln_1 = LayerNorm(embed, eps)
        self.ln_2 = LayerNorm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        y, cache = self.attn(self.ln_1(x), ctx, pattern, layer, cache)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        x = x + self.output_adapters(x, self.mlp(self.ln_2(x), ctx), ctx)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


class GPT2Model(nnx.Module):
    def __init__(self, vocab: int, positions: int, embed: int, eps: float, layers: Stack):
        self.wte = Embedding(vocab, embed)
        self.wpe = Embedding(positions, embed, vocab_axis=None)
        self.h = layers
        self.ln_f = LayerNorm(embed, eps)

    def __call__(self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Memories = None):
        """Map tokens `[B, T]` to hidden states `[B, T, E]`; also return the cache and the auxiliary loss.

        A position beyond the table gives NaN, never the row of another position.
        """
        x = self.wte(tokens, ctx.dtype) + self.wpe(ctx.positions, ctx.dtype)
        x, cache, aux = self.h(constrain(x, "batch", "length", None), ctx, cache)
        return self.ln_f(x), cache, aux


class GPT2LMHeadModel(nnx.Module):
    def __init__(self, transformer: GPT2Model, sizes: Sizes, tied: bool):
        self.sizes, self.ropes = sizes, ()
        self.embedding = "transformer.wte"
        # Older exports also contain the causal mask of each layer, and a copy of the tied head.
        self.ignored = (".attn.bias", ".attn.masked_bias", *(("lm_head.weight",) if tied else ()))
        self.output = self.embedding if tied else "lm_head"
        self.transformer = transformer
        self.lm_head = None if tied else Linear(sizes.embed, sizes.vocab, ("embed", "vocab"))

    def hidden(self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Memories = None):
        return self.transformer(tokens, after_virtual_tokens(self, tokens, ctx), cache)

    def unembed(self, x: Float[Array, "*of E"], ctx: Context) -> Float32[Array, "*of V"]:
        """Project hidden states `[..., E]` to float32 logits `[..., V]`."""
        logits = self.transformer.wte.attend(x) if self.lm_head is None else self.lm_head(x, ctx)
        return logits.astype(jnp.float32)


def build(facts: Facts) -> GPT2LMHeadModel:
    """Build the abstract model of a `gpt2` config.json."""
    embed, heads, eps = facts["n_embd"], facts["n_head"], facts["layer_norm_epsilon"]
    if embed % heads:
        raise UserError(f"config.json of this gpt2 model has n_embd = {embed}, which does not divide by n_head = {heads}")
    facts.dropout("attn_pdrop", "resid_pdrop", "embd_pdrop")
    # Fields of a classification head; an old name of the context length; and scores are always float32 here.
    facts.inert(
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "n_ctx",
        "reorder_and_upcast_attn",
    )  # fmt: skip
    facts.max_positions = facts["n_positions"]
    inner = facts["n_inner"]
    block = GPT2Block(
        GPT2Attention(embed, heads, facts["scale_attn_by_inverse_layer_idx"]),
        GPT2MLP(embed, 4 * embed if inner is None else inner, facts["activation_function"]),
        embed,
        eps,
    )
    scale = (embed // heads) ** -0.5 if facts["scale_attn_weights"] else 1.0
    sizes = Sizes(facts["n_layer"], heads, heads, embed // heads, embed, facts["vocab_size"], facts["n_positions"])
    model = GPT2Model(sizes.vocab, sizes.positions, embed, eps, Stack(block, (Pattern(scale),) * sizes.layers))
    return GPT2LMHeadModel(model, sizes, facts["tie_word_embeddings"])
