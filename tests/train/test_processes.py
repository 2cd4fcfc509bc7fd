"""Real processes on CPUs, joined by `ftjax train --coordinator`: the same run as one process; how it stops and goes on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from oracle import Case, make_hf
from quick_compile import QUICK
from tiny_tokenizer import save_tokenizer

from ftjax.config import Config
from ftjax.train.loop import train

STEPS = 24
# What `ftjax` runs. PyTorch, which only the tests have installed, would be a third of what a process imports.
COMMAND = "import sys\nsys.modules['torch'] = None\nfrom ftjax.cli import main\nmain()"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A configuration without its output_dir."""
    folder = tmp_path_factory.mktemp("model")
    make_hf(Case("llama", "llama", {"initializer_range": 0.05}), folder)
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
            "max_steps": STEPS, "global_batch_size": 8, "gradient_accumulation_steps": 2, "save_steps": STEPS,
            "eval_batch_size": 4, "logging_steps": 1, "report_to": [],
        },
        "mesh": {"fsdp": -1},
    }  # fmt: skip


def launch(count: int, settings: dict, out) -> list[subprocess.Popen]:
    """`count` processes of one device each, as a person starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(out)}))
    command = [sys.executable, "-c", COMMAND, "train", str(path), "--coordinator", address, "--num-processes", str(count)]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    environment = {**os.environ, **cache, "XLA_FLAGS": QUICK, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [*command, "--process-id", str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(count)
    ]


def rows(out) -> dict[int, dict]:
    """What was logged of each update; a line that is being written is left out."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {row["step"]: row for row in map(json.loads, lines) if "train/loss" in row}


def wait_for_step(running, out, step: int) -> None:
    """Until that update is logged, or a process has ended."""
    deadline = time.monotonic() + 900
    while step not in rows(out) and all(process.poll() is None for process in running):
        assert time.monotonic() < deadline, end(running, kill=True)
        time.sleep(0.005)


def run(count: int, settings: dict, out, then=lambda running: None) -> tuple[list[subprocess.Popen], list[str]]:
    """Launch, do something with the running processes, wait: `(processes, what they said)`.

    Gloo, which joins CPUs, gives a process 30 seconds to come after the first; where the machine is too busy for that, again.
    """
    before = out.with_name("before")
    if out.exists():
        shutil.copytree(out, before)
    for _ in range(3):
        running = launch(count, settings, out)
        then(running)
        said = end(running)
        if "Gloo context initialization failed" not in "".join(said):
            break
        shutil.rmtree(out)
        if before.exists():
            shutil.copytree(before, out)
    return running, said


def end(running, kill=False, timeout=900) -> list[str]:
    """What each has said, once all have ended."""
    if kill:
        for process in running:
            process.kill()
    return [process.communicate(timeout=timeout)[0] for process in running]


def same_losses(got: dict[int, dict], want: dict[int, dict]) -> None:
    """The number of trained tokens tells which rows an update had."""
    assert [got[step]["train/trained_tokens"] for step in got] == [want[step]["train/trained_tokens"] for step in got]
    np.testing.assert_allclose(
        [got[step]["train/loss"] for step in got], [want[step]["train/loss"] for step in got], rtol=0, atol=1e-6
    )


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """One process and one device, never stopped."""
    from oracle import one_device

    import ftjax.train.setup as setup

    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda config, devices=None: one_device())
        train(Config.model_validate({**settings, "output_dir": str(out)}))
    assert len(rows(out)) == STEPS
    return out


@pytest.fixture(scope="module")
def stopped(settings, whole, tmp_path_factory):
    """Four processes, of which the third got SIGTERM: all have saved the same step and ended; what they said, too."""
    out = tmp_path_factory.mktemp("four") / "run"

    def then(running):
        wait_for_step(running, out, 3)
        running[2].send_signal(signal.SIGTERM)

    running, said = run(4, settings, out, then)
    assert [process.returncode for process in running] == [1] * 4, "\n".join(said)
    return out, said


def test_four_processes(stopped, whole):
    out, said = stopped
    (step,) = (int(path.name) for path in (out / "checkpoints").iterdir())
    assert step < STEPS and list(rows(out)) == list(range(1, step + 1))
    assert f"SIGTERM: saved step {step} of {STEPS}" in said[0]
    assert not any("saved step" in text or "trainable params" in text for text in said[1:])  # only the first one speaks
    same_losses(rows(out), rows(whole))


def test_two_go_on(stopped, whole, settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped[0], out)
    running, said = run(2, settings, out)
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    same_losses(rows(out), rows(whole))
    assert len(rows(out)) == STEPS
    evaluated = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "eval/loss" in line]
    want = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines() if "eval/loss" in line]
    assert evaluated[-1]["eval/loss"] == pytest.approx(want[-1]["eval/loss"], abs=1e-6)
    from safetensors.numpy import load_file

    ours, theirs = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (out, whole))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


def test_one_goes_on(stopped, whole, settings, tmp_path, on_one_device):
    out = tmp_path / "run"
    shutil.copytree(stopped[0], out)
    train(Config.model_validate({**settings, "output_dir": str(out)}))
    same_losses(rows(out), rows(whole))
    assert len(rows(out)) == STEPS


def test_one_is_killed(settings, tmp_path):
    """The other does not wait for it for ever, and says why it ends."""
    out = tmp_path / "run"
    longer = {**settings, "training": {**settings["training"], "max_steps": 100_000}}
    took = []

    def then(running):
        wait_for_step(running, out, 2)
        running[1].kill()
        start = time.monotonic()
        running[0].wait(timeout=300)
        took.append(time.monotonic() - start)

    running, said = run(2, longer, out, then)
    assert took[-1] < 60 and running[0].returncode not in (0, None)
    assert "another process of this run has ended" in said[0] and "same command on all hosts" in said[0], said[0]
