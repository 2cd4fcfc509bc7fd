"""Whole runs on a tiny model: what they leave, how they stop, and that going on is as if they had never stopped (T8)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from oracle import Case, make_hf
from quick_compile import QUICK
from safetensors.numpy import load_file
from tiny_tokenizer import save_tokenizer

from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.train.layout import BatchLayout
from ftjax.train.loop import Run, train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_hf(Case("llama", "llama", {"initializer_range": 0.05}), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", 90), ("validation", 12)):
        words = ["".join(rng.choice(list("abcdef"), rng.integers(2, 12))) for _ in range(count)]
        rows = [json.dumps({"prompt": word, "completion": word[::-1]}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def config(model, data, out, **over) -> Config:
    values = {
        "model": {"path": str(model), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "method": {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "data": {"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl"), "max_length": 64},
        "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.1},
        "training": {
            "max_steps": 12, "global_batch_size": 4, "eval_steps": 4, "save_steps": 3, "logging_steps": 2, "seed": 3,
            "report_to": [],
        },
        "mesh": {"fsdp": 1},
        "output_dir": str(out),
    }  # fmt: skip
    for key, value in over.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = {**values[section], name: value}
        else:
            values[section] = value
    return Config.model_validate(values)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {row["step"]: row["train/loss"] for row in rows(folder) if "train/loss" in row}


def same_adapter(one, other):
    """To the bit."""
    want, got = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (one, other))
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].tobytes() == got[name].tobytes(), name


class Stop(Exception):
    pass


def stop_after(monkeypatch, step):
    """Make the loop die right after it has read the metrics of an update."""
    original = Run.read

    def read(self, number, *rest):
        original(self, number, *rest)
        if number == step:
            self.checkpoints.wait()
            raise Stop

    monkeypatch.setattr(Run, "read", read)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """A run that was never stopped."""
    from oracle import one_device

    import ftjax.train.setup as setup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda config, devices=None: one_device())
        out = tmp_path_factory.mktemp("whole")
        train(config(model, data, out))
    return out


def test_run_folder(whole):
    """What the documentation promises is there; losses fall; best/ is the evaluation with the lowest loss."""
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/12", "final/adapter_config.json", "final/README.md"):
        assert (whole / name).exists(), name
    assert (whole / "final" / "adapter_model.safetensors").exists() and (whole / "best" / "tokenizer.json").exists()
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["12", "9"]
    record, config = json.loads((whole / "run.json").read_text()), yaml.safe_load((whole / "config.yaml").read_text())
    assert record["steps"] == 12 and len(record["starts"]) == 1 and record["devices"]["platform"] == "cpu"
    for name in ("train", "validation"):
        state = record["data"][name]
        assert state["source"] == config["data"][name] and state["documents"] == sum(b["documents"] for b in state["histogram"])
    assert all(0.01 < row["train/peak_memory_gib"] < 100 for row in rows(whole) if "train/loss" in row)
    steps = losses(whole)
    assert list(steps) == [2, 4, 6, 8, 10, 12] and steps[12] < steps[2]
    evals = {row["step"]: row for row in rows(whole) if "eval/loss" in row}
    assert list(evals) == [4, 8, 12]
    assert all(0 <= row["eval/token_accuracy"] <= 1 for row in evals.values())
    np.testing.assert_allclose([r["eval/perplexity"] for r in evals.values()], np.exp([r["eval/loss"] for r in evals.values()]))


@pytest.mark.parametrize("stop", [5, 10])
def test_resume_is_uninterrupted(model, data, whole, stop, tmp_path, monkeypatch, on_one_device):
    """Weights bit for bit, the metrics line for line: dropout, data order, optimizer, averaging window."""
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Stop):
            train(config(model, data, tmp_path))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')  # a kill cuts a line
    train(config(model, data, tmp_path))
    same_adapter(whole, tmp_path)

    def timeless(folder):
        return [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows(folder)]

    assert timeless(whole) == timeless(tmp_path)
    starts = [one["step"] for one in json.loads((tmp_path / "run.json").read_text())["starts"]]
    assert starts == [0, max(step for step in (3, 6, 9) if step <= stop)]


def test_checkpoints_elsewhere(model, data, whole, tmp_path, monkeypatch, on_one_device, capsys):
    """A new host, whose disk is empty, goes on from a folder that all hosts share; another configuration is refused there."""
    shared = str(tmp_path / "bucket" / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            train(config(model, data, tmp_path / "first", training__checkpoint_dir=shared))
    assert not (tmp_path / "first" / "checkpoints").exists()
    with pytest.raises(UserError, match=r"(?s)bucket.*another configuration.*optimizer.learning_rate"):
        train(config(model, data, tmp_path / "other", training__checkpoint_dir=shared, optimizer={"learning_rate": 1.0}))
    assert (tmp_path / "first" / "best" / "adapter_model.safetensors").exists()
    third = tmp_path / "bucket" / "third"
    shutil.copytree(shared, third)
    shutil.rmtree(third / "best")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", lambda *_: None)  # nothing is better later
        for name, folder in (("second", shared), ("third", third)):
            train(config(model, data, tmp_path / name, training__checkpoint_dir=str(folder)))
            assert min(losses(tmp_path / name)) == 8
            same_adapter(whole, tmp_path / name)
    first, second = (load_file(tmp_path / name / "best" / "adapter_model.safetensors") for name in ("first", "second"))
    assert all((first[name] == second[name]).all() for name in first), "best/ comes back from beside the checkpoints"
    assert not (tmp_path / "third" / "best").exists()
    assert "third/best is not here any more" in capsys.readouterr().out.replace("\n", "")


BUCKET = """
import os, sys
from gcp_storage_emulator.server import create_server

