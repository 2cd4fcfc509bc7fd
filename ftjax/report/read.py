"""Reading of run folders for reports. Missing files are left out; a folder that is not a run is an error."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ftjax.config import Config
from ftjax.config.load import load_config
from ftjax.errors import UserError

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Measured:
    """One evaluation or check: its folder's name, `results.json`, and the rows beside it."""

    name: str
    results: Mapping[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """Attributes:
    config, config_text: of config.yaml. metrics: the numbers of metrics.jsonl, one dict per line, including `step`.
    generations: (step, answers) during training; completions: the same for answers that were trained, with their rewards;
    warnings: (step, text). record: run.json; {} for runs older than it.
    evaluations, checks: those in the run's folder.
    """

    folder: Path
    config: Config
    config_text: str
    metrics: list[dict[str, float]]
    generations: list[tuple[int, list[dict[str, str]]]]
    completions: list[tuple[int, list[dict[str, str]]]]
    warnings: list[tuple[int, str]]
    record: Mapping[str, Any]
    evaluations: list[Measured] = field(default_factory=list)
    checks: list[Measured] = field(default_factory=list)

    def curve(self, name: str) -> Points:
        """Return `(step, value)` of a metric, in the order of the file."""
        return [(row["step"], row[name]) for row in self.metrics if name in row]

    def names(self, prefix: str) -> list[str]:
        return list(dict.fromkeys(name for row in self.metrics for name in row if name.startswith(prefix)))

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def state(self) -> str:
        """Whether the run has ended, in words."""
        planned = self.record.get("steps") or self.config.training.max_steps
        if (self.folder / "final").is_dir():
            early = f" of {planned:,}, stopped early" if planned and self.last_step < planned else ""
            return f"finished at step {self.last_step:,}{early}"
        return f"not finished: step {self.last_step:,}" + (f" of {planned:,}" if planned else "")

    def best(self, name: str, greater: bool) -> tuple[int, float] | None:
        points = [point for point in self.curve(name) if math.isfinite(point[1])]
        return (max if greater else min)(points, key=lambda point: point[1]) if points else None


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError if it is not a run, or one of its files is damaged."""
    if not (folder / "config.yaml").is_file() and (folder.parent / "config.yaml").is_file():
        folder = folder.parent  # the run's final/ or best/
    if not (folder / "config.yaml").is_file():
        if not folder.exists():
            beside = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))[:8]) or "none"
            raise UserError(f"{folder}: there is no such run (runs in {folder.parent}: {beside})")
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "a file"
        raise UserError(f"{folder}: expected a run folder with config.yaml and metrics.jsonl; found {found}")
    config = load_config(folder / "config.yaml", note=lambda text: None, asked=False)
    metrics, generations, completions, warnings = [], [], [], []
    for row in _lines(folder / "metrics.jsonl"):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        if len(numbers) > 1:
            metrics.append(numbers)
        if isinstance(row.get("eval/generations"), list):
            generations.append((step, row["eval/generations"]))
        if isinstance(row.get("train/completions"), list):
            completions.append((step, row["train/completions"]))
        if isinstance(row.get("warning"), str):
            warnings.append((step, row["warning"]))
    whole = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return Run(
        folder, config, whole, metrics, generations, completions, warnings,
        _json(folder / "run.json") if (folder / "run.json").is_file() else {},
        _measured(sorted(folder.glob("evaluation/*/results.json")), "predictions.jsonl"),
        _measured(sorted(folder.glob("check*/results.json")), "answers.jsonl"),
    )  # fmt: skip


def _measured(paths: list[Path], rows: str) -> list[Measured]:
    return [Measured(path.parent.name, _json(path), _lines(path.parent / rows)) for path in paths]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; create it again, or remove it") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}; create it again, or remove it")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file, without a line truncated by a kill."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found.append(row)
    return found
