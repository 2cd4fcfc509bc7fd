"""Bamba: Mamba-2, and attention with a partial RoPE in a few layers (IBM, Princeton, CMU and UIUC 2024).

Source: transformers, models/bamba/modeling_bamba.py.

Legend: B batch, T length, E embed.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaAttention, LlamaForCausalLM, LlamaModel, attention, mlp
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, RMSNorm
from ftjax.models.nn.mamba2 import GatedGroupNorm, Mamba2, MambaSizes
from ftjax.models.nn.remat import projected
from ftjax.models.nn.rope import Rope, make_rope
from ftjax.models.nn.stack import Stack


class BambaBlock(nnx.Module):
    """A mixer, Mamba-2 or attention, and an MLP."""

    def __init__(self, mixer: Mamba2 | LlamaAttention, mlp: nnx.Module, embed: int, eps: float):
        self.mamba = mixer if isinstance(mixer, Mamba2) else None
        self.self_attn = mixer if isinstance(mixer, LlamaAttention) else None
        self.feed_forward = mlp
        self.input_layernorm, self.pre_ff_layernorm = RMSNorm(embed, eps), RMSNorm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        mixer = self.mamba or self.self_attn
        y, cache = mixer.attend(projected(self.input_layernorm, mixer, x, ctx), ctx, pattern, layer, cache)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        x = x + self.output_adapters(x, self.feed_forward(self.pre_ff_layernorm(x), ctx), ctx)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


class BambaModel(LlamaModel):
    """Llama's model with another name for its last norm."""

    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack, rope: Rope):
        super().__init__(vocab, embed, eps, layers, rope)
        self.final_layernorm = self.norm
        del self.norm

    def last_norm(self, x: Float[Array, "*of E"]) -> Float[Array, "*of E"]:
        return self.final_layernorm(x)


def step_limits(facts: Facts) -> tuple[float, float]:
    """Read the smallest and the largest step of Mamba-2. Raises UserError if they are not two such numbers."""
    limits = facts["time_step_limit"]
    if not isinstance(limits, list | tuple) or len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
        raise UserError(
            f"config.json of this {facts.model_type} model has time_step_limit = {limits!r}; give the smallest and the largest "
            "step, such as [0.0, Infinity]"
        )
    return float(limits[0]), float(limits[1])


def checked(facts: Facts, sizes: MambaSizes) -> MambaSizes:
    """Return the sizes. Raises UserError if the groups do not divide the heads."""
    if sizes.heads % sizes.groups:
        raise UserError(
            f"config.json of this {facts.model_type} model has {sizes.heads} heads of Mamba-2 in {sizes.groups} groups; the "
            "number of heads must be a multiple of that of groups"
        )
    return sizes


def mamba_sizes(facts: Facts) -> MambaSizes:
    """Read the sizes of Mamba-2 from a config.json with Bamba's field names."""
    facts.inert("mamba_chunk_size")  # how the same numbers are computed
    heads, head_dim = facts["mamba_n_heads"], facts["mamba_d_head"]
    groups, state, width = facts["mamba_n_groups"], facts["mamba_d_state"], facts["mamba_d_conv"]
    return checked(facts, MambaSizes(heads, head_dim, groups, state, width))


def mamba2(facts: Facts) -> Mamba2:
    """Build the Mamba-2 layer of a config.json with Bamba's field names."""
    sizes, embed = mamba_sizes(facts), facts["hidden_size"]
    channels = sizes.channels[0]
    assert int(facts["mamba_expand"] * embed) == channels  # checked by transformers' configuration class
    norm = GatedGroupNorm(channels, sizes.groups, facts["rms_norm_eps"])
    biases = {"bias": facts["mamba_proj_bias"], "conv_bias": facts["mamba_conv_bias"]}
    return Mamba2(embed, sizes, facts["hidden_act"], norm, **biases, limits=step_limits(facts))


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `bamba` config.json."""
    embed, eps, head_dim = facts["hidden_size"], facts["rms_norm_eps"], head_size(facts)
    chosen = set(facts["attn_layer_indices"] or ())
    types = tuple("attention" if layer in chosen else "mamba" for layer in range(facts["num_hidden_layers"]))
    facts.inert("num_logits_to_keep")  # of the prompt while generating
    facts.only("z_loss_coefficient", 0.0, 0, None, why="the loss on the size of the logits is not implemented")
    facts.inert("partial_rotary_factor")  # transformers has put it into rope_parameters
    mixers = {"mamba": mamba2(facts), "attention": attention(facts, bias=facts["attention_bias"])}
    blocks = {kind: BambaBlock(mixer, mlp(facts, bias=facts["mlp_bias"]), embed, eps) for kind, mixer in mixers.items()}
    stack = Stack(blocks, (Pattern(head_dim**-0.5),) * len(types), types)
    rope = make_rope(facts["rope_parameters"], head_dim, facts["max_position_embeddings"])
    model = BambaModel(facts["vocab_size"], embed, eps, stack, rope)
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
