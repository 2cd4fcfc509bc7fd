"""Qwen 3: Llama with normalised queries and keys, and a sliding window in later layers if the config has one.

Source: Qwen Team 2025 (arXiv:2505.09388).
"""

from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaBlock, LlamaForCausalLM, attention, decoder, mlp, whole_rope
from ftjax.models.nn.layer_types import patterns
from ftjax.models.nn.layers import RMSNorm


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `qwen3` config.json."""
    # transformers has converted these to `layer_types` and `sliding_window`.
    facts.inert("use_sliding_window", "max_window_layers")
    head_dim, eps = head_size(facts), facts["rms_norm_eps"]
    norms = {"q_norm": RMSNorm(head_dim, eps), "k_norm": RMSNorm(head_dim, eps)}
    block = LlamaBlock(attention(facts, bias=facts["attention_bias"], **norms), mlp(facts), facts["hidden_size"], eps)
    return decoder(facts, block, patterns(facts, head_dim**-0.5), whole_rope(facts))
