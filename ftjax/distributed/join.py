"""Several processes as one run: start `jax.distributed` if a cluster is detected.

Usually there is one process per host (always on TPUs). A cluster is detected from, in this order: the command line; the
environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a SLURM step with several tasks; Cloud TPU,
as a VM or on GKE, one slice or several. Anything else is a single process.
"""

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftjax.cpu_threads import set_threads
from ftjax.distributed.ending import fail_together
from ftjax.errors import UserError

HEARTBEAT = 20  # seconds without a heartbeat after which a process counts as dead and the others are stopped
GATHERING = 300  # seconds that the first process waits for the last one
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
OPTIONS = ("--coordinator", "--num-processes", "--process-id")


def alone(verb: str) -> None:
    """Raise UserError on all processes but the first, for a verb whose files several processes would all write."""
    asked = explicit(None, None, None, os.environ)
    number, by, unset = (0, "", "") if asked is None else (asked["process_id"], VARIABLES[2], ", ".join(VARIABLES))
    if asked is None and _slurm_tasks(os.environ) > 1:
        number, by, unset = int(os.environ.get("SLURM_PROCID") or 0), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    if number > 0:
        raise UserError(
            f"ftjax {verb} is the work of one process, and {by} says that this is process {number} of several; run it on one "
            f"host alone, as one task, or unset {unset}"
        )


@contextmanager
def joined(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> Iterator[None]:
    """Wrap the whole work of a verb: join the other processes, if there are any, and exit together if one fails.

    Args and errors are those of `start`. A single process does not import JAX here.
    """
    start(coordinator, num_processes, process_id)
    with fail_together():
        yield


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes, if there are any; call it before anything uses a device.

    Args:
        coordinator: `host:port` of process 0, the same on all.
        num_processes: number of processes of the run.
        process_id: index of this process, from 0.

    Raises UserError if the three are incomplete or invalid, or the others do not join.
    """
    asked = explicit(coordinator, num_processes, process_id, os.environ)
    if asked is None:
        asked = detect(os.environ)
    if asked is None:
        return
    set_threads(several_processes=True)
    import jax

    if jax.distributed.is_initialized():
        return
    waiting, check = _waiting(asked, os.environ, any(one is not None for one in (coordinator, num_processes, process_id)))
    if waiting:
        print(f"joining: {waiting}; Ctrl-C ends it", file=sys.stderr, flush=True)
    try:
        with _interruptible():
            jax.distributed.initialize(**asked, heartbeat_timeout_seconds=HEARTBEAT, initialization_timeout=GATHERING)
    except Exception as error:  # grpc, metadata servers and sockets raise errors of many types
        raise UserError(
            f"the processes of this run could not be joined ({_first_line(error)}). Check that {check}, and that its port can "
            "be reached from all hosts"
        ) from None


def _waiting(asked: Mapping[str, Any], environment: Mapping[str, str], options: bool) -> tuple[str, str]:
    """Return `(what is awaited, what to check if it does not come)`; the first is empty for a single process."""
    if "coordinator_address" not in asked:
        tasks = _slurm_tasks(environment)
        whom = f"all {tasks} tasks of this step of SLURM" if tasks > 1 else "all hosts of this TPU"
        return f"waiting for {whom}", f"{whom} run this command"
    count, number, address = asked["num_processes"], asked["process_id"], asked["coordinator_address"]
    first, second, _ = OPTIONS if options else VARIABLES
    check = f"every process was started with the same {first} ({address}) and {second} ({count}), process 0 among them"
    if count == 1:
        return "", check
    return f"this is process {number}, waiting for all {count} processes at {address}", check


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once: Python handles no signal while it waits in C++."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def explicit(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize` from the command line or JAX's variables; None without these."""
    names = OPTIONS
    if coordinator is None and num_processes is None and process_id is None:
        names = VARIABLES
        given = [name for name in VARIABLES if environment.get(name)]
        if not given:
            return None
        if len(given) < len(VARIABLES):
            if detect(environment) is not None:  # a cluster that knows the rest
                return None
            missing = ", ".join(name for name in VARIABLES if name not in given)
            raise UserError(
                f"{', '.join(given)} is set, but these are missing: {missing}; set all three on every host, or "
                "none for a single process"
            )
        coordinator = environment[VARIABLES[0]]
        try:
            num_processes, process_id = (int(environment[name]) for name in VARIABLES[1:])
        except ValueError:
            wrong = ", ".join(f"{name}={environment[name]}" for name in VARIABLES[1:])
            raise UserError(f"{wrong}: expected two whole numbers") from None
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError("--coordinator, --num-processes and --process-id belong together; give all three to every process")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{names[0]}={coordinator}: expected host:port, the address of process 0")
    if num_processes < 1:
        raise UserError(f"{names[1]}={num_processes}: expected the number of processes, 1 at least")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"{names[2]}={process_id}: of {num_processes} processes ({names[1]}), the ids are 0 to {num_processes - 1}"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",  # so that every process sees all devices of its host
    }


def detect(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize` in a cluster; None if there is none."""
    if _slurm_tasks(environment) > 1:
        method: dict[str, Any] = {"cluster_detection_method": "slurm"}
        # JAX takes a SLURM task to be one GPU; a single task on a host has all of the host's GPUs.
        gpus = environment.get("SLURM_GPUS_ON_NODE", "")
        if gpus.isdecimal() and environment.get("SLURM_STEP_TASKS_PER_NODE", "").startswith(("1(", "1,")):
            method["local_device_ids"] = list(range(int(gpus)))
        return method
    if environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") and _tpu_here():
        return {}  # JAX tells a VM from GKE, and one slice from several
    return None


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Return the tasks of the SLURM step of this process."""
    count = environment.get("SLURM_STEP_NUM_TASKS", "")
    return int(count) if count.isdecimal() else 1


def _tpu_here() -> bool:
    """Return whether this host has TPU chips and their driver."""
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and importlib.util.find_spec("libtpu") is not None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
