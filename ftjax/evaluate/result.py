"""Output of an evaluation: results.json, predictions.jsonl, and a table for the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftjax.evaluate.measure import Measured, prompt_text
from ftjax.evaluate.rows import Item
from ftjax.evaluate.statistic import Difference, Interval, format_interval, interval_name

RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"
LOWER_IS_BETTER = ("loss", "perplexity")


def plain(value: Any) -> Any:
    """Convert to JSON values; a float that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Interval | Difference):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def write_predictions(path: Path, items: Sequence[Item], tokenizer: Any, tuned: Measured, base: Measured | None) -> None:
    """Write one JSON object per row: place, prompt, references, prediction and scores, of both models."""
    with path.open("w", encoding="utf-8") as file:
        for number, item in enumerate(items):
            row: dict[str, Any] = {"where": item.where, "prompt": prompt_text(item, tokenizer)}
            row["references"] = list(item.example.references)
            for prefix, measured in (("", tuned), ("base_", base)):
                if measured is None:
                    continue
                if measured.predictions is not None:
                    several = measured.predictions[number]
                    row[f"{prefix}prediction"] = several[0]
                    if len(several) > 1:
                        row[f"{prefix}predictions"] = several
                if measured.finished is not None:
                    row[f"{prefix}finish_reason"] = measured.finished[number][0]
                row[f"{prefix}scores"] = measured.scores.each[number]
            file.write(json.dumps(plain(row), ensure_ascii=False, default=str) + "\n")


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(plain(dict(results)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_results(results: Mapping[str, Any], console: Any) -> None:
    """Print a table of the metrics, and the confusion matrix below it."""
    from ftjax.console import print_table, say

    head = f"{results['task']} on {results['rows']:,} rows of {results['data']}"
    say(console, f"{results['model']}: {head}")
    value = f"value ({interval_name(results['confidence'])})"
    names = ["metric", "n", value, *(("base", "difference", "p") if "base" in results else ())]
    rows = []
    for name, found in results["metrics"].items():
        cells = [name, f"{found.rows:,}", format_interval(found)]
        if "base" in results:
            base, difference = results["base"]["metrics"][name], results["difference"][name]
            cells += [format_interval(base), format_interval(difference, "+"), f"{difference.p_value:.3g}"]
        rows.append(cells)
    print_table(console, names, rows)
    if found := results.get("implicit_rewards"):
        shown = [[name, f"{one.rows:,}", format_interval(one)] for name, one in found.items()]
        print_table(console, ["implicit reward", "n", value], shown, title="relative to the base model")
    for name, found in (("", results), ("base: ", results.get("base", {}))):
        if "confusion_matrix" in found:
            labels = found["labels"]
            rows = [(label, *map(str, row)) for label, row in zip(labels, found["confusion_matrix"], strict=True)]
            print_table(console, ("", *labels), rows, title=f"{name}true class (rows), chosen class (columns)")
        if "table" in found:
            each = found["table"]
            rows = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in each["rows"]]
            print_table(console, each["head"], rows, title=f"{name}each {each['head'][0]}")
