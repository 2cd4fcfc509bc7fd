"""Falcon-H1: attention and Mamba-2 side by side in every layer, with multipliers on what goes in and out of each (Zuo et al.
2025, arXiv:2507.22448).

Source: transformers, models/falcon_h1/modeling_falcon_h1.py.

Legend: B batch, T length, E embed, V vocab.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.bamba import BambaModel, mamba_sizes, step_limits
from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.granite import times
from ftjax.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP, attention, whole_rope
from ftjax.models.nn.attention import QueriesKeysValues
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context, Tokens
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, RMSNorm
from ftjax.models.nn.mamba2 import GatedGroupNorm, Mamba2, MambaSizes
from ftjax.models.nn.stack import Stack


class Multipliers(NamedTuple):
    """Factors of one layer."""

    attention_in: float
    attention_out: float
    ssm_in: float
    ssm_out: float


class FalconAttention(LlamaAttention):
    """Llama's attention, with its keys multiplied by `multiplier`."""

    multiplier: float

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> QueriesKeysValues:
        q, k, v = super().project(x, ctx)
        return q, times(k, self.multiplier), v


class FalconMamba(Mamba2):
    """Mamba-2 with a factor on each part of its projection: gate, values, keys, queries and steps."""

    multipliers: tuple[float, ...]

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T _"]:
        parts = (self.sizes.channels[0], *self.sizes.channels, self.sizes.heads)
        y = self.in_proj(x, ctx)
        return (y.astype(jnp.float32) * np.repeat(np.asarray(self.multipliers, np.float32), parts)).astype(y.dtype)


class FalconMLP(LlamaMLP):
    """Llama's MLP with a factor on its gate and one on its result."""

    multipliers: tuple[float, float]

    def all_at_once(self, x: Float[Array, "*of E"], ctx: Context) -> Float[Array, "*of E"]:
        gate, down = self.multipliers
        return times(self.down_proj(self.act(times(self.gate_proj(x, ctx), gate)) * self.up_proj(x, ctx), ctx), down)


class FalconH1Block(nnx.Module):
    """Attention and Mamba-2 on the same input, whose results are added, and an MLP."""

    def __init__(self, attention: FalconAttention, mamba: FalconMamba, mlp: FalconMLP, embed: int, eps: float, by: Multipliers):
        self.self_attn, self.mamba, self.feed_forward, self.by = attention, mamba, mlp, by
        self.input_layernorm, self.pre_ff_layernorm = RMSNorm(embed, eps), RMSNorm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        h, by = self.input_layernorm(x), self.by
        y, cache = self.mamba.attend(self.mamba.project(times(h, by.ssm_in), ctx), ctx, pattern, layer, cache)
        qkv = self.self_attn.project(times(h, by.attention_in), ctx)
        attended, cache = self.self_attn.attend(qkv, ctx, pattern, layer, cache)
        y = times(y, by.ssm_out) + times(attended, by.attention_out)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        x = x + self.output_adapters(x, self.feed_forward(self.pre_ff_layernorm(x), ctx), ctx)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


class FalconH1Model(BambaModel):
    """Bamba's model, with its embeddings multiplied by `multiplier`."""

    multiplier: float

    def embed(self, tokens: Tokens, dtype) -> Float[Array, "B T E"]:
        return times(self.embed_tokens(tokens, dtype), self.multiplier)


class FalconH1ForCausalLM(LlamaForCausalLM):
    """Llama's, with its logits multiplied by `multiplier`."""

    multiplier: float

    def unembed(self, x: Float[Array, "*of E"], ctx: Context) -> Float32[Array, "*of V"]:
        return super().unembed(x, ctx) * self.multiplier


def factors(facts: Facts, name: str, count: int) -> tuple[float, ...]:
    """Read a list of so many factors. Raises UserError for another number of them."""
    found = facts[name]
    if len(found) != count:
        raise UserError(f"config.json of this {facts.model_type} model has {len(found)} {name}; expected {count}")
    return tuple(map(float, found))


def mamba2(facts: Facts, sizes: MambaSizes) -> FalconMamba:
    """Build the Mamba-2 layer."""
    embed, channels = facts["hidden_size"], sizes.channels[0]
    expanded, size = int(facts["mamba_expand"] * embed), facts["mamba_d_ssm"]
    assert channels == (expanded if size is None else size)  # checked by transformers' configuration class
    last, eps = facts["mamba_norm_before_gate"], facts["rms_norm_eps"]
    norm = GatedGroupNorm(channels, sizes.groups, eps if facts["mamba_rms_norm"] else None, gate_last=bool(last))
    biases = {"bias": facts["mamba_proj_bias"], "conv_bias": facts["mamba_conv_bias"], "bias_out": facts["projectors_bias"]}
    layer = FalconMamba(embed, sizes, facts["hidden_act"], norm, **biases, limits=step_limits(facts))
    layer.multipliers = factors(facts, "ssm_multipliers", 5)
    layer.out_proj.adaptable = False  # PEFT refuses an adapter on it
    return layer


def build(facts: Facts) -> FalconH1ForCausalLM:
    """Build the abstract model of a `falcon_h1` config.json."""
    embed, eps, head_dim, sizes = facts["hidden_size"], facts["rms_norm_eps"], head_size(facts), mamba_sizes(facts)
    facts.inert("num_logits_to_keep")  # of the prompt while generating
    facts.only("mamba_use_mlp", True, None, why="transformers has an MLP in every layer")  # in published files
    facts.inert("mlp_expansion_factor")  # in published files too; the width is in intermediate_size
    attend = attention(facts, bias=facts["attention_bias"], kind=FalconAttention)
    attend.multiplier = float(facts["key_multiplier"])
    mlp = FalconMLP(embed, facts["intermediate_size"], facts["hidden_act"], facts["mlp_bias"])
    mlp.multipliers = factors(facts, "mlp_multipliers", 2)
    names = ("attention_in_multiplier", "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier")
    by = Multipliers(*(float(facts[name]) for name in names))
    block = FalconH1Block(attend, mamba2(facts, sizes), mlp, embed, eps, by)
    stack = Stack(block, (Pattern(head_dim**-0.5),) * facts["num_hidden_layers"])
    model = FalconH1Model(facts["vocab_size"], embed, eps, stack, whole_rope(facts))
    model.multiplier = float(facts["embedding_multiplier"])
    root = FalconH1ForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
    root.multiplier = float(facts["lm_head_multiplier"])
    return root
