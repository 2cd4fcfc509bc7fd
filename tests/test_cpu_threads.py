"""Tests that there are enough threads for collectives on several CPU devices."""

import os
import subprocess
import sys

import pytest
from quick_compile import QUICK

from ftjax.cpu_threads import EACH, VARIABLE, set_threads

FORCED = "--xla_force_host_platform_device_count=8"


def asked(several_processes: bool = False, **environment: str) -> str | None:
    set_threads(several_processes, environment)
    return environment.get(VARIABLE)


def test_asked_for_where_devices_wait_for_each_other():
    assert asked() is None and asked(XLA_FLAGS="--xla_force_host_platform_device_count=1") is None
    assert int(asked(XLA_FLAGS=FORCED)) >= 8 * EACH and int(asked(JAX_NUM_CPU_DEVICES="8")) >= 8 * EACH
    assert int(asked(several_processes=True)) >= EACH
    assert asked(XLA_FLAGS=FORCED, PJRT_NPROC="3") == "3" and asked(XLA_FLAGS=FORCED, NPROC="3") is None


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_the_pool_of_xla_follows():
    """XLA's thread pool follows the variable; this needs a new process, as devices are made once."""
    code = (
        "from ftjax.cpu_threads import set_threads; {}; import jax, os; jax.jit(lambda x: x + 1)(1.0); "
        "print(len(os.listdir('/proc/self/task')))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "NPROC")}
    environment |= {"XLA_FLAGS": f"{QUICK} {FORCED}", "JAX_PLATFORMS": "cpu"}
    few, many = (
        int(subprocess.run([sys.executable, "-c", code.format(call)], env=environment, capture_output=True, text=True).stdout)
        for call in ("0", "set_threads()")
    )
    assert many - few > 6 * EACH, (few, many)
