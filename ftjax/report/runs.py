"""`ftjax runs`: the runs below a folder, one per line."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ftjax.errors import UserError
from ftjax.report.read import Run, read_run

DEEPEST = 4  # folders below the one that is listed
INSIDE = ("final", "best", "checkpoints", "tensorboard", "evaluation")  # of a run, which holds no other run there
HEAD = ("run", "state", "objective", "model", "method", "steps", "best", "at step", "started", "took")


@dataclass(frozen=True)
class Listed:
    """One line; what is not known is None. `problem` says why a folder cannot be read."""

    run: str
    state: str
    objective: str | None = None
    model: str | None = None
    method: str | None = None
    step: int = 0
    steps: int | None = None
    metric: str | None = None  # that decides which checkpoint is best, or else that of training
    best: float | None = None
    best_step: int | None = None
    started: str | None = None  # ISO 8601, in UTC
    seconds: float | None = None  # from the first start to the end, or to the last row, with pauses
    starts: int = 0
    problem: str | None = None


def runs(folder: Path, *, as_json: bool = False, console: Any = None) -> list[Listed]:
    """Print the runs below a folder, the newest last, and return them. Raises UserError if there is no such folder or run."""
    from ftjax.console import make_console, print_table, say

    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name one that holds runs, such as: ftjax runs runs")
    found = sorted((_listed(path, folder) for path in find_runs(folder)), key=lambda one: (one.started or "", one.run))
    if not found:
        raise UserError(f"{folder}: no run in it, nor in the folders below; a run is a folder with config.yaml")
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False))
        return found
    console = console or make_console()
    print_table(console, HEAD, [_cells(one) for one in found], left=(0, 1, 2, 3, 4, 8))
    for one in found:
        if one.problem:
            say(console, f"{one.run}: {one.problem}", "yellow")
    return found


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run folders in and below a folder."""
    for path, inside, files in os.walk(folder):
        here = Path(path)
        if "config.yaml" in files and _is_run(here):
            yield here
            inside[:] = [name for name in inside if name not in INSIDE]
        depth = len(here.relative_to(folder).parts)
        inside[:] = sorted(name for name in inside if depth < DEEPEST and not name.startswith("."))


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("metrics.jsonl", "run.json", "checkpoints", "final"))


def _listed(path: Path, folder: Path) -> Listed:
    name = str(path.relative_to(folder)) if path != folder else str(path)
    try:
        run = read_run(path)
    except UserError as error:
        return Listed(name, "cannot be read", problem=str(error))
    steps = run.record.get("steps") or run.config.training.max_steps
    metric, best = best_of(run)
    starts = run.record.get("starts", [])
    return Listed(
        name, state_of(run), run.config.objective.name, run.config.model.path, run.config.method.name, run.last_step, steps,
        metric if best else None, best[1] if best else None, best[0] if best else None,
        starts[0]["time"] if starts else None, _seconds(run), len(starts),
    )  # fmt: skip


def best_of(run: Run) -> tuple[str, tuple[int, float] | None]:
    """Return the metric by which the best checkpoint is chosen, with its best step and value; else the same of training, such
    as `train/reward`; else the training loss."""
    options = run.config.training
    metric = options.metric_for_best_model
    for name in (metric, f"train/{metric.removeprefix('eval/')}"):
        if found := run.best(name, options.best_is_greatest):
            return name, found
    return "train/loss", run.best("train/loss", greater=False)


def state_of(run: Run) -> str:
    """Return the state in one or two words."""
    steps = run.record.get("steps")
    if (run.folder / "final").is_dir():
        return "stopped early" if steps and run.last_step < steps else "finished"
    return "running" if _is_locked(run.folder / ".lock") else "stopped"


def _is_locked(path: Path) -> bool:
    """Return whether a process of this machine trains the run now; False where locks are not known."""
    try:
        import fcntl

        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        pass
    return False


def _seconds(run: Run) -> float | None:
    """Return the seconds from the first start to the end of the run, or to its last row."""
    starts = run.record.get("starts", [])
    rows = run.folder / "metrics.jsonl"
    if not starts:
        return None
    begun = datetime.fromisoformat(starts[0]["time"])
    if ended := run.record.get("ended"):
        return max(0.0, (datetime.fromisoformat(ended) - begun).total_seconds())
    return max(0.0, rows.stat().st_mtime - begun.timestamp()) if rows.is_file() else None


def _cells(one: Listed) -> list[str]:
    steps = f"{one.step:,}" if one.steps in (None, one.step) else f"{one.step:,} of {one.steps:,}"
    best = "-" if one.best is None else f"{one.metric} {one.best:.4g}"
    started = "-" if one.started is None else f"{datetime.fromisoformat(one.started).astimezone(UTC):%Y-%m-%d %H:%M}"
    took = "-" if one.seconds is None else duration(one.seconds) + (f" in {one.starts} starts" if one.starts > 1 else "")
    texts = [one.objective, one.model, one.method]
    return [one.run, one.state, *(text or "-" for text in texts), steps, best, _number(one.best_step), started, took]


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    """Format as `45 s`, `12 min`, `3.2 h` or `2.5 days`."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} s"
