"""Disjoint devices for trials that run at the same time: GPUs, or cores of the CPU."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ftjax.errors import UserError
from ftjax.gpu import gpus_here


@dataclass(frozen=True)
class Share:
    """What one process gets: environment variables, and cores (none: all)."""

    environment: Mapping[str, str]
    cores: tuple[int, ...] = ()


def shares(count: int, environment: Mapping[str, str] = os.environ) -> list[Share]:
    """Divide the devices of this host among `count` processes, evenly; a rest stays unused.

    Raises UserError if there are fewer devices than processes, or TPUs, whose chips are not divided.
    """
    platform = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if platform in ("", "cuda", "gpu") and (gpus := _gpus(environment)):
        return [Share({"CUDA_VISIBLE_DEVICES": ",".join(part)}) for part in _parts(gpus, count, "GPUs")]
    if platform == "tpu" or (not platform and any(Path("/dev").glob("accel[0-9]*"))):
        raise UserError(
            f"--parallel {count}: the chips of a TPU host work on one trial together; run the same search on several hosts "
            "instead, with one --storage for all of them"
        )
    cores = sorted(os.sched_getaffinity(0))
    return [Share({}, tuple(part)) for part in _parts(cores, count, "CPU cores")]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    if not gpus_here():
        return []
    if (given := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [one for one in given.split(",") if one]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _parts(devices: list, count: int, what: str) -> list[list]:
    if count > len(devices):
        raise UserError(f"--parallel {count}: this host has {len(devices)} {what}, and each trial needs one at least")
    each = len(devices) // count
    return [devices[number * each : (number + 1) * each] for number in range(count)]
