"""Thread pool for collectives on CPU devices, set before anything uses a device.

On CPUs a collective holds a thread per device until all devices have joined it, and XLA starts independent collectives in any
order. With as few threads as cores, eight devices can wait in two collectives for each other's threads: XLA then ends the
process after 40 s ("Termination timeout for `all reduce ...`"). Seen with jaxlib 0.10 to 0.12.
"""

import os
import re
from collections.abc import MutableMapping

VARIABLE = "PJRT_NPROC"  # read by XLA's CPU client as the size of its thread pool
EACH = 16  # threads per device: independent collectives at one time


def set_threads(several_processes: bool = False, environment: MutableMapping[str, str] = os.environ) -> None:
    """Request 16 threads per device if several CPU devices, or processes with one each, work together.

    A value that the user set stays. On TPUs and GPUs the variable has no effect on the devices.
    """
    forced = re.search(r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", ""))
    devices = int(environment.get("JAX_NUM_CPU_DEVICES") or (forced[1] if forced else 1))
    if (devices > 1 or several_processes) and not (environment.get(VARIABLE) or environment.get("NPROC")):
        environment[VARIABLE] = str(max(os.cpu_count() or 1, EACH * devices))
