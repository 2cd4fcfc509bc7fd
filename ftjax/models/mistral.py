"""Mistral: Llama with a sliding window in all layers, if the config has one (Jiang et al. 2023, arXiv:2310.06825)."""

from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaBlock, LlamaForCausalLM, attention, decoder, mlp, whole_rope
from ftjax.models.nn.layer_types import Pattern, window


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `mistral` config.json."""
    block = LlamaBlock(attention(facts, bias=False), mlp(facts), facts["hidden_size"], facts["rms_norm_eps"])
    kinds = (Pattern(head_size(facts) ** -0.5, window(facts)),) * facts["num_hidden_layers"]
    return decoder(facts, block, kinds, whole_rope(facts))
