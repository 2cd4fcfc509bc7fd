"""Several processes as one run: `jax.distributed`, started by itself where a cluster is recognised, and ended when one dies.

One process a host is the rule (and the only way on TPUs). Recognised are, in this order: what the command line says; the
environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a step of SLURM with several tasks;
Cloud TPU, as a VM or on GKE, one slice or several. Anything else is a single process.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from ftjax.errors import UserError

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead and the others are stopped
GATHERING = 300  # seconds that the first process waits for the last


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes, if there are any; call it before anything touches a device.

    Args:
        coordinator: `host:port` of process 0, the same on all.
        num_processes: of the whole run.
        process_id: of this one, from 0.

    Raises UserError where the three are not complete or make no sense, or the others do not come.
    """
    if jax.distributed.is_initialized():
        return
    asked = explicit(coordinator, num_processes, process_id, os.environ)
    if asked is None:
        asked = detect(os.environ)
    if asked is None:
        return
    try:
        jax.distributed.initialize(**asked, heartbeat_timeout_seconds=HEARTBEAT, initialization_timeout=GATHERING)
    except Exception as error:  # grpc, metadata servers and sockets raise what they like
        raise UserError(
            f"the processes of this run could not be joined ({_first_line(error)}). Check that every process was started "
            "with the same coordinator and number of processes, and that its port can be reached from all hosts"
        ) from None


def explicit(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be given, where the command line or JAX's variables say it."""
    if coordinator is None and num_processes is None and process_id is None:
        if not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= environment.keys():
            return None
        coordinator = environment["JAX_COORDINATOR_ADDRESS"]
        num_processes, process_id = (int(environment[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError("--coordinator, --num-processes and --process-id belong together; give all three to every process")
    if ":" not in coordinator:
        raise UserError(f"--coordinator {coordinator}: expected host:port, the address of process 0")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id {process_id}: of {num_processes} processes, the ids are 0 to {num_processes - 1}")
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",  # so that every process sees all devices of its host
    }


def detect(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be given in a cluster; None where there is none."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        method: dict[str, Any] = {"cluster_detection_method": "slurm"}
        # JAX takes a task of SLURM to be one GPU; a single task on a host has all of that host's.
        gpus = environment.get("SLURM_GPUS_ON_NODE", "")
        if gpus.isdecimal() and environment.get("SLURM_STEP_TASKS_PER_NODE", "").startswith(("1(", "1,")):
            method["local_device_ids"] = list(range(int(gpus)))
        return method
    if environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") and _tpu_here():
        return {}  # JAX tells a VM from GKE, and one slice from several
    return None


def _tpu_here() -> bool:
    """Whether this host has TPU chips and their driver."""
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and importlib.util.find_spec("libtpu") is not None


@contextmanager
def together() -> Iterator[None]:
    """Around all that the processes do jointly: when one fails, it ends at once and says why.

    Without this it would wait for the others, who wait for it. The others notice within HEARTBEAT seconds, or as soon as a
    transfer from the dead one breaks; those that hang on a device are ended by JAX's coordination service, with its message.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, SystemExit):
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, UserError):
            print(f"error: {who}: {error}", file=sys.stderr)
        elif isinstance(error, jax.errors.JaxRuntimeError):
            print(
                f"error: {who} stops, because another process of this run has ended or cannot be reached "
                f"({_first_line(error)}). Its own output says why. The last checkpoint is whole: start the same command on "
                "all hosts again to go on from it",
                file=sys.stderr,
            )
        else:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(2 if isinstance(error, UserError) else 1)  # a regular exit would wait for the others


def asked_to_stop(step: int) -> bool:
    """Whether all processes are to save and stop after this update: one of them got SIGTERM. All call it at every update."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
