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
from ftjax.train.setup import Setup

RECORD = "run.json"
GIB = 1 << 30


def write_record(
    folder: Path, setup: Setup, splits: dict[str, Split | None], *, first: int, steps: int, epoch_steps: int
) -> None:
    """Written at every start; `starts` keeps the ones before.

    Args:
        splits: training and validation data by name.
        first: the step that this start goes on from.
    """
    path = folder / RECORD
    now = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": first}
    devices = jax.devices()
    record = {
        "starts": [*(_starts(path) if first else []), now], "steps": steps, "steps_per_epoch": epoch_steps,
        "trained": setup.trained_line(), "notes": list(setup.model.notes),
        "devices": {"count": len(devices), "platform": devices[0].platform, "kind": devices[0].device_kind},
        "processes": jax.process_count(), "mesh": dict(setup.mesh.shape), "remat": setup.runtime.remat,
        "attention": setup.runtime.attention,
        "versions": {"python": platform.python_version(), **installed_versions()}, "system": platform.platform(),
        "data": {name: _of(split) for name, split in splits.items() if split is not None},
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def peak_memory_gib() -> float:
    """The most that one device of this process has held; of the process itself where the devices are CPUs, which do not
    count."""
    stats = [device.memory_stats() or {} for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    if peaks:
        return max(peaks) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _of(split: Split) -> dict[str, Any]:
    bins = [{"from": low, "to": high, "documents": count} for low, high, count in histogram(split.lengths)]
    return {**split.report.state(), "histogram": bins}


def _starts(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError):  # a run of an older version, or a file that was cut
        return []
