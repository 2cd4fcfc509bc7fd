"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and a sliding window in later layers if the config has one.

Source: Qwen Team 2024 (arXiv:2407.10671).
"""

from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaBlock, LlamaForCausalLM, attention, decoder, mlp, whole_rope
from ftjax.models.nn.layer_types import patterns


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `qwen2` config.json."""
    # transformers has converted these to `layer_types` and `sliding_window`.
    facts.inert("use_sliding_window", "max_window_layers")
    parts = attention(facts, bias=True, bias_out=False), mlp(facts)
    block = LlamaBlock(*parts, facts["hidden_size"], facts["rms_norm_eps"])
    return decoder(facts, block, patterns(facts, head_size(facts) ** -0.5), whole_rope(facts))
