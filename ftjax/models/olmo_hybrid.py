"""OLMo Hybrid: three layers of gated DeltaNet to one of OLMo 3's attention, with or without RoPE (OLMo Team 2026).

Source: transformers, models/olmo_hybrid/modeling_olmo_hybrid.py.

Legend: B batch, T length, E embed.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.mesh import constrain
from ftjax.models.causal_lm import Sizes, head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM, LlamaModel, mlp
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.gated_delta_net import DeltaSizes, GatedDeltaNet, Projected
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, Linear
from ftjax.models.nn.param import Layout
from ftjax.models.nn.remat import projected
from ftjax.models.nn.rope import longest_text, make_rope, refuse_partial
from ftjax.models.nn.short_convolution import ShortConvolution
from ftjax.models.nn.stack import Stack
from ftjax.models.olmo2 import Olmo2Block, olmo_norm, parts
from ftjax.models.qwen3_5_text import delta_sizes, layer_types

STORED = {"input_layernorm": "attention_layer_norm", "post_attention_layernorm": "feedforward_layer_norm"}
NORM_EPS = 1e-5  # of the gated norm, whatever the others have


class OlmoDeltaNet(GatedDeltaNet):
    """A gated DeltaNet with a projection for each of its inputs."""

    def __init__(self, embed: int, sizes: DeltaSizes, act: str, negative: bool):
        """With `negative`, states may change sign."""
        super().__init__(embed, sizes, act, NORM_EPS)
        self.strongest = 2.0 if negative else 1.0
        self.o_norm, self.o_proj = self.norm, self.out_proj
        del self.norm, self.out_proj, self.conv1d
        for name, size in zip("qkv", sizes.channels, strict=True):
            setattr(self, f"{name}_proj", Linear(embed, size, ("embed", "heads")))
            # Checkpoints have three convolutions; transformers joins them when it loads.
            setattr(self, f"{name}_conv1d", ShortConvolution(size, sizes.width))
        self.g_proj = Linear(embed, sizes.channels[2], ("embed", "heads"))
        self.a_proj = Linear(embed, sizes.value_heads, ("embed", "heads"))
        self.b_proj = Linear(embed, sizes.value_heads, ("embed", "heads"))

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> Projected:
        (b, t, _), sizes = x.shape, self.sizes
        q, k = (layer(x, ctx).reshape(b, t, sizes.key_heads, -1) for layer in (self.q_proj, self.k_proj))
        v, gate = (layer(x, ctx).reshape(b, t, sizes.value_heads, -1) for layer in (self.v_proj, self.g_proj))
        return Projected(q, k, v, gate, self.a_proj(x, ctx), self.b_proj(x, ctx))

    def taps(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = (self.sizes.key_heads, self.sizes.key_heads, self.sizes.value_heads)
        each = (conv.taps for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d))
        return tuple(taps.reshape(1, self.sizes.width, own, -1) for taps, own in zip(each, heads, strict=True))

    def output(self, y: Float[Array, "B T N V"], gate: Float[Array, "B T N V"], ctx: Context) -> Float[Array, "B T E"]:
        return self.o_proj(self.o_norm(y, gate).reshape(*y.shape[:2], -1), ctx)


class OlmoLinearBlock(nnx.Module):
    """A gated DeltaNet and an MLP, with norms before each, where layers with attention have them after."""

    def __init__(self, mixer: OlmoDeltaNet, mlp: nnx.Module, embed: int, eps: float):
        self.linear_attn, self.mlp = mixer, mlp
        self.input_layernorm, self.post_attention_layernorm = olmo_norm(embed, eps), olmo_norm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        found = projected(self.input_layernorm, self.linear_attn, x, ctx)
        y, cache = self.linear_attn.attend(found, ctx, pattern, layer, cache)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        x = x + self.output_adapters(x, self.mlp(self.post_attention_layernorm(x), ctx), ctx)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


def name_norms(block: nnx.Module) -> None:
    """Give the norms of a block the names that they have in checkpoints."""
    for name, stored in STORED.items():
        if (norm := getattr(block, name, None)) is not None:
            layout = Layout("weight", module=(name, stored))
            norm.weight.set_metadata("row", replace(norm.weight.row, layouts=(layout,)))


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of an `olmo_hybrid` config.json."""
    embed, eps, head_dim, types = facts["hidden_size"], facts["rms_norm_eps"], head_size(facts), layer_types(facts)
    # How a new model is initialised.
    facts.inert("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")
    net = OlmoDeltaNet(embed, delta_sizes(facts), facts["hidden_act"], facts["linear_allow_neg_eigval"])
    blocks = {
        "linear_attention": OlmoLinearBlock(net, mlp(facts), embed, eps),
        "full_attention": Olmo2Block(*parts(facts)),
    }
    for block in blocks.values():
        name_norms(block)
    stack = Stack(blocks, (Pattern(head_dim**-0.5),) * len(types), types)
    rope, longest = facts["rope_parameters"] or {}, facts["max_position_embeddings"]
    if rope.get("rope_theta") is None:
        rope, positions = {}, longest
    else:
        rope, positions = make_rope(refuse_partial(rope), head_dim, longest), longest_text(rope, longest)
    heads, kv_heads, vocab = facts["num_attention_heads"], facts["num_key_value_heads"], facts["vocab_size"]
    model = LlamaModel(vocab, embed, eps, stack, rope, olmo_norm)
    sizes = Sizes(len(types), heads, kv_heads, head_dim, embed, vocab, positions)
    return LlamaForCausalLM(model, sizes, facts["tie_word_embeddings"])
