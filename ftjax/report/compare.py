"""Runs side by side, as texts: key figures, settings that differ, and metrics with their intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ftjax.config import Config
from ftjax.config.load import flatten_config, shown_value
from ftjax.evaluate.lm_eval.scores import harness_scores
from ftjax.evaluate.statistic import format_interval, interval_name
from ftjax.report.read import Run
from ftjax.report.setup import warnings
from ftjax.report.terminal import sparkline, tiles

MOST = 8  # runs of one comparison: as many as the page has colours
NONE = "-"
NOT_COMPARED = ("output_dir",)  # it names the run


@dataclass(frozen=True)
class Metric:
    """A metric of the same evaluation in some of the runs: by run, value with bounds, and the number of rows."""

    group: str  # the evaluation
    name: str
    found: Mapping[str, Mapping[str, Any]]
    share: bool = False
    confidence: float = 0.95

    def cell(self, run: str) -> str:
        """Return the value with its interval, as text."""
        one = self.found.get(run)
        if one is None:
            return NONE
        rows = {other.get("rows") for other in self.found.values()}
        told = f", n = {one['rows']:,}" if len(rows) > 1 and one.get("rows") else ""
        return format_interval(one, share=self.share) + told


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the runs by name: the end of their path that tells them apart."""
    paths = [run.folder.resolve() for run in runs]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return dict(zip(names, runs, strict=True))


def figures(runs: Mapping[str, Run]) -> list[list[str]]:
    """Return the key figures: name, and the value of each run."""
    each = {name: dict(tiles(run)) for name, run in runs.items()}
    labels = dict.fromkeys(label for found in each.values() for label in found)
    facts = [["model", *(run.config.model.path for run in runs.values())]]
    facts.append(["objective and method", *(f"{r.config.objective.name}, {r.config.method.name}" for r in runs.values())])
    return [*facts, *([label, *(found.get(label, NONE) for found in each.values())] for label in labels)]


def settings(runs: Mapping[str, Run]) -> list[list[str]]:
    """Return the settings that differ, and what else does: the documents, the devices and the versions."""
    each = [flatten_config(run.config) for run in runs.values()]
    own = [{key for key in flat if not _is_default(key, run.config)} for flat, run in zip(each, runs.values(), strict=True)]
    rows = []
    for key in dict.fromkeys(key for found in each for key in found):
        values = [shown_value(found[key]) if key in found else NONE for found in each]
        if NONE in values and not any(key in changed for changed in own):
            continue  # another method has no such setting, and this one leaves it as it is
        if key not in NOT_COMPARED and len(set(values)) > 1:
            rows.append([key, *values])
    for label, read in FACTS.items():
        values = [read(run.record) for run in runs.values()]
        if len(set(values)) > 1:
            rows.append([label, *values])
    return rows


def _is_default(key: str, config: Config) -> bool:
    *sections, name = key.split(".")
    part = config
    for section in sections:
        part = getattr(part, section)
    return getattr(part, name) == type(part).model_fields[name].get_default(call_default_factory=True)


def _documents(which: str) -> Callable[[Mapping[str, Any]], str]:
    def read(record: Mapping[str, Any]) -> str:
        found = record.get("documents", {}).get(which)
        return f"{found['documents']:,} documents, {found['tokens']:,} tokens ({found['digest'][:8]})" if found else NONE

    return read


def _devices(record: Mapping[str, Any]) -> str:
    found = record.get("devices")
    return f"{found.get('count')} {found.get('platform')} ({found.get('kind')})" if found else NONE


FACTS = {
    "documents of data.train": _documents("data.train"),
    "documents of data.validation": _documents("data.validation"),
    "devices": _devices,
    "versions": lambda record: ", ".join(f"{name} {one}" for name, one in record.get("versions", {}).items()) or NONE,
}


def metrics(runs: Mapping[str, Run]) -> list[Metric]:
    """Return the metrics of evaluations and checks, by evaluation: the same task on the same data."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    kinds: dict[tuple[str, str], tuple[bool, float]] = {}

    def add(run: str, group: str, name: str, value: Mapping[str, Any], share: bool = False, confidence: float = 0.95) -> None:
        if value.get("value") is not None:
            found.setdefault((group, name), {})[run] = value
            kinds[group, name] = share, confidence

    for run, one in runs.items():
        for measured in one.evaluations:
            results = measured.results
            for score in harness_scores(results) if "results" in results else ():
                low, high = score.bounds
                value = {"value": score.value, "low": low, "high": high, "rows": score.rows}
                add(run, f"lm-evaluation-harness: {score.task}", score.metric, value)
            group = f"{results.get('task')} on {results.get('data')}"
            for name, value in results.get("metrics", {}).items():
                add(run, group, name, {"rows": results.get("rows"), **value}, confidence=results.get("confidence", 0.95))
        for measured in one.checks:
            for finding in measured.results.get("findings", []):
                if isinstance(value := finding.get("value"), Mapping):
                    add(run, "check", finding["title"], {"rows": finding.get("rows"), **value}, bool(finding.get("share")))
    ordered = sorted(found, key=lambda key: (key[0] == "check", list(found).index(key)))
    return [Metric(group, name, found[group, name], *kinds[group, name]) for group, name in ordered]


def metric_rows(which: Sequence[Metric], runs: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of the metrics of one evaluation."""
    head = [f"metric ({interval_name(which[0].confidence)})", *runs]
    return head, [[one.name, *(one.cell(run) for run in runs)] for one in which]


def bounds(one: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return value, low and high as numbers; NaN where there is none."""
    return tuple(math.nan if one.get(key) is None else float(one[key]) for key in ("value", "low", "high"))


def print_comparison(runs: Mapping[str, Run], console: Any) -> None:
    """Print the comparison as tables."""
    from ftjax.console import print_table, say

    print_table(console, ["", *runs], figures(runs), title="key figures")
    for label, name in (("training loss", "train/loss"), ("validation loss", "eval/loss")):
        if curves := {run: one.curve(name) for run, one in runs.items() if len(one.curve(name)) > 1}:
            say(console)
            rows = [[run, sparkline([value for _, value in points])] for run, points in curves.items()]
            print_table(console, ["", ""], rows, title=label, left=(0, 1))
    say(console)
    rows = settings(runs) or [["nothing but the folder", *("" for _ in runs)]]
    columns = range(1 + len(runs))
    print_table(console, ["", *runs], rows, title="what differs in the settings", left=columns)
    for group, found in groupby(metrics(runs), key=lambda one: one.group):
        say(console)
        print_table(console, *metric_rows(list(found), runs), title=group)
    for name, run in runs.items():
        for words in warnings(run):
            say(console, f"warning: {name}: {words}", "yellow")
