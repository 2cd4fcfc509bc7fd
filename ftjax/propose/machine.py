"""The machine that a proposal is for: devices, their free memory, and a model of a size that they can train."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ftjax.config.examples import MODEL
from ftjax.train.remat import device_memory

# Share of a device's memory that a proposal fills by the plan's arithmetic, which leaves out values that live within a layer.
SHARE = 0.7
# Hub id and parameters; all of them under the Apache licence, and instruction-tuned.
MODELS = (
    ("Qwen/Qwen3-8B", 8.2e9), ("Qwen/Qwen3-4B-Instruct-2507", 4.0e9), ("Qwen/Qwen3-1.7B", 1.7e9),
    ("HuggingFaceTB/SmolLM2-360M-Instruct", 3.6e8), (MODEL, 1.35e8),
)  # fmt: skip
PER_PARAMETER = 2 / 0.4  # bytes: bfloat16 weights in two fifths of the memory


@dataclass(frozen=True)
class Machine:
    """Devices of one kind. Attributes: memory: bytes of each that are free."""

    devices: Sequence[Any]
    memory: int

    @property
    def cpu(self) -> bool:
        return self.devices[0].platform == "cpu"

    @property
    def words(self) -> str:
        """Return the machine in a few words."""
        kind = "CPU" if self.cpu else self.devices[0].device_kind
        return f"{len(self.devices)} x {kind}, {self.memory / 1e9:.1f} GB free each"

    def model(self) -> tuple[str, str]:
        """Return a Hub id of a model that this machine can train, and why."""
        if self.cpu:
            return MODEL, "small enough to train on a CPU"
        room = self.memory * len(self.devices)
        name, count = next((one for one in MODELS if one[1] * PER_PARAMETER <= room), MODELS[-1])
        return name, f"{count / 1e9:.2g} billion parameters, which leave room on {self.words}"


def this_machine(devices: Sequence[Any] | None = None) -> Machine:
    """Return the machine that this process runs on. Args: devices: None for all of them."""
    devices = list(jax.devices() if devices is None else devices)
    memory = device_memory(devices)
    if devices[0].platform == "cpu":
        memory = min(memory, (_free() or memory * len(devices)) // len(devices))
    return Machine(devices, int(memory))


def _free(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that this host has available, within the limit of its control group; None if it does not say."""
    found = []
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # there is no such group, or its limit is `max`
        found.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return max(1, min(found)) if found else None
