"""OLMo 2: norms after each sublayer instead of before, and over all heads of queries and keys (OLMo Team 2024,
arXiv:2501.00656).

Legend: B batch, T query length, E embed, N heads, K kv heads, H head dim.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.mesh import constrain
from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaAttention, LlamaForCausalLM, attention, decoder, mlp, whole_rope
from ftjax.models.nn.attention import QueriesKeysValues
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, RMSNorm


def olmo_norm(size: int, eps: float) -> RMSNorm:
    return RMSNorm(size, eps, round_first=False)


class Olmo2Attention(LlamaAttention):
    """Llama's attention with `q_norm` and `k_norm` over all heads of a token together."""

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> QueriesKeysValues:
        b, t, _ = x.shape
        q, k = self.q_norm(self.q_proj(x, ctx)), self.k_norm(self.k_proj(x, ctx))
        return tuple(y.reshape(b, t, -1, self.head_dim) for y in (q, k, self.v_proj(x, ctx)))


class Olmo2Block(nnx.Module):
    def __init__(self, attention: nnx.Module, mlp: nnx.Module, embed: int, eps: float):
        self.self_attn = attention
        self.mlp = mlp
        self.post_attention_layernorm = olmo_norm(embed, eps)
        self.post_feedforward_layernorm = olmo_norm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        y, cache = self.self_attn(x, ctx, pattern, layer, cache)
        x = constrain(x + self.post_attention_layernorm(self.attention_adapters(x, y, ctx)), "batch", "length", None)
        x = x + self.post_feedforward_layernorm(self.output_adapters(x, self.mlp(x, ctx), ctx))
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


def parts(facts: Facts) -> tuple[LlamaAttention, nnx.Module, int, float]:
    """Return attention, MLP, E and epsilon, the arguments of an OLMo 2 or 3 block."""
    head_dim, eps = head_size(facts), facts["rms_norm_eps"]
    norms = {
        "q_norm": olmo_norm(facts["num_attention_heads"] * head_dim, eps),
        "k_norm": olmo_norm(facts["num_key_value_heads"] * head_dim, eps),
    }
    made = attention(facts, bias=facts["attention_bias"], kind=Olmo2Attention, **norms)
    return made, mlp(facts), facts["hidden_size"], eps


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of an `olmo2` config.json."""
    kinds = (Pattern(head_size(facts) ** -0.5),) * facts["num_hidden_layers"]
    model = decoder(facts, Olmo2Block(*parts(facts)), kinds, whole_rope(facts))
    model.model.norm = olmo_norm(facts["hidden_size"], facts["rms_norm_eps"])
    return model
