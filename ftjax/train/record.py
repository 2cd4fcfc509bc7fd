"""run.json: facts about a run, for reports, that config.yaml does not have: devices, versions, statistics of the data."""

import json
import platform
import resource
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from ftjax.data.pipeline import Split
from ftjax.data.report import histogram
from ftjax.hub.card import installed_versions
from ftjax.train.folder import replace_text
from ftjax.train.same_run import Documents
from ftjax.train.setup import Setup

RECORD = "run.json"
GIB = 1 << 30


def write_record(
    folder: Path, setup: Setup, data: dict[str, Any], documents: Documents, *, first: int, steps: int,
    epoch_steps: int | None,
) -> None:  # fmt: skip
    """Write run.json at a start of the run; `starts` keeps the earlier ones.

    Args:
        data: JSON about training and validation data by name (`split_record`); None if there is none.
        documents: fingerprints of the data sets.
        first: the step that this start resumes from.
    """
    path, before = folder / RECORD, _read(folder) if first else {}
    now = {"time": _now(), "step": first}
    devices = setup.mesh.devices
    record = {
        "starts": [*before.get("starts", []), now], "finished": before.get("finished"),
        "steps": steps, "steps_per_epoch": epoch_steps,
        "trained": setup.trained_line(), "notes": list(setup.model.notes),
        "devices": {"count": devices.size, "platform": devices.flat[0].platform, "kind": devices.flat[0].device_kind},
        "processes": jax.process_count(), "mesh": dict(setup.mesh.shape), "remat": setup.runtime.remat,
        "attention": setup.runtime.attention,
        "versions": {"python": platform.python_version(), **installed_versions()}, "system": platform.platform(),
        "data": {name: found for name, found in data.items() if found is not None},
        "documents": documents,
    }  # fmt: skip
    _write(path, record)


def write_finished(folder: Path, step: int) -> None:
    """Record that `final/` holds the run at this step, and when it was written."""
    _write(folder / RECORD, {**_read(folder), "finished": step, "ended": _now()})


def finished_at(folder: Path) -> int | None:
    """Return the step of `final/`; None if it is unknown."""
    return _read(folder).get("finished")


def peak_memory_gib(devices: Sequence[jax.Device]) -> float:
    """Return the peak memory in GiB of one of the devices, which are this process's; of the process itself on CPUs, which do
    not report theirs."""
    stats = [device.memory_stats() or {} for device in devices if device.platform != "cpu"]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    if peaks:
        return max(peaks) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def split_record(split: Split) -> dict[str, Any]:
    """Return what run.json says of a data set: its report, with a histogram of lengths."""
    bins = [{"from": low, "to": high, "documents": count} for low, high, count in histogram(split.lengths)]
    return {**split.report.state(), "histogram": bins}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run of an older version, or a truncated file
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, record: dict[str, Any]) -> None:
    replace_text(path, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
