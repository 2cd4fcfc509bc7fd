"""Evaluation of a model during training, besides its loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax


@dataclass(frozen=True)
class Observation:
    """Result of an evaluation during training: metrics by name, and answers (`prompt`, `text`, and the `reference`)."""

    metrics: Mapping[str, float]
    texts: Sequence[Mapping[str, str]]


class Observer(Protocol):
    """Evaluates a model during training."""

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that must be equal on all processes, as JSON: prompts and rows."""

    def __call__(self, params: Mapping[str, jax.Array]) -> Observation:
        """Evaluate the model. Args: params: all parameters, trained and frozen."""
