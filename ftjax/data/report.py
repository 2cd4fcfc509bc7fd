"""Counts of what happened to the data: printed at the start of a run, shown by `preview`, repeated in the model card."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ftjax.errors import printable


@dataclass
class DataReport:
    """Counts of one set. `examples` = `kept` + all of `dropped` + `held_out`; `truncated` is a part of `kept`.

    An example is a row of data, unless the objective makes pairs of rows or takes pairs apart.
    """

    source: str
    rows: int = 0
    kept: int = 0  # examples
    documents: int = 0  # more than `kept` if long rows are split
    truncated: Counter[str] = field(default_factory=Counter)  # by policy
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    held_out: int = 0  # rows that went to validation_split
    tokens: int = 0
    trained_tokens: int = 0
    packed_rows: int = 0
    efficiency: float = 0.0
    max_length: int = 0
    packing: bool = True
    formats: dict[str, str] = field(default_factory=dict)  # per source
    weights: dict[str, float] = field(default_factory=dict)  # per source, if there are several
    notes: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    length_quantiles: dict[str, int] = field(default_factory=dict)
    exact: bool = True  # False: a sample of a streamed set
    joined: int = 0  # pairs that were made of two rows
    divided: int = 0  # pairs that were made two examples
    imitated: bool = True  # False: documents are prompts

    @property
    def examples(self) -> int:
        return self.rows - self.joined + self.divided

    def lines(self) -> list[str]:
        """Return lines for display: one of examples, one of tokens, then warnings."""
        policies = "".join(f" ({policy})" for policy in self.truncated)
        reasons = "".join(f"; {count:,} {reason}" for reason, count in self.dropped.items() if count)
        held = f", {self.held_out:,} held out for validation" if self.held_out else ""
        formats = ", ".join(dict.fromkeys(self.formats.values()))
        sampled = "" if self.exact else "of a first part: "
        packed = (
            f"{self.packed_rows:,} rows of {self.max_length:,}, packing efficiency {100 * self.efficiency:.1f}%"
            if self.packing
            else f"{self.packed_rows:,} rows, not packed, {100 * self.efficiency:.1f}% of their tokens are not padding"
        )
        trained = f"{self.trained_tokens:,} trained ({self.trained_tokens / max(self.tokens, 1):.0%})"
        lines = [
            f"{self.source}{f' ({formats})' if formats else ''}: {sampled}{self.kept:,} of {self.examples:,} examples kept, "
            f"{sum(self.truncated.values()):,} truncated{policies}, {sum(self.dropped.values()):,} dropped{held}{reasons}",
            f"{self.tokens:,} tokens, {trained}; {packed}" if self.imitated else f"{self.tokens:,} tokens of prompts",
        ]
        if self.joined and self.exact:
            lines.append(f"{2 * self.joined:,} rows with one answer make {self.joined:,} pairs")
        if self.divided and self.exact:
            lines.append(f"{self.divided:,} pairs make {2 * self.divided:,} answers with a label")
        if len(self.weights) > 1:
            lines.append("an epoch: " + ", ".join(f"{weight:g} x {path}" for path, weight in self.weights.items()))
        return [printable(line) for line in (*lines, *(f"warning: {warning}" for warning in self.warnings))]

    def state(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {
            **asdict(self), "truncated": dict(self.truncated), "dropped": dict(self.dropped), "notes": dict(self.notes)
        }  # fmt: skip

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "DataReport":
        counters = {name: Counter(state[name]) for name in ("truncated", "dropped", "notes")}
        return cls(**{**state, **counters})

    def measure(self, lengths: np.ndarray) -> None:
        """Set the quantiles of the documents' lengths in tokens."""
        if len(lengths):
            values = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1], method="nearest")
            self.length_quantiles = dict(zip(("min", "25%", "50%", "75%", "95%", "max"), map(int, values), strict=True))


def histogram(lengths: np.ndarray, bins: int = 16) -> list[tuple[int, int, int]]:
    """Return `(from, to, documents)` in equal steps of token lengths; `to` is inclusive."""
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(low, high + 1, min(bins, high - low + 1) + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    return [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
