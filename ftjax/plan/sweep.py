"""`ftjax sweep`: plan several slices, and compare with the speed of real runs.

Each slice is planned in its own process, because a process compiles for one kind of device, and cached, because a large model
takes a minute. *Weak* scaling keeps the rows per chip of the configuration on the first slice, so that the global batch grows
with the slice. *Strong* scaling keeps the global batch, which the chips share.
"""

import csv
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.hub.run_folder import starting_adapter
from ftjax.hub.same_model import model_digest
from ftjax.hub.vocabulary import hf_config_of
from ftjax.plan.result import Plan, from_json
from ftjax.plan.topology import parse
from ftjax.version import __version__

KNEE = 0.9  # of the best tokens/s per chip
COLUMNS = (
    "topology", "chips", "rows", "fits", "memory_gb", "limit_gb", "step_seconds", "bound", "tokens_per_second",
    "tokens_per_second_per_chip", "mfu", "cost_per_million_tokens", "measured_tokens_per_second",
    "measured_tokens_per_second_per_chip", "measured_over_planned", "run",
)  # fmt: skip
Row = dict[str, Any]


def sweep(
    config_path: Path, config: Config, overrides: Sequence[str], topologies: Sequence[str], *, weak: bool, price: float | None,
    runs: Sequence[Path], out: Path, say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """Plan every slice; writes `sweep.csv` and, if matplotlib is installed, `sweep.svg` to `out`.

    Raises UserError for an unknown name, for a batch that does not scale, and for whatever a plan refuses.
    """
    slices = [parse(name) for name in topologies]
    if not slices:
        raise UserError("--topologies: expected names separated by commas, such as v5e-8,v5e-16,v5e-32")
    rows = []
    for name, topology in zip(topologies, slices, strict=True):
        batch = _batch(config, topology.chips, slices[0].chips) if weak else config.training.global_batch_size
        plan = _planned(config_path, config, [*overrides, f"training.global_batch_size={batch}"], name, price)
        rows.append(_row(name, plan))
        say(_line(rows[-1]))
    for folder in runs:
        _measured(folder, rows)
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / "sweep.csv", rows)
    _plot(out / "sweep.svg", rows, say)
    if knee := find_knee(rows):
        say(knee)
    return rows


def _batch(config: Config, chips: int, first: int) -> int:
    rows = config.training.global_batch_size * chips
    if rows % first:
        raise UserError(
            f"training.global_batch_size: {config.training.global_batch_size} rows on the first slice's {first} chips do "
            f"not scale to a whole number on {chips}; choose a multiple of {first}, or --strong"
        )
    return rows // first


def _planned(config_path: Path, config: Config, overrides: list[str], topology: str, price: float | None) -> Plan:
    """Load a plan from the cache, or make it by `ftjax plan` in a child process."""
    hf_config = hf_config_of(config)
    adapter = starting_adapter(config.method)
    hf_config |= {"digest of the adapter": model_digest(adapter)} if adapter else {}
    versions = [__version__, *(metadata.version(name) for name in ("jax", "flax", "optax"))]
    said = json.dumps(
        [
            config.model_dump(mode="json"),
            overrides,
            topology,
            price,
            hf_config,
            adapter and model_digest(adapter),
            versions,
            _source(),
        ],
        default=str,
    )
    cache = Path(os.environ.get("FTJAX_CACHE", Path.home() / ".cache" / "ftjax")) / "plans"
    kept = cache / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    if not kept.is_file():
        command = [sys.executable, "-m", "ftjax.cli", "plan", str(config_path), *overrides, "--topology", topology, "--json"]
        done = subprocess.run(command + ([f"--price={price}"] if price is not None else []), capture_output=True, text=True)
        if done.returncode == 2:
            raise UserError(f"{topology}: {done.stderr.strip().removeprefix('error: ')}")
        try:
            found = json.loads(done.stdout)
        except json.JSONDecodeError:
            raise RuntimeError(f"ftjax plan --topology {topology} failed:\n{done.stderr[-4000:]}") from None
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return from_json(json.loads(kept.read_text()))


