"""Gemma 3, text only: Gemma 2 with normed queries and keys, and a RoPE of its own for each type of layer.

Source: Gemma Team 2025 (arXiv:2503.19786). The multimodal wrapper is another model type, `gemma3`.
"""

from dataclasses import replace
from typing import NamedTuple

import jax

from ftjax.errors import UserError
from ftjax.models.attention import Pattern
from ftjax.models.context import Context, KVCache
from ftjax.models.facts import Facts
from ftjax.models.gemma import GemmaForCausalLM, GemmaModel, attention_and_mlp, gemma_norm
from ftjax.models.gemma2 import Gemma2Block
from ftjax.models.layer_types import patterns
from ftjax.models.rope import Rope, make_rope, refuse_partial
from ftjax.models.stack import Stack


class Kind(NamedTuple):
    """What tells Gemma 3's layers apart."""

    pattern: Pattern
    rope: str  # the layer type, under which `rope_parameters` has its RoPE


class Gemma3Block(Gemma2Block):
    def __call__(self, x: jax.Array, ctx: Context, kind: Kind, layer, cache: KVCache | None):
        return super().__call__(x, replace(ctx, rope=ctx.rope[kind.rope]), kind.pattern, layer, cache)


def ropes(facts: Facts) -> dict[str, Rope]:
    """The RoPE of each layer type; UserError for parameters that belong to none."""
    parameters = facts["rope_parameters"]
    other = sorted(key for key in parameters if key not in ("full_attention", "sliding_attention"))
    if other:
        raise UserError(
            f"config.json of this {facts.model_type} model has rope_parameters {', '.join(other)} beside the two layer types; "
            "put them into rope_parameters.full_attention or rope_parameters.sliding_attention"
        )

    def make(kind: str) -> Rope:
        own = refuse_partial(parameters[kind])
        if own.get("truncate") is False:
            raise UserError(
                f"rope_parameters.{kind}: truncate = False is not supported (transformers ignores it where each layer type "
                "has parameters of its own); remove it"
            )
        return make_rope(own, facts["head_dim"], facts["max_position_embeddings"])

    return {kind: make(kind) for kind in sorted(set(facts["layer_types"]))}


def build(facts: Facts) -> GemmaForCausalLM:
    """The abstract model of a `gemma3_text` config.json."""
    embed, eps, vocab, head_dim = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"], facts["head_dim"]
    # The pattern has become `layer_types`; transformers' Gemma 3 does not bound its scores, whatever the config says.
    facts.inert("sliding_window_pattern", "_sliding_window_pattern", "attn_logit_softcapping")
    norms = {"q_norm": gemma_norm(head_dim, eps), "k_norm": gemma_norm(head_dim, eps)}
    block = Gemma3Block(*attention_and_mlp(facts, "hidden_activation", **norms), embed, eps)
    kinds = tuple(map(Kind, patterns(facts, facts["query_pre_attn_scalar"] ** -0.5), facts["layer_types"]))
    model = GemmaModel(vocab, embed, eps, Stack(block, kinds), ropes(facts))
    return GemmaForCausalLM(model, vocab, embed, facts["tie_word_embeddings"], facts.get("final_logit_softcapping"))
