"""Starts runs of `ftjax` as several processes on CPUs, each with its own devices, joined by `--coordinator`."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import jax
import numpy as np
import yaml
from forked import Server, Started
from oracle import Case, make_hf
from quick_compile import QUICK
from tiny_tokenizer import save_tokenizer

COMMAND = "from ftjax.cli import main\nmain()\n"


def make_settings(folder: Path, family: str = "llama", **values) -> dict:
    """Write a tiny model and data to `folder`; return the configuration of a run without its output_dir.

    Args:
        values: fields of the model's config.json.
    """
    make_hf(Case(family, family, {"initializer_range": 0.05, **values}), folder)
    save_tokenizer(folder)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), rng.integers(2, 12))) for _ in range(300)]
    data = folder / "train.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": word, "completion": word[::-1]}) for word in words) + "\n")
    (folder / "validation.jsonl").write_text("\n".join(data.read_text().splitlines()[:12]) + "\n")
    return {
        "model": {"path": str(folder), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "method": {"name": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": str(data), "validation": str(folder / "validation.jsonl"), "max_length": 64},
        "optimizer": {"learning_rate": 1e-3},
        "training": {
            "global_batch_size": 8, "gradient_accumulation_steps": 2, "eval_batch_size": 4, "logging_steps": 1, "report_to": [],
        },
        "mesh": {"fsdp": -1},
    }  # fmt: skip


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Return the environment of a process with this many CPU devices, without the tests' cache of compiled programs: several
    processes on CPUs must not share programs (`ftjax/compile_cache.py`), and that they do not is ftjax's own work."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    return {**inherited, "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu", **more}


def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@cache
def _server() -> Server:
    return Server()


def start(command: Sequence[str], code: str = COMMAND, *, env: Mapping[str, str], cwd: Path | None = None) -> Started:
    """Start `ftjax` with these arguments, without PyTorch, which only tests have installed."""
    return _server().start(code, [str(word) for word in command], env, cwd)


def launch(
    count: int, settings: dict, out: Path, *, devices: int | Sequence[int] = 1, own: Mapping[int, Sequence[str]] | None = None,
    wait: Mapping[int, float] | None = None, more: Mapping[str, str] | None = None, code: Mapping[int, str] | None = None,
) -> list[Started]:  # fmt: skip
    """Start `count` training processes, as a user would.

    Args:
        devices: per process, as a list or one number for all.
        own: further arguments of single processes, by index.
        wait: seconds to wait before starting single processes.
        more: environment variables.
        code: Python code that single processes run instead of `ftjax`, with the same arguments.
    """
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(out)}))
    command = ["train", str(path), "--coordinator", address(), "--num-processes", str(count)]
    running = []
    for i in range(count):
        time.sleep((wait or {}).get(i, 0))
        arguments = [*command, "--process-id", str(i), *(own or {}).get(i, ())]
        here = devices if isinstance(devices, int) else devices[i]
        running.append(start(arguments, code=(code or {}).get(i, COMMAND), env=environment(here, **(more or {}))))
    return running


def launch_verb(
    count: int, arguments: Sequence[str], folder: Path, own: Mapping[int, Sequence[str]] | None = None,
    instead: Mapping[int, Sequence[str]] | None = None,
) -> list[Started]:  # fmt: skip
    """Start `count` processes of any command, joined by JAX's environment variables, in `folder`.

    Args:
        own: further arguments of single processes, by index.
        instead: all arguments of single processes.
    """
    joined = {"JAX_COORDINATOR_ADDRESS": address(), "JAX_NUM_PROCESSES": str(count)}
    return [
        start(
            [*(instead or {}).get(i, arguments), *(own or {}).get(i, ())],
            env=environment(2, **joined, JAX_PROCESS_ID=str(i)),
            cwd=folder,
        )
        for i in range(count)
    ]


def rows(out: Path, name: str = "train/loss") -> dict[int, dict]:
    """Return the logged values of a metric by update, without a line that is still being written."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {row["step"]: row for row in map(json.loads, lines) if name in row}


def wait_for_step(running: list[Started], out: Path, step: int) -> None:
    """Wait until this update is logged or a process has ended."""
    deadline = time.monotonic() + 900
    while step not in rows(out) and all(process.poll() is None for process in running):
        assert time.monotonic() < deadline, end(running, kill=True)
        time.sleep(0.005)


def end(running: list[Started], kill: bool = False, timeout: float = 900) -> list[str]:
    """Wait for all processes; return the output of each."""
    if kill:
        for process in running:
            process.kill()
    return [process.communicate(timeout=timeout)[0] for process in running]


def run(
    count: int, settings: dict, out: Path, then: Callable[[list[Started]], None] = lambda running: None, **options
) -> tuple[list[Started], list[str]]:
    """Launch processes, act on them while they run, and wait; return `(processes, their outputs)`.

    Gloo, which connects CPUs, gives each process 30 seconds after the first; on a machine too busy for that, the launch is
    repeated.
    """
    before = out.with_name(f"before-{out.name}")
    shutil.rmtree(before, ignore_errors=True)
    if out.exists():
        shutil.copytree(out, before)
    for _ in range(3):
        running = launch(count, settings, out, **options)
        then(running)
        said = end(running)
        if "Gloo context initialization failed" not in "".join(said):
            break
        shutil.rmtree(out)
        if before.exists():
            shutil.copytree(before, out)
    return running, said


ALL = bool(os.environ.get("FTJAX_TEST_ALL"))  # set by `make test-all`


def whole_run(settings: dict, out: Path, devices: int) -> None:
    """The same in this process, on so many of its devices."""
    from ftjax.config import Config
    from ftjax.evaluate.observe import make_observer
    from ftjax.train.run import train

    config = Config.model_validate({**settings, "output_dir": str(out)})
    train(config, devices=jax.devices()[:devices], make_observer=make_observer)


def same_losses(got: dict[int, dict], want: dict[int, dict], tolerance: float = 1e-6) -> None:
    """Assert equal losses and equal numbers of trained tokens, which tell which rows an update had."""
    assert [got[step]["train/trained_tokens"] for step in got] == [want[step]["train/trained_tokens"] for step in got]
    np.testing.assert_allclose(
        [got[step]["train/loss"] for step in got], [want[step]["train/loss"] for step in got], rtol=0, atol=tolerance
    )