def _source() -> str:
    """Return a digest of ftjax's own code that a plan depends on."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    packages = "models", "methods", "objectives", "train", "plan"
    for name in (*packages, "mesh.py", "placement.py", "torus.py", "chips.py", "flops.py"):
        entry = package / name
        for path in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _row(name: str, plan: Plan) -> Row:
    values = {column: getattr(plan, column, None) for column in COLUMNS}
    values |= {"topology": name, "memory_gb": plan.memory["total"] / 1e9, "limit_gb": plan.limit and plan.limit / 1e9}
    return values | {"devices": plan.devices}


def _line(row: Row) -> str:
    fits = {True: "fits", False: "does not fit", None: ""}[row["fits"]]
    speed = (
        f", at most {row['tokens_per_second_per_chip']:,.0f} tokens/s per chip, bound by {row['bound']}" if row["bound"] else ""
    )
    return f"{row['topology']}: {row['rows']} rows, {row['memory_gb']:.2f} GB per device {fits}{speed}"


def _measured(folder: Path, rows: list[Row]) -> None:
    """Add a run's median speed, without its first log, to the plan for the same number of devices."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"--run {folder}: expected a run folder with metrics.jsonl")
    logs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    speeds = [log for log in logs if "train/tokens_per_second_per_device" in log]
    speeds = speeds[1:] or speeds
    if not speeds:
        raise UserError(f"--run {folder}: metrics.jsonl has no train/tokens_per_second_per_device")
    speed = statistics.median(log["train/tokens_per_second"] for log in speeds)
    devices = round(speeds[-1]["train/tokens_per_second"] / speeds[-1]["train/tokens_per_second_per_device"])
    row = next((row for row in rows if row["devices"] == devices and row["run"] is None), None)
    if row is None:
        planned = ", ".join(f"{row['topology']} ({row['devices']})" for row in rows)
        raise UserError(f"--run {folder}: it ran on {devices} devices; the slices planned here (and their devices): {planned}")
    row["run"], row["measured_tokens_per_second"] = str(folder), speed
    row["measured_tokens_per_second_per_chip"] = speed / row["chips"]
    if row["tokens_per_second"]:
        row["measured_over_planned"] = speed / row["tokens_per_second"]


def find_knee(rows: Sequence[Row]) -> str | None:
    """Describe the largest slice on which a chip is still nearly as fast as at best."""
    known = [row for row in rows if row["fits"] and row["tokens_per_second_per_chip"]]
    if len(known) < 2:
        return None
    best = max(row["tokens_per_second_per_chip"] for row in known)
    good = [row for row in known if row["tokens_per_second_per_chip"] >= KNEE * best]
    knee = max(good, key=lambda row: row["chips"])
    if knee["chips"] == max(row["chips"] for row in known):
        return f"no knee up to {knee['topology']}: a chip reaches at least {KNEE:.0%} of its best there"
    return f"the knee is {knee['topology']}: on larger slices a chip reaches less than {KNEE:.0%} of its best"


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _plot(path: Path, rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """Plot tokens/s and memory per chip over chips."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plot: matplotlib is not installed (pip install ftjax[eval])")
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    chips = [row["chips"] for row in rows]
    for axes, column, label in (
        (left, "tokens_per_second_per_chip", "planned, at most"),
        (left, "measured_tokens_per_second_per_chip", "measured"),
        (right, "memory_gb", "planned"),
        (right, "limit_gb", "available"),
    ):
        points = [(x, row[column]) for x, row in zip(chips, rows, strict=True) if row[column] is not None]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    left.set(xlabel="chips", ylabel="tokens/s per chip", xscale="log", ylim=(0, None))
    right.set(xlabel="chips", ylabel="GB per device", xscale="log", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(sorted(set(chips)), [str(count) for count in sorted(set(chips))])
        axes.minorticks_off()
        if axes.lines:
            axes.legend()
    figure.savefig(path, metadata={"Date": None})
