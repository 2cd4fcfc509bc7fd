"""run.json: what a run was made of, for reports. It says what config.yaml does not: devices, versions, what data became."""

import json
import platform
import resource
import sys
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
    """Written at every start; `starts` keeps the ones before.

    Args:
        data: JSON about training and validation data by name (`split_record`); None where there is none.
        documents: what tells these from others.
        first: the step that this start goes on from.
    """
    path, before = folder / RECORD, _read(folder) if first else {}
    now = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": first}
    devices = jax.devices()
    record = {
        "starts": [*before.get("starts", []), now], "finished": before.get("finished"),
        "steps": steps, "steps_per_epoch": epoch_steps,
        "trained": setup.trained_line(), "notes": list(setup.model.notes),
        "devices": {"count": len(devices), "platform": devices[0].platform, "kind": devices[0].device_kind},
        "processes": jax.process_count(), "mesh": dict(setup.mesh.shape), "remat": setup.runtime.remat,
        "attention": setup.runtime.attention,
        "versions": {"python": platform.python_version(), **installed_versions()}, "system": platform.platform(),
        "data": {name: found for name, found in data.items() if found is not None},
        "documents": documents,
    }  # fmt: skip
    _write(path, record)


def write_finished(folder: Path, step: int) -> None:
    """Note that `final/` is what the run was at this step."""
    _write(folder / RECORD, {**_read(folder), "finished": step})


def finished_at(folder: Path) -> int | None:
    """The step that `final/` was made of; None where that is not known."""
    return _read(folder).get("finished")


def peak_memory_gib() -> float:
    """The most that one device of this process has held; of the process itself where the devices are CPUs, which do not
    count."""
    stats = [device.memory_stats() or {} for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    if peaks:
        return max(peaks) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def split_record(split: Split) -> dict[str, Any]:
    """What run.json says of a data set: its report, with a histogram of lengths."""
    bins = [{"from": low, "to": high, "documents": count} for low, high, count in histogram(split.lengths)]
    return {**split.report.state(), "histogram": bins}


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run of an older version, or a file that was cut
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, record: dict[str, Any]) -> None:
    replace_text(path, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
