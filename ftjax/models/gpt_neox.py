"""GPT-NeoX and Pythia: parallel attention and MLP, partial RoPE, and a fused projection with queries, keys and values of each
head side by side (Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373).

Legend: B batch, T query length, E embed, N heads, H head dim, F mlp, V vocab.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Shaped

from ftjax.mesh import constrain
from ftjax.models.causal_lm import Sizes
from ftjax.models.facts import Facts
from ftjax.models.nn.attention import self_attention
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context, after_virtual_tokens
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import Embedding, IdentityAdapter, LayerNorm, Linear, activation
from ftjax.models.nn.memory import KeysValues
from ftjax.models.nn.param import Layout
from ftjax.models.nn.rope import Rope, longest_text, make_rope
from ftjax.models.nn.stack import Stack


class GPTNeoXAttention(nnx.Module):
    def __init__(self, embed: int, heads: int, bias: bool):
        self.heads, self.head_dim = heads, embed // heads
        self.memory = (KeysValues(heads, self.head_dim, self.head_dim),)
        self.query_key_value = Linear(embed, 3 * embed, ("embed", "heads"), bias=bias)
        self.dense = Linear(embed, embed, ("heads", "embed"), bias=bias)

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map `x [B, T, E]` to `([B, T, E], cache)`."""
        b, t, _ = x.shape
        qkv = self.query_key_value(x, ctx).reshape(b, t, self.heads, 3 * self.head_dim)  # the fused projection is by head
        y, cache = self_attention(*jnp.split(qkv, 3, axis=-1), ctx, pattern, layer, cache)
        return self.dense(y, ctx), cache


class GPTNeoXMLP(nnx.Module):
    def __init__(self, embed: int, mlp: int, act: str):
        self.act = activation(act)
        self.dense_h_to_4h = Linear(embed, mlp, ("embed", "mlp"), bias=True)
        self.dense_4h_to_h = Linear(mlp, embed, ("mlp", "embed"), bias=True)

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x, ctx)), ctx)


class GPTNeoXBlock(nnx.Module):
    """A block of attention and MLP; with `parallel` the MLP reads the block's input, not the result of attention."""

    def __init__(self, attention: GPTNeoXAttention, mlp: GPTNeoXMLP, embed: int, eps: float, parallel: bool):
        self.parallel = parallel
        self.attention = attention
        self.mlp = mlp
        self.input_layernorm = LayerNorm(embed, eps)
        self.post_attention_layernorm = LayerNorm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        y, cache = self.attention(self.input_layernorm(x), ctx, pattern, layer, cache)
        attended = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        read = x if self.parallel else attended
        out = attended + self.output_adapters(read, self.mlp(self.post_attention_layernorm(read), ctx), ctx)
        return constrain(out, "batch", "length", None), cache, jnp.float32(0)


class GPTNeoXModel(nnx.Module):
    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack, rope: Rope):
        self.rope = rope
        self.embed_in = Embedding(vocab, embed)
        self.layers = layers
        self.final_layer_norm = LayerNorm(embed, eps)

    def __call__(self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Memories = None):
        """Map tokens `[B, T]` to hidden states `[B, T, E]`; also return the cache and the auxiliary loss."""
        x = constrain(self.embed_in(tokens, ctx.dtype), "batch", "length", None)
        ctx = dataclasses.replace(ctx, rope=self.rope.angles(ctx.positions, ctx.segment_ids))
        x, cache, aux = self.layers(x, ctx, cache)
        return self.final_layer_norm(x), cache, aux


class GPTNeoXForCausalLM(nnx.Module):
    def __init__(self, gpt_neox: GPTNeoXModel, sizes: Sizes, tied: bool):
        self.sizes, self.ropes = sizes, (gpt_neox.rope,)
        self.embedding = "gpt_neox.embed_in"
        # Older exports also contain the causal mask of each layer, the RoPE table, and a copy of the tied head.
        heads = ("lm_head.weight", "embed_out.weight") if tied else ()
        self.ignored = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq", *heads)
        self.output = self.embedding if tied else "lm_head"
        self.gpt_neox = gpt_neox
        self.lm_head = None if tied else Linear(sizes.embed, sizes.vocab, ("embed", "vocab"))
        if self.lm_head is not None:  # checkpoints have the name of older transformers
            layout = Layout("weight", module=("lm_head", "embed_out"))
            weight = self.lm_head.weight
            weight.set_metadata("row", dataclasses.replace(weight.row, layouts=(layout,)))

    def hidden(self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Memories = None):
        return self.gpt_neox(tokens, after_virtual_tokens(self, tokens, ctx), cache)

    def unembed(self, x: Float[Array, "*of E"], ctx: Context) -> Float32[Array, "*of V"]:
        """Project hidden states `[..., E]` to float32 logits `[..., V]`."""
        logits = self.gpt_neox.embed_in.attend(x) if self.lm_head is None else self.lm_head(x, ctx)
        return logits.astype(jnp.float32)


def build(facts: Facts) -> GPTNeoXForCausalLM:
    """Build the abstract model of a `gpt_neox` config.json."""
    embed, heads, eps, vocab = facts["hidden_size"], facts["num_attention_heads"], facts["layer_norm_eps"], facts["vocab_size"]
    head_dim = embed // heads  # transformers' configuration class has checked divisibility
    positions = longest_text(facts["rope_parameters"], facts["max_position_embeddings"])
    sizes = Sizes(facts["num_hidden_layers"], heads, heads, head_dim, embed, vocab, positions)
    facts.dropout("attention_dropout", "hidden_dropout")
    facts.inert("classifier_dropout", "is_decoder")  # transformers' causal model reads neither
    block = GPTNeoXBlock(
        GPTNeoXAttention(embed, heads, facts["attention_bias"]),
        GPTNeoXMLP(embed, facts["intermediate_size"], facts["hidden_act"]),
        embed,
        eps,
        facts["use_parallel_residual"],
    )
    rope_parameters = facts["rope_parameters"]
    # transformers 4 wrote both names in addition to those that transformers 4 and 5 read.
    for name, read in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        facts.only(name, rope_parameters[name], None, why=f"transformers reads {read} instead")
    rope = make_rope(rope_parameters, head_dim, facts["max_position_embeddings"])
    layers = Stack(block, (Pattern(head_dim**-0.5),) * sizes.layers)
    model = GPTNeoXModel(vocab, embed, eps, layers, rope)
    return GPTNeoXForCausalLM(model, sizes, facts["tie_word_embeddings"])
