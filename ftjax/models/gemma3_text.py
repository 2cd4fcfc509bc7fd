"""Gemma 3, text only: Gemma 2 with normalised queries and keys, and a separate RoPE per layer type.

Source: Gemma Team 2025 (arXiv:2503.19786). The multimodal wrapper is another model type, `gemma3`.
"""

from dataclasses import replace

from jaxtyping import Array, Float

from ftjax.models.causal_lm import read_sizes
from ftjax.models.facts import Facts
from ftjax.models.gemma import GemmaForCausalLM, GemmaModel, attention_and_mlp, gemma_norm
from ftjax.models.gemma2 import Gemma2Block
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Kind, patterns, ropes
from ftjax.models.nn.stack import Stack


class Gemma3Block(Gemma2Block):
    def __call__(self, x: Float[Array, "B T E"], ctx: Context, kind: Kind, layer, cache: Memories):
        return super().__call__(x, replace(ctx, rope=ctx.rope[kind.rope]), kind.pattern, layer, cache)


def build(facts: Facts) -> GemmaForCausalLM:
    """Build the abstract model of a `gemma3_text` config.json."""
    embed, eps, vocab, head_dim = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"], facts["head_dim"]
    # transformers has converted the pattern to `layer_types`; its Gemma 3 never caps scores, whatever the config says.
    facts.inert("sliding_window_pattern", "_sliding_window_pattern", "attn_logit_softcapping")
    norms = {"q_norm": gemma_norm(head_dim, eps), "k_norm": gemma_norm(head_dim, eps)}
    block = Gemma3Block(*attention_and_mlp(facts, "hidden_activation", **norms), embed, eps)
    kinds = tuple(map(Kind, patterns(facts, facts["query_pre_attn_scalar"] ** -0.5), facts["layer_types"]))
    model = GemmaModel(vocab, embed, eps, Stack(block, kinds), ropes(facts, head_dim))
    return GemmaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"], facts["final_logit_softcapping"])
