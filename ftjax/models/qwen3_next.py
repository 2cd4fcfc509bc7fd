"""Qwen 3 Next: gated DeltaNet and gated attention, with many small experts and a gated shared expert.

Source: transformers, models/qwen3_next/modeling_qwen3_next.py (`Qwen3NextForCausalLM`).

Legend: B batch, T query length, E embed, K key heads, N value heads.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM, mlp
from ftjax.models.nn.context import Context
from ftjax.models.nn.gated_delta_net import DeltaSizes, GatedDeltaNet, Projected
from ftjax.models.nn.layers import Linear
from ftjax.models.qwen3_5_moe_text import moe_model, shared_moe
from ftjax.models.qwen3_5_text import published, stack_of
from ftjax.models.qwen3_moe import sparse_layers


class Qwen3NextDeltaNet(GatedDeltaNet):
    """A gated DeltaNet whose projections have the parts of each key head side by side."""

    def __init__(self, embed: int, sizes: DeltaSizes, act: str, eps: float):
        super().__init__(embed, sizes, act, eps)
        self.in_proj_qkvz = Linear(embed, sum(sizes.channels) + sizes.channels[2], ("embed", "heads"))
        self.in_proj_ba = Linear(embed, 2 * sizes.value_heads, ("embed", "heads"))

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> Projected:
        sizes, (b, t, _) = self.sizes, x.shape
        parts = self.in_proj_qkvz(x, ctx).reshape(b, t, sizes.key_heads, -1)
        values = sizes.channels[2] // sizes.key_heads
        ends = (sizes.key_size, 2 * sizes.key_size, 2 * sizes.key_size + values)
        q, k, v, gate = jnp.split(parts, ends, axis=-1)
        v, gate = (part.reshape(b, t, sizes.value_heads, -1) for part in (v, gate))
        strength, decay = jnp.split(self.in_proj_ba(x, ctx).reshape(b, t, sizes.key_heads, -1), 2, axis=-1)
        return Projected(q, k, v, gate, *(part.reshape(b, t, -1) for part in (decay, strength)))


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `qwen3_next` config.json."""
    published(facts)
    experts = facts["num_experts"]
    sparse, normalise = sparse_layers(facts, facts["num_hidden_layers"], experts), facts["norm_topk_prob"]

    def feed_forward(has_experts: bool) -> nnx.Module:
        moe = shared_moe(facts, normalise=normalise) if has_experts else None
        dense = mlp(facts) if moe is None else moe.shared_expert
        # PEFT treats layers with these names as experts of transformers 4 checkpoints, wherever they are.
        dense.gate_proj.adaptable = dense.up_proj.adaptable = dense.down_proj.adaptable = False
        return moe or dense

    return moe_model(facts, stack_of(facts, Qwen3NextDeltaNet, feed_forward, sparse, experts), sum(sparse))
