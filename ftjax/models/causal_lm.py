"""What a family's root module promises to the rest of ftjax.

Legend: B batch, T query length, E embed, V vocab.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax

from ftjax.models.context import Context
from ftjax.models.facts import Facts
from ftjax.models.rope import Rope, longest_text


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, which its family reads off config.json once.

    Attributes:
        heads: query heads of a layer.
        kv_heads: heads of keys and values; where layers differ, the most.
        head_dim: size of a query head.
        embed: the width of the hidden states.
        vocab: rows of the input embedding.
        positions: tokens of the longest text that the model is made for.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    embed: int
    vocab: int
    positions: int


@runtime_checkable
class CausalLM(Protocol):
    """A root module, as `build(facts)` of a family gives it and `ftjax.models.model.build_module` completes it.

    Attributes:
        sizes: of the model; a method that adapts it changes none of them.
        embedding: path of the module that holds the input embedding `[V, E]`.
        output: path of the module that projects hidden states to logits; the embedding itself where the two are tied.
        ignored: endings of checkpoint tensors that older exports hold and the model does not need.
        ropes: the rotary embeddings of its layers; none where positions are learned.
        notes: what the person who trains the model should know about its config.json.
        max_positions: the longest text that a table of positions has rows for (GPT-2); None without such a table.
    """

    sizes: Sizes
    embedding: str
    output: str
    ignored: tuple[str, ...]
    ropes: tuple[Rope, ...]
    notes: tuple[str, ...]
    max_positions: int | None

    def hidden(self, tokens: jax.Array, ctx: Context, cache: Any = None) -> tuple[jax.Array, Any, jax.Array]:
        """`(hidden states [B, T, E], cache, auxiliary loss)` of token ids `[B, T]`, or of virtual tokens `[B, T, E]`."""
        ...

    def unembed(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Hidden states `[..., E]` -> float32 logits `[..., V]`."""
        ...


def head_size(facts: Facts) -> int:
    """`head_dim`, which is optional in every config.json with Llama's names."""
    return facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]


def read_sizes(facts: Facts) -> Sizes:
    """`Sizes` of a config.json with Llama's names."""
    return Sizes(
        layers=facts["num_hidden_layers"],
        heads=facts["num_attention_heads"],
        kv_heads=facts["num_key_value_heads"],
        head_dim=head_size(facts),
        embed=facts["hidden_size"],
        vocab=facts["vocab_size"],
        positions=longest_text(facts["rope_parameters"], facts["max_position_embeddings"]),
    )
