"""What tells the attention of one layer from another's."""

from dataclasses import dataclass

MASKED = -1e30  # finite, so that a row without any visible key gives numbers and not NaN


@dataclass(frozen=True)
class Pattern:
    """Static facts of a layer's attention.

    Attributes:
        scale: factor on the scores.
        window: a query sees this many keys, itself included; None sees all.
        softcap: `softcap * tanh(scores / softcap)` (Gemma 2), or None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
