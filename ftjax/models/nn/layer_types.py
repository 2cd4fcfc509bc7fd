"""Read `layer_types` of a config.json: which layers use full or sliding-window attention, and the RoPE of each type."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ftjax.errors import UserError
from ftjax.models.facts import Facts
from ftjax.models.nn.rope import Rope, make_rope, refuse_partial


@dataclass(frozen=True)
class Pattern:
    """Static attention settings of a layer.

    Attributes:
        scale: factor on the scores.
        window: number of keys that a query attends to, including its own; None for all.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2); None for no cap.
        chunk: a query attends only to keys of its chunk of so many tokens, counted from its document's start (Llama 4).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None


class Kind(NamedTuple):
    """Static properties of a layer in models with a separate RoPE per layer type."""

    pattern: Pattern
    rope: str  # the layer type, which is also its key in `rope_parameters`


def window(facts: Facts) -> int | None:
    """Read `sliding_window` of a model without layer types. Raises UserError if it is less than 1."""
    size = facts["sliding_window"]
    if size is not None and size < 1:
        raise UserError(
            f"config.json of this {facts.model_type} model has sliding_window = {size!r}; give the number of tokens that a "
            "token attends to, including itself, or null"
        )
    return size


def patterns(facts: Facts, scale: float, softcap: float | None = None) -> tuple[Pattern, ...]:
    """Return the attention pattern of each layer: `full_attention`, or `sliding_attention` over `sliding_window` keys.

    Raises UserError for any other layer type, and if there are sliding layers but no window.
    """
    types, window = facts["layer_types"], facts["sliding_window"]
    assert len(types) == facts["num_hidden_layers"]  # checked by transformers' configuration class
    other = sorted(set(types) - {"full_attention", "sliding_attention"})
    if other:
        raise UserError(
            f"config.json of this {facts.model_type} model has layer_types {', '.join(other)}, but its layers are "
            "full_attention or sliding_attention"
        )
    if "sliding_attention" in types and (window is None or window < 1):
        raise UserError(
            f"config.json of this {facts.model_type} model has sliding_attention layers, but sliding_window = {window!r}; "
            "give the size of the window in tokens"
        )
    return tuple(Pattern(scale, window if kind == "sliding_attention" else None, softcap) for kind in types)


def ropes(facts: Facts, head_dim: int | Mapping[str, int]) -> dict[str, Rope]:
    """Build the RoPE of each layer type. Raises UserError for parameters that belong to no layer type.

    Args:
        head_dim: the same for all layers, or of each layer type.
    """
    parameters = facts["rope_parameters"]
    other = sorted(key for key in parameters if key not in ("full_attention", "sliding_attention"))
    if other:
        raise UserError(
            f"config.json of this {facts.model_type} model has rope_parameters {', '.join(other)} besides the two layer types; "
            "put them into rope_parameters.full_attention or rope_parameters.sliding_attention"
        )

    def make(kind: str) -> Rope:
        own = parameters[kind]
        if own.get("rope_type") != "proportional":  # rotates whole heads too, with a part of its frequencies at zero
            refuse_partial(own)
        if own.get("truncate") is False:
            raise UserError(
                f"rope_parameters.{kind}: truncate = False is not supported (transformers ignores it where each layer type "
                "has parameters of its own); remove it"
            )
        size = head_dim if isinstance(head_dim, int) else head_dim[kind]
        return make_rope(own, size, facts["max_position_embeddings"])

    return {kind: make(kind) for kind in sorted(set(facts["layer_types"]))}
