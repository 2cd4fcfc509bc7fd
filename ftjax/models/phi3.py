"""Phi-3, Phi-3.5 mini, Phi-4 and Phi-4-mini: Llama with fused projections, LongRoPE, and partial RoPE.

Source: Abdin et al. 2024 (arXiv:2404.14219).

Legend: B batch, T query length, E embed, N heads, K kv heads, H head dim, F mlp.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaBlock, LlamaForCausalLM, decoder
from ftjax.models.nn.attention import QueriesKeysValues, self_attention
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern, window
from ftjax.models.nn.layers import Linear, activation
from ftjax.models.nn.memory import KeysValues
from ftjax.models.nn.rope import make_rope


class Phi3Attention(nnx.Module):
    def __init__(self, embed: int, heads: int, kv_heads: int, head_dim: int):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.memory = (KeysValues(kv_heads, head_dim, head_dim),)
        self.qkv_proj = Linear(embed, (heads + 2 * kv_heads) * head_dim, ("embed", "heads"))
        self.o_proj = Linear(heads * head_dim, embed, ("heads", "embed"))

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map `x [B, T, E]` to `([B, T, E], cache)`."""
        return self.attend(self.project(x, ctx), ctx, pattern, layer, cache)

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> QueriesKeysValues:
        """Project `x [B, T, E]` to queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, before RoPE."""
        b, t, _ = x.shape
        qkv = self.qkv_proj(x, ctx).reshape(b, t, -1, self.head_dim)
        return tuple(jnp.split(qkv, (self.heads, self.heads + self.kv_heads), axis=2))

    def attend(self, qkv: tuple[jax.Array, ...], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map the result of `project` to `([B, T, E], cache)`."""
        y, cache = self_attention(*qkv, ctx, pattern, layer, cache)
        return self.o_proj(y, ctx), cache


class Phi3MLP(nnx.Module):
    """`down(act(gate) * up)`, with gate and up from one projection."""

    def __init__(self, embed: int, mlp: int, act: str):
        self.act = activation(act)
        self.gate_up_proj = Linear(embed, 2 * mlp, ("embed", "mlp"))
        self.down_proj = Linear(mlp, embed, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        gate, up = jnp.split(self.gate_up_proj(x, ctx), 2, axis=-1)
        return self.down_proj(self.act(gate) * up, ctx)


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `phi3` config.json."""
    embed, head_dim = facts["hidden_size"], head_size(facts)
    facts.dropout("attention_dropout", "resid_pdrop", "embd_pdrop")
    # transformers has moved it to rope_parameters.
    facts.inert("partial_rotary_factor")
    for name in ("full_attn_mod", "interpolate_factor"):  # in Phi-4-mini's file, but unknown to transformers
        facts.only(name, 1, None, why="it is not known to transformers, which would ignore it")
    attention = Phi3Attention(embed, facts["num_attention_heads"], facts["num_key_value_heads"], head_dim)
    block = LlamaBlock(attention, Phi3MLP(embed, facts["intermediate_size"], facts["hidden_act"]), embed, facts["rms_norm_eps"])
    rope, original = dict(facts["rope_parameters"]), facts["original_max_position_embeddings"]
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = original
    kinds = (Pattern(head_dim**-0.5, window(facts)),) * facts["num_hidden_layers"]
    return decoder(facts, block, kinds, make_rope(rope, head_dim, facts["max_position_embeddings"]))
