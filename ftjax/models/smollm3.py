"""SmolLM 3: Llama without RoPE in some layers (Yang et al. 2025, arXiv:2501.18795; Hugging Face 2025)."""

from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Array, Float

from ftjax.errors import UserError
from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaBlock, LlamaForCausalLM, attention, decoder, mlp, whole_rope
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern, patterns


class Kind(NamedTuple):
    """Static properties of a layer of SmolLM 3."""

    pattern: Pattern
    rope: bool


class SmolLM3Block(LlamaBlock):
    def __call__(self, x: Float[Array, "B T E"], ctx: Context, kind: Kind, layer, cache: Memories):
        return super().__call__(x, ctx if kind.rope else replace(ctx, rope=None), kind.pattern, layer, cache)


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `smollm3` config.json."""
    # transformers has converted the first three to `layer_types` and `no_rope_layers`; the released model's file has the last.
    facts.inert("use_sliding_window", "no_rope_layer_interval", "max_window_layers", "pretraining_tp")
    layers, with_rope = facts["num_hidden_layers"], facts["no_rope_layers"]  # 1 means with RoPE
    if len(with_rope) < layers:
        raise UserError(
            f"config.json of this smollm3 model has {len(with_rope)} no_rope_layers and num_hidden_layers = {layers}; "
            "give a 1 (RoPE) or a 0 (none) for each layer"
        )
    parts = attention(facts, bias=facts["attention_bias"]), mlp(facts, bias=facts["mlp_bias"])
    block = SmolLM3Block(*parts, facts["hidden_size"], facts["rms_norm_eps"])
    kinds = tuple(map(Kind, patterns(facts, head_size(facts) ** -0.5), map(bool, with_rope[:layers])))
    return decoder(facts, block, kinds, whole_rope(facts))
