"""Static attention settings that may differ between layers."""

from dataclasses import dataclass

MASKED = -1e30  # finite, so that a row without any visible key does not give NaN


@dataclass(frozen=True)
class Pattern:
    """Static attention settings of a layer.

    Attributes:
        scale: factor on the scores.
        window: number of keys that a query attends to, including its own; None for all.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2); None for no cap.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
