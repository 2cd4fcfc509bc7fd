"""Tests how a process finds out that it is one of several, and XLA's GPU flags; train/test_processes.py has real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import address

from ftjax import gpu
from ftjax.distributed import join
from ftjax.errors import UserError


def test_options():
    assert join.explicit(None, None, None, {}) is None
    asked = join.explicit("host:1", 4, 3, {})
    assert (asked["coordinator_address"], asked["num_processes"], asked["process_id"]) == ("host:1", 4, 3)
    variables = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert join.explicit(None, None, None, variables) == asked
    assert join.explicit("other:1", 2, 0, variables)["coordinator_address"] == "other:1"


@pytest.mark.parametrize(
    "given, message",
    [(("h:1", None, 0), "belong together"), (("h", 2, 0), "host:port"), (("h:1", 2, 2), "ids are 0 to 1")],
)
def test_wrong_options(given, message):
    with pytest.raises(UserError, match=message):
        join.explicit(*given, {})


@pytest.mark.parametrize(
    "values, message",
    [
        (("h", "2", "0"), "JAX_COORDINATOR_ADDRESS=h: expected host:port"),
        (("h:port", "2", "0"), "JAX_COORDINATOR_ADDRESS=h:port: expected host:port"),
        (("h:1", "2", "2"), r"JAX_PROCESS_ID=2: of 2 processes \(JAX_NUM_PROCESSES\), the ids are 0 to 1"),
        (("h:1", "0", "0"), "JAX_NUM_PROCESSES=0: expected the number"),
        (("h:1", "two", "0"), "JAX_NUM_PROCESSES=two"),
        (("h:1", "2", ""), "missing: JAX_PROCESS_ID"),
    ],
)
def test_wrong_variables_are_named_by_their_own_names(values, message):
    with pytest.raises(UserError, match=message) as caught:
        join.explicit(None, None, None, dict(zip(join.VARIABLES, values, strict=True)))
    assert "--" not in str(caught.value)


def test_slurm(monkeypatch):
    """In a step of several tasks, the only task on a host takes all of its GPUs, and a task per GPU takes its own."""
    monkeypatch.setattr(join, "_tpu_here", lambda: False)
    assert join.detect({}) is None
    assert join.detect({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) is None  # a batch script, outside of srun
    assert join.detect({"SLURM_STEP_NUM_TASKS": "1", "SLURM_GPUS_ON_NODE": "8"}) is None
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_GPUS_ON_NODE": "8"}
    alone = {"cluster_detection_method": "slurm", "local_device_ids": list(range(8))}
    assert join.detect({**step, "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}) == alone
    assert join.detect({**step, "SLURM_STEP_TASKS_PER_NODE": "4"}) == {"cluster_detection_method": "slurm"}


def test_jax_knows_slurm(monkeypatch):
    """JAX reads the step's variables: the coordinator is the first host."""
    from jax._src.clusters.slurm_cluster import SlurmCluster

    variables = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[003-006]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.name == "slurm" and SlurmCluster.is_env_present()
    assert SlurmCluster.get_coordinator_address(None, None).startswith("node003:")
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (4, 2)


def test_tpu(monkeypatch):
    monkeypatch.setattr(join, "_tpu_here", lambda: True)
    assert join.detect({}) == {} and join.detect({"JAX_PLATFORMS": "tpu,cpu"}) == {}
    assert join.detect({"JAX_PLATFORMS": "cpu"}) is None


def test_processes_that_do_not_come(monkeypatch):
    import jax

    def initialize(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"could not be joined \(DEADLINE_EXCEEDED: Barrier timed out\)"):
        join.start("h:1", 2, 0)
    for name, value in zip(join.VARIABLES, ("h:1", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_ADDRESS \(h:1\) and JAX_NUM_PROCESSES \(2\)") as caught:
        join.start()
    assert "--" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
@pytest.mark.parametrize("number", [0, 1])  # the first waits for the second, and the second for the first
def test_ctrl_c_while_it_waits_for_the_others(number):
    variables = {"JAX_COORDINATOR_ADDRESS": address(), "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
    code = "import jax; from ftjax.distributed.join import start; print('ready', flush=True); start()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu", **variables}, text=True
    )
    try:
        said = process.stderr.readline()
        assert f"this is process {number}, waiting for all 2 processes at {variables['JAX_COORDINATOR_ADDRESS']}" in said
        time.sleep(2)  # it is waiting by now, or will be
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def test_python_has_its_ctrl_c_back(monkeypatch):
    import jax

    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: seen.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    try:
        join.start("h:1", 2, 0)
        assert seen == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_gpu_flags(monkeypatch):
    """Flags that the user set are kept; without GPUs, or with another platform chosen, none are set."""
    monkeypatch.setattr(gpu, "gpus_here", lambda: True)
    environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"}
    added = gpu.set_flags(environment)
    assert len(added) == len(gpu.FLAGS) - 1 and environment["XLA_FLAGS"].count("latency_hiding_scheduler") == 1
    assert gpu.set_flags(environment) == []
    assert gpu.set_flags({"JAX_PLATFORMS": "cpu"}) == []
    monkeypatch.undo()
    if not gpu.gpus_here():
        assert gpu.set_flags({}) == []


def test_xla_knows_the_flags():
    """XLA accepts the flags; one that it does not know would end the process."""
    flags = " ".join(f"--{name}={value}" for name, (value, _) in gpu.FLAGS.items())
    for more, returncode in (("", 0), (" --xla_gpu_no_such_flag=true", 1)):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags + more}
        done = subprocess.run(
            [sys.executable, "-c", "import jax; jax.device_count()"], env=environment, capture_output=True, timeout=120
        )
        assert bool(done.returncode) == bool(returncode), done.stderr


def test_gpu_page_has_the_table():
    page = (Path(__file__).resolve().parents[1] / "docs" / "gpu.md").read_text()
    for name, (value, why) in gpu.FLAGS.items():
        assert f"| `{name}` | {value} | {why} |" in page
