"""Results of lm-evaluation-harness, one metric per line."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HarnessScore:
    """One metric of a task. `stderr` is lm_eval's standard error and `rows` the number of rows; None if it gives none, as is
    `higher_is_better` if the task does not say."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    rows: int | None = None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Bounds of the 95 % interval of the normal approximation."""
        around = None if self.stderr is None else 1.96 * self.stderr
        return (None, None) if around is None else (self.value - around, self.value + around)


def harness_scores(results: Mapping[str, Any]) -> Iterator[HarnessScore]:
    """Yield the scores in a result of `simple_evaluate`, or its JSON: `{"results": {"arc_easy": {"acc,none": 0.4}}, ...}`."""
    for task, values in results.get("results", {}).items():
        rows = results.get("n-samples", {}).get(task, {}).get("effective")
        better = results.get("higher_is_better", {}).get(task, {})
        for name, value in values.items():
            metric, comma, kept = name.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kept}")
            shown = metric if kept == "none" else f"{metric} ({kept})"
            known = float(stderr) if isinstance(stderr, int | float) else None
            yield HarnessScore(task, shown, float(value), known, better.get(metric), rows)
