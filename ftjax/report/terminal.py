"""The report in a few lines, for a terminal."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from ftjax.report.read import Run
from ftjax.report.results import harness_rows, rows_of
from ftjax.report.setup import warnings

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # characters per curve


def tiles(run: Run) -> list[tuple[str, str]]:
    """Return the key figures: name and value."""
    losses, best = run.curve("train/loss"), run.best("eval/loss", greater=False)
    rates = [rate for _, rate in run.curve("train/tokens_per_second") if rate > 0]
    memory = [value for _, value in run.curve("train/peak_memory_gib")]
    found = [("state", run.state)]
    if losses:
        found.append(("training loss, first to last", f"{losses[0][1]:.4g} → {losses[-1][1]:.4g}"))
    if best:
        found.append(("best validation loss", f"{best[1]:.4g} at step {best[0]:,}"))
    if rates:
        found.append(("tokens per second, median", _rounded(sorted(rates)[len(rates) // 2])))
    if memory:
        found.append(("peak memory", f"{max(memory):.3g} GiB"))
    if "trained" in run.record:
        found.append(("parameters", run.record["trained"].split(" || ")[0].removeprefix("trainable params: ") + " trained"))
    for one in run.checks:
        failed = one.results.get("failed", [])
        rows = [line["rows"] for line in one.results.get("findings", []) if line.get("rows") and line["verdict"] == "passed"]
        fewest = f", on {min(rows):,} rows or more" if rows else ""
        found.append((one.name, f"{len(failed)} beyond their limits" if failed else f"all within their limits{fewest}"))
    return found


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def sparkline(values: Sequence[float]) -> str:
    """Draw `█▆▄▃▂▁`: the means of equal parts, without values that are not finite."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    parts = min(WIDTH, len(values))
    edges = [round(n * len(values) / parts) for n in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1)) if span else 0] for mean in means)


def print_summary(run: Run, console: Any) -> None:
    from ftjax.console import print_table, say

    say(console, f"{run.folder}: {run.config.model.path}, {run.config.method.name}")
    for name, value in tiles(run):
        say(console, f"  {name:<28} {value}")
    for label, name in (("training loss", "train/loss"), ("validation loss", "eval/loss")):
        if len(run.curve(name)) > 1:
            say(console, f"  {label:<28} {sparkline([value for _, value in run.curve(name)])}")
    for one in run.evaluations:
        results = one.results
        if "results" in results:
            title, (head, rows) = f"lm-evaluation-harness: {one.name}", harness_rows(results)
        else:
            title, rows = f"{results.get('task')} on {results.get('data')}", rows_of(results)
            head = ["metric", "n", "value", *(("base", "difference", "p") if "base" in results else ())]
        say(console)
        print_table(console, head, rows, title=title)
    for words in warnings(run):
        say(console, f"warning: {words}", "yellow")
