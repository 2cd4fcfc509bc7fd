"""The interface of a model family's root module.

Legend: B batch, T query length, E embed, V vocab.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Float32, Shaped

from ftjax.models.facts import Facts
from ftjax.models.nn.context import Context
from ftjax.models.nn.rope import Rope, longest_text


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, as its family reads them from config.json.

    Attributes:
        heads: number of query heads per layer.
        kv_heads: number of key and value heads; the maximum if layers differ.
        head_dim: size of a query head.
        embed: size of the hidden states.
        vocab: rows of the input embedding.
        positions: maximum length of a text in tokens.
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
    """A root module, built by a family's `build(facts)` and completed by `ftjax.models.model.build_module`.

    Attributes:
        sizes: sizes of the model; methods that adapt it do not change them.
        embedding: path of the module that holds the input embedding `[V, E]`.
        output: path of the module that projects hidden states to logits; the embedding if the two are tied.
        ignored: suffixes of tensor names that older exports contain and the model does not need.
        carried: prefixes of the names of tensors that the model does not use and that an export keeps: of image encoders, of
            layers that predict further tokens.
        ropes: rotary embeddings of the layers; empty for learned positions.
        notes: remarks on config.json for the user.
        max_positions: number of rows of the table of learned positions (GPT-2); None without such a table.
    """

    sizes: Sizes
    embedding: str
    output: str
    ignored: tuple[str, ...]
    carried: tuple[str, ...]
    ropes: tuple[Rope, ...]
    notes: tuple[str, ...]
    max_positions: int | None

    def hidden(
        self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Any = None
    ) -> tuple[Float[Array, "B T E"], Any, Float[Array, ""]]:
        """Map token ids, or virtual tokens `[B, T, E]`, to hidden states, the cache and an auxiliary loss."""
        ...

    def unembed(self, x: Float[Array, "*of E"], ctx: Context) -> Float32[Array, "*of V"]:
        """Project hidden states to logits."""
        ...


def head_size(facts: Facts) -> int:
    """Return `head_dim`, which is optional in a config.json with Llama's field names."""
    return facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]


def read_sizes(facts: Facts) -> Sizes:
    """Read `Sizes` from a config.json with Llama's field names."""
    return Sizes(
        layers=facts["num_hidden_layers"],
        heads=facts["num_attention_heads"],
        kv_heads=facts["num_key_value_heads"],
        head_dim=head_size(facts),
        embed=facts["hidden_size"],
        vocab=facts["vocab_size"],
        positions=longest_text(facts["rope_parameters"], facts["max_position_embeddings"]),
    )