server = create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
server.start()
for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
    os.environ[name] = f"http://localhost:{sys.argv[1]}"
os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "any"
import numpy as np
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ftjax.train.checkpoint import Checkpoints, place
from ftjax.train.step import TrainState

where = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec())
state = TrainState(*jax.device_put(({"a": np.arange(8.0)}, {"m": np.ones(3)}, np.int32(3)), where))
folder = "gs://bucket/run/checkpoints"
checkpoints = Checkpoints(folder, 2)
for step in (3, 4, 5):
    checkpoints.save(step, state, {"step": step})
checkpoints.close()
assert sorted(path.name for path in place(folder).glob("[0-9]*")) == ["4", "5"]
again, meta = Checkpoints(folder, 2).restore(state)
assert meta == {"step": 5} and (np.asarray(again.params["a"]) == np.arange(8)).all()
server.stop()
print("went through the bucket")
"""


def test_checkpoints_in_a_bucket():
    """`gs://` through epath, gcsfs and tensorstore, against an emulated service, where the two packages are installed."""
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    done = subprocess.run([sys.executable, "-c", BUCKET, str(port)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and "went through the bucket" in done.stdout, done.stderr[-3000:]


def test_bucket_that_cannot_be_opened(model, data, tmp_path, monkeypatch):
    """Without gcsfs, or without rights: said at the start."""
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"checkpoint_dir.*gs://nowhere/run.*gcsfs"):
        train(config(model, data, tmp_path / "run", training__checkpoint_dir="gs://nowhere/run"))


def test_resume_on_other_devices(model, data, whole, tmp_path, monkeypatch):
    """A checkpoint of one device goes on on eight: the same batches, losses within 1e-5."""
    from oracle import one_device

    import ftjax.train.setup as setup

    with monkeypatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda config, devices=None: one_device())
        stop_after(patch, 7)
        with pytest.raises(Stop):
            train(config(model, data, tmp_path, method={"name": "lora", "r": 4, "lora_alpha": 8}))
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    train(config(model, data, tmp_path, method={"name": "lora", "r": 4, "lora_alpha": 8}, mesh=mesh))
    straight = tmp_path / "straight"
    with monkeypatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda config, devices=None: one_device())
        train(config(model, data, straight, method={"name": "lora", "r": 4, "lora_alpha": 8}))
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(straight).values()), rtol=1e-5)


def test_arithmetic(model, data, tmp_path, monkeypatch, on_one_device, capsys):
    """The metrics agree with each other and with the formula that is printed; a chip that is known gives an MFU."""
    import ftjax.train.loop as loop

    monkeypatch.setattr(loop, "peak_of", lambda devices: 1e12 * len(devices))
    train(config(model, data, tmp_path, training__max_steps=4, training__eval_steps=None, training__logging_steps=4))
    (row,) = (row for row in rows(tmp_path) if "train/mfu" in row)
    assert row["train/mfu"] == pytest.approx(row["train/tflops_per_second_per_device"])
    assert row["train/tokens_per_second"] == row["train/tokens_per_second_per_device"] > 0
    per_token = row["train/tflops_per_second_per_device"] * 1e12 / row["train/tokens_per_second"]
    full = float(next(line for line in capsys.readouterr().out.splitlines() if "FLOPs a token" in line).split()[0])
    assert 0.7 * full < per_token < full  # the rows are many short documents, the line is for long ones


def test_later_updates_and_evaluations_compile_nothing(model, data, tmp_path, on_one_device, monkeypatch, lowered):
    """Twelve rows in batches of four and of what is left over: one shape all the same."""
    made = []
    original = Run.evaluate

    def evaluate(self, *rest):
        original(self, *rest)
        made.append(lowered())

    monkeypatch.setattr(Run, "evaluate", evaluate)
    train(config(model, data, tmp_path, training__eval_batch_size=5, training__save_steps=12))
    assert len(made) == 3 and len(set(made)) == 1, made


def test_profile(model, data, tmp_path, on_one_device):
    """The trace holds those updates and no others, by their numbers."""
    from jax.profiler import ProfileData

    train(config(model, data, tmp_path, training__max_steps=6, training__eval_steps=None, training__profile_steps=[3, 5]))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    events = [e for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines for e in line.events]
    assert sorted({dict(e.stats)["step_num"] for e in events if e.name == "train"}) == [3, 4, 5]


def test_profile_after_the_end(model, data, tmp_path, on_one_device):
    with pytest.raises(UserError, match=r"profile_steps.*12 steps"):
        train(config(model, data, tmp_path, training__profile_steps=[10, 15]))


def test_other_configuration_is_refused(model, data, whole):
    with pytest.raises(UserError, match=r"(?s)another configuration.*learning_rate"):
        train(config(model, data, whole, optimizer={"learning_rate": 3e-2}))


def test_finished_run_is_left_alone(model, data, whole, capsys, on_one_device):
    before = (whole / "final" / "adapter_model.safetensors").read_bytes()
    train(config(model, data, whole))
    assert (whole / "final" / "adapter_model.safetensors").read_bytes() == before


def test_early_stopping(model, data, tmp_path, on_one_device):
    """A learning rate of zero never improves: the run stops after the patience, and best/ is the first."""
    over = {"optimizer": {"learning_rate": 0.0}, "training__early_stopping_patience": 2, "training__eval_steps": 1}
    train(config(model, data, tmp_path, **over))
    assert [row["step"] for row in rows(tmp_path) if "eval/loss" in row] == [1, 2, 3]
    assert "1 " in (tmp_path / "best" / "README.md").read_text()


def test_divergence_keeps_the_last_good_state(model, data, tmp_path, on_one_device, monkeypatch):
    """NaN at update 6: an error that says so, and the checkpoint of update 5 (T21)."""
    original, seen = BatchLayout.arrays, []

    def arrays(self, batch):
        seen.append(self.microbatches)
        if seen.count(1) == 6:  # evaluations have no microbatches
            batch = {**batch, "weights": batch["weights"] * np.nan}
        return original(self, batch)

    monkeypatch.setattr(BatchLayout, "arrays", arrays)
    with pytest.raises(UserError, match="diverged at step 6"):
        train(config(model, data, tmp_path, training__eval_steps=None))
    assert (tmp_path / "checkpoints" / "5").exists()
    assert not (tmp_path / "checkpoints" / "6").exists()


def test_full_run_loads_in_transformers(model, data, tmp_path, on_one_device):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(config(model, data, tmp_path, method={"name": "full"}, training__max_steps=2))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "final")("abc").input_ids])
    assert (tuned(ids).logits - base(ids).logits).abs().max() > 1e-3


def test_killed_from_outside(model, data, whole, tmp_path, on_one_device):
    """SIGKILL in the middle of a save: going on gives the result as if nothing had been."""
    path = tmp_path / "config.yaml"
    settings = config(model, data, tmp_path / "run", training__save_steps=1, evaluate={"training_examples": 0})
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    environment = {
        **os.environ, "XLA_FLAGS": QUICK, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }  # fmt: skip
    command = [sys.executable, "-m", "ftjax.cli", "train", str(path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    checkpoints = tmp_path / "run" / "checkpoints"
    while time.monotonic() < deadline and process.poll() is None:
        if any("tmp" in p.name for p in checkpoints.glob("*")):  # a temporary folder is a save under way
            break
        time.sleep(0.002)
    process.kill()
    said = process.communicate(timeout=240)[0]
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "final").exists(), said
    train(settings)
    same_adapter(whole, tmp_path / "run")


def test_told_to_stop(model, data, whole, tmp_path, capsys, monkeypatch, on_one_device):
    """SIGTERM: the update under way is saved and the command says how to go on; the result is as if nothing had been."""
    from ftjax.cli import app

    path = tmp_path / "config.yaml"
    settings = config(model, data, tmp_path / "run", evaluate={"training_examples": 0})
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    original = Run.read

    def read(self, number, *rest):
        original(self, number, *rest)
        if number == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Run, "read", read)
        app(["train", str(path)])
    assert end.value.code == 1
    assert f"SIGTERM: saved step 8 of 12 in {tmp_path / 'run'}. To go on: ftjax train {path}" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "8").exists() and not (tmp_path / "run" / "final").exists()
    with pytest.raises(SystemExit) as end:
        app(["train", str(path)])
    assert end.value.code == 0
    same_adapter(whole, tmp_path / "run")


def test_folder_that_cannot_be_written(model, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir.*cannot be written"):
        train(config(model, data, tmp_path / "file" / "run"))


def test_disk_that_fills(model, data, tmp_path, on_one_device, monkeypatch):
    """A save that fails says which checkpoint is whole, and how to go on."""
    import ftjax.train.checkpoint as checkpoint

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"(?s)No space left.*run the same command again"):
        train(config(model, data, tmp_path))
