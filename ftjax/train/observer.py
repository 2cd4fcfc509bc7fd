"""What may be measured of a model while it trains, besides its loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax


@dataclass(frozen=True)
class Observation:
    """What was measured of a model in training: metrics by name, and answers (`prompt`, `text`, and the `reference`)."""

    metrics: Mapping[str, float]
    texts: Sequence[Mapping[str, str]]


class Observer(Protocol):
    """Measures a model at every evaluation."""

    @property
    def facts(self) -> dict[str, Any]:
        """What must be equal on all processes, as JSON: prompts and rows."""

    def __call__(self, params: Mapping[str, jax.Array]) -> Observation:
        """Args: params: all of them, trained and frozen."""
