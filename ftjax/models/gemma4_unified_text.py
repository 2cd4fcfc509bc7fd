"""Gemma 4 12B, text only: Gemma 4 without inputs for each layer and without experts.

Source: transformers, models/gemma4_unified/modeling_gemma4_unified.py (`Gemma4UnifiedForCausalLM`).
"""

from ftjax.models.facts import Facts
from ftjax.models.gemma import GemmaForCausalLM
from ftjax.models.gemma4_text import decoder


def build(facts: Facts) -> GemmaForCausalLM:
    """Build the abstract model of a `gemma4_unified_text` config.json."""
    return decoder(facts, own_input=0, table=0, experts=0)
