"""Ministral: Mistral with full attention in some layers and a sliding window in others.

transformers reads a `mistral` config.json with `layer_types` as this model type, and so does ftjax.
"""

from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaBlock, LlamaForCausalLM, attention, decoder, mlp, whole_rope
from ftjax.models.nn.layer_types import patterns


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `ministral` config.json."""
    block = LlamaBlock(attention(facts, bias=False), mlp(facts), facts["hidden_size"], facts["rms_norm_eps"])
    return decoder(facts, block, patterns(facts, head_size(facts) ** -0.5), whole_rope(facts))
