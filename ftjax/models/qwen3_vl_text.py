"""The text model of Qwen 3 VL: Qwen 3 with full attention in all layers.

Its rotary embedding has sections for the time, height and width of an image (MRoPE); the three positions of a text are equal,
so that sections make no difference here. Source: transformers, models/qwen3_vl/modeling_qwen3_vl.py.
"""

from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaBlock, LlamaForCausalLM, attention, decoder, mlp, whole_rope
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import RMSNorm


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `qwen3_vl_text` config.json."""
    head_dim, eps = head_size(facts), facts["rms_norm_eps"]
    norms = {"q_norm": RMSNorm(head_dim, eps), "k_norm": RMSNorm(head_dim, eps)}
    block = LlamaBlock(attention(facts, bias=facts["attention_bias"], **norms), mlp(facts), facts["hidden_size"], eps)
    return decoder(facts, block, (Pattern(head_dim**-0.5),) * facts["num_hidden_layers"], whole_rope(facts))
