"""Tests what can happen to a run folder: results replaced, two runs at once, the run's name at W&B, a full disk."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import jax
import pytest
import yaml
from oracle import ONE
from processes import start
from quick_compile import QUICK
from whole_runs import config, rows

from ftjax.errors import UserError
from ftjax.hub.output import recover, replacing
from ftjax.train.layout import BatchLayout
from ftjax.train.loop import Run
from ftjax.train.run import train


class Crash(BaseException):
    pass


def write(folder, text):
    with replacing(folder) as partial:
        (partial / "file").write_text(text)


@pytest.mark.parametrize("step", range(1, 6))
def test_a_crash_while_a_folder_is_replaced(tmp_path, monkeypatch, step):
    """After a crash at any call that moves or removes something, a complete folder is found, old or new."""
    folder = tmp_path / "final"
    write(folder, "old")
    left = [step]

    def counted(original):
        def call(*args, **options):
            left[0] -= 1
            if left[0] <= 0:  # a dead process does nothing more
                raise Crash
            return original(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr("shutil.rmtree", counted(__import__("shutil").rmtree))
        with suppress(Crash):
            write(folder, "new")
    recover(folder)
    assert (folder / "file").read_text() in ("old", "new")
    write(folder, "newest")
    assert (folder / "file").read_text() == "newest" and [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_replacement_that_fails_leaves_the_old(tmp_path, monkeypatch):
    folder = tmp_path / "final"
    write(folder, "old")
    original = Path.rename

    def rename(self, target):
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="No space left"):
        write(folder, "new")
    assert (folder / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_start_brings_results_back(model, data, tmp_path):
    short = config(model, data, tmp_path, training__max_steps=4)
    train(short, devices=ONE)
    for name in ("final", "best"):
        (tmp_path / name).rename(tmp_path / f".{name}.old")
    (tmp_path / ".final.old" / "notes.txt").write_text("mine")
    train(short, devices=ONE)
    assert (tmp_path / "best" / "adapter_model.safetensors").exists() and (tmp_path / "final" / "notes.txt").exists()
    assert not list(tmp_path.glob(".*.old"))


HOLD = """
import sys, time
from pathlib import Path
from ftjax.config import Config
from ftjax.train.lock import alone_in
config = Config.model_validate({"model": {"path": "x"}, "data": {"train": "x"}, "output_dir": sys.argv[1]})
with alone_in(config):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder(model, data, tmp_path):
    """The second is refused before it writes anything, and names the first; a run that was killed holds nothing."""
    one = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert one.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"output_dir.*another run.*process {one.pid} on "):
            train(config(model, data, tmp_path), devices=ONE)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        one.send_signal(signal.SIGKILL)
        one.communicate()
    train(config(model, data, tmp_path, training__max_steps=1, training__eval_steps=None), devices=ONE)


def test_a_file_system_without_locks(model, data, tmp_path, monkeypatch):
    import fcntl

    from ftjax.train.lock import alone_in

    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone_in(config(model, data, tmp_path)), alone_in(config(model, data, tmp_path)):
        pass


class Wandb(ModuleType):
    """Stands in for the part of the package that a run uses."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("wandb", None)
        self.ids = []

    def init(self, **options):
        self.ids.append((options["id"], options["resume"]))
        return self

    def log(self, *_, **__):
        pass

    def finish(self):
        pass


def test_a_runs_name_at_wandb(model, data, tmp_path, monkeypatch):
    """Starts that go on share it; another run at the same path does not, nor does one that begins anew."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    over = {"training__report_to": ["wandb"], "training__eval_steps": None, "training__max_steps": 2}
    for _ in range(2):
        train(config(model, data, tmp_path / "run", **over), devices=ONE)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    train(config(model, data, tmp_path / "run", **over), devices=ONE)
    train(config(model, data, tmp_path / "elsewhere", **over), devices=ONE)
    first, again, other, moved = (name for name, _ in wandb.ids)
    assert first == again == moved != other and len(first) >= 8

    bucket = str(tmp_path / "shared")
    for disk in ("one", "two"):  # a new host, whose disk is empty
        train(config(model, data, tmp_path / disk, training__checkpoint_dir=bucket, **over), devices=ONE)
    assert wandb.ids[-1] == wandb.ids[-2]

    def init(**_):
        raise wandb.Error("api_key not configured (no-tty)")

    wandb.init = init
    with pytest.raises(UserError, match=r"report_to.*wandb cannot start: api_key.*WANDB_MODE=offline"):
        train(config(model, data, tmp_path / "run", **over), devices=ONE)


def test_without_wandb(data, tmp_path, monkeypatch):
    """The missing package is reported before anything is loaded."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(UserError, match=r"report_to: wandb is not installed; pip install"):
        train(config("no model", data, tmp_path, training__report_to=["wandb"]))


def test_speed_right_after_an_evaluation(model, data, tmp_path, monkeypatch):
    """Batches that take 50 ms to come: no more tokens a second than that allows, wherever evaluations and saves are."""
    import time

    original = BatchLayout.arrays

    def arrays(self, batch):
        if self.microbatches is not None:
            time.sleep(0.05)
        return original(self, batch)

    monkeypatch.setattr(BatchLayout, "arrays", arrays)
    monkeypatch.setattr(Run, "losses", lambda self: time.sleep(0.2) or {"eval/loss": 1.0})
    train(config(model, data, tmp_path, training__eval_steps=3, training__save_steps=5, training__logging_steps=1), devices=ONE)
    rates = {row["step"]: row["train/tokens_per_second"] for row in rows(tmp_path) if "train/tokens_per_second" in row}
    most = 4 * 64 / 0.05
    assert all(rates[step] < 1.1 * most for step in rates) and all(rates[step] > most / 20 for step in rates if step > 2), rates


def test_a_disk_that_fills(model, data, tmp_path):
    """If Orbax's files do not fit, one message names the step that is complete, without a traceback from any thread."""
    settings = config(model, data, tmp_path / "run", method={"name": "full"}, training__save_steps=1, training__eval_steps=None)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    limited = (
        "import resource, sys\n"
        "from ftjax.cli import app\n"
        "import ftjax.train.loop as loop\n"
        "original = loop.Run.save\n"
        "def save(self, step):\n"
        "    if step == 3:\n"
        "        self.checkpoints.wait()\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "    original(self, step)\n"
        "loop.Run.save = save\n"
        "app(['train', sys.argv[1]])\n"
    )
    environment = {**os.environ, "XLA_FLAGS": QUICK, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    process = start([path], limited, env=environment)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 2, said[-3000:]
    (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "could not be written" in message and "intact (step 2)" in message and "File too large" in message
    assert "Traceback" not in said and len(said[said.index("error: ") :].splitlines()) < 6, said[:3000]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 12
