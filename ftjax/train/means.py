"""Means of a loss and of its metrics over several batches."""

from collections.abc import Mapping

import numpy as np


class Means:
    """Weighted means by name, summed in float64."""

    def __init__(self):
        self._sums: dict[str, np.ndarray] = {}

    def add(self, totals: Mapping[str, tuple[float, float]]) -> None:
        """Add batches. Args: totals: by name, a weighted sum and its total weight."""
        for name, pair in totals.items():
            self._sums[name] = self._sums.get(name, np.zeros(2)) + np.array(pair, np.float64)

    def __getitem__(self, name: str) -> float:
        """Return the mean of a name; 0 if its total weight is 0."""
        total, weight = self._sums.get(name, np.zeros(2))
        return float(total / weight) if weight else 0.0

    def __contains__(self, name: str) -> bool:
        """Return whether a name has a weight above 0."""
        return bool(self._sums.get(name, np.zeros(2))[1])

    def means(self) -> dict[str, float]:
        """Return the means of all names with a weight above 0."""
        return {name: self[name] for name in self._sums if name in self}

    def clear(self) -> None:
        self._sums.clear()

    def state(self) -> dict[str, list[float]]:
        """Return the state as JSON."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Load a `state`."""
        self._sums = {name: np.array(pair) for name, pair in state.items()}
