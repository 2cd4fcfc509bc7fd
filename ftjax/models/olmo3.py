"""OLMo 3: OLMo 2 with three sliding-window layers to one full-attention layer, and a separate RoPE per layer type.

Source: OLMo Team 2025 (arXiv:2512.13961).
"""

from dataclasses import replace

from jaxtyping import Array, Float

from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM, decoder
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Kind, patterns, ropes
from ftjax.models.olmo2 import Olmo2Block, olmo_norm, parts


class Olmo3Block(Olmo2Block):
    def __call__(self, x: Float[Array, "B T E"], ctx: Context, kind: Kind, layer, cache: Memories):
        return super().__call__(x, replace(ctx, rope=ctx.rope[kind.rope]), kind.pattern, layer, cache)


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of an `olmo3` config.json."""
    head_dim = head_size(facts)
    kinds = tuple(map(Kind, patterns(facts, head_dim**-0.5), facts["layer_types"]))
    model = decoder(facts, Olmo3Block(*parts(facts)), kinds, ropes(facts, head_dim))
    model.model.norm = olmo_norm(facts["hidden_size"], facts["rms_norm_eps"])
    return model
