"""What became of the data: counts that the start of a run prints and the model card repeats."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class DataReport:
    """Counts of one split."""

    source: str
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    trained_tokens: int = 0
    packed_rows: int = 0
    efficiency: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: one line of examples, one of tokens, then warnings."""
        reasons = "".join(f", {count:,} {reason}" for reason, count in self.dropped.items())
        return [
            f"{self.source}: {self.kept:,} of {self.rows:,} examples kept, {self.truncated:,} truncated, "
            f"{sum(self.dropped.values()):,} dropped{reasons}",
            f"{self.tokens:,} tokens, {self.trained_tokens:,} trained; {self.packed_rows:,} rows, "
            f"packing efficiency {100 * self.efficiency:.1f}%",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
