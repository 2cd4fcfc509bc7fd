"""Tests whole runs of a tiny model: their files, how they stop, and that resuming equals never having stopped (T8)."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from buckets import bucket
from quick_compile import QUICK
from safetensors.numpy import load_file
from whole_runs import config, losses, rows, same_adapter

from ftjax.errors import UserError
from ftjax.train.layout import BatchLayout
from ftjax.train.loop import Run
from ftjax.train.run import train


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
    """Return the folder of a run that was never stopped."""
    from oracle import one_device

    import ftjax.train.setup as setup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda config, devices=None: one_device())
        out = tmp_path_factory.mktemp("whole")
        train(config(model, data, out))
    return out


def test_run_folder(whole):
    """The folder has what the documentation promises; losses fall; best/ is the evaluation with the lowest loss."""
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
    """Weights are equal bit for bit, and metrics line for line: dropout, data order, optimizer, averaging window."""
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Stop):
            train(config(model, data, tmp_path))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')  # a kill truncates a line
    train(config(model, data, tmp_path))
    same_adapter(whole, tmp_path)

    def timeless(folder):
        return [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows(folder)]

    assert timeless(whole) == timeless(tmp_path)
    starts = [one["step"] for one in json.loads((tmp_path / "run.json").read_text())["starts"]]
    assert starts == [0, max(step for step in (3, 6, 9) if step <= stop)]


def test_checkpoints_elsewhere(model, data, whole, tmp_path, monkeypatch, on_one_device, capsys):
    """A new host with an empty disk resumes from a folder that all hosts share; another configuration is refused."""
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
        patch.setattr(Run, "evaluate", lambda *_: None)  # no later evaluation is better
        for name, folder in (("second", shared), ("third", third)):
            train(config(model, data, tmp_path / name, training__checkpoint_dir=str(folder)))
            assert min(losses(tmp_path / name)) == 8
            same_adapter(whole, tmp_path / name)
    first, second = (load_file(tmp_path / name / "best" / "adapter_model.safetensors") for name in ("first", "second"))
    assert all((first[name] == second[name]).all() for name in first), "best/ comes back from beside the checkpoints"
    assert not (tmp_path / "third" / "best").exists()
    assert "third/best no longer exists" in capsys.readouterr().out.replace("\n", "")


BUCKET = """
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ftjax.train.checkpoint import Checkpoints, checkpoint_path
from ftjax.train.step import TrainState

where = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec())
state = TrainState(*jax.device_put(({"a": np.arange(8.0)}, {"m": np.ones(3)}, np.int32(3)), where))
folder = "gs://bucket/run/checkpoints"
checkpoints = Checkpoints(folder, 1)
for step in (3, 4):
    checkpoints.save(step, state, {"step": step})
checkpoints.close()
assert [path.name for path in checkpoint_path(folder).glob("[0-9]*")] == ["4"]
again, meta = Checkpoints(folder, 2).restore(state)
assert meta == {"step": 4} and (np.asarray(again.params["a"]) == np.arange(8)).all()
print("went through the bucket")
"""


def test_checkpoints_in_a_bucket():
    """`gs://` works through epath, gcsfs and tensorstore, with a service that refuses one request of nine."""
    with bucket(refuse_every=9) as (variables, refused):
        done = subprocess.run(
            [sys.executable, "-c", BUCKET], env={**os.environ, **variables}, capture_output=True, text=True, timeout=400
        )
    assert done.returncode == 0 and "went through the bucket" in done.stdout, done.stderr[-3000:]
    assert len(refused) > 5


def test_bucket_that_cannot_be_opened(model, data, tmp_path, monkeypatch):
    """Missing gcsfs or missing rights are reported at the start."""
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"checkpoint_dir.*gs://nowhere/run.*gcsfs"):
        train(config(model, data, tmp_path / "run", training__checkpoint_dir="gs://nowhere/run"))


def test_resume_on_other_devices(model, data, whole, tmp_path, monkeypatch):
    """A checkpoint of one device resumes on eight: the same batches, losses within 1e-5."""
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
    """The metrics agree with each other and with the printed formula; a known chip gives an MFU."""
    import ftjax.train.log as log

    monkeypatch.setattr(log, "peak_of", lambda devices: 1e12 * len(devices))
    train(config(model, data, tmp_path, training__max_steps=4, training__eval_steps=None, training__logging_steps=4))
    (row,) = (row for row in rows(tmp_path) if "train/mfu" in row)
    assert row["train/mfu"] == pytest.approx(row["train/tflops_per_second_per_device"])
    assert row["train/tokens_per_second"] == row["train/tokens_per_second_per_device"] > 0
    per_token = row["train/tflops_per_second_per_device"] * 1e12 / row["train/tokens_per_second"]
    full = float(next(line for line in capsys.readouterr().out.splitlines() if "FLOPs per token" in line).split()[0])
    assert 0.7 * full < per_token < full  # the rows have many short documents; the printed line assumes long ones


def test_later_updates_and_evaluations_compile_nothing(model, data, tmp_path, on_one_device, monkeypatch, lowered):
    """Twelve rows in batches of four, and a smaller last batch, use one shape."""
    made = []
    original = Run.evaluate

    def evaluate(self, *rest):
        original(self, *rest)
        made.append(lowered())

    monkeypatch.setattr(Run, "evaluate", evaluate)
    train(config(model, data, tmp_path, training__eval_batch_size=5, training__save_steps=12))
    assert len(made) == 3 and len(set(made)) == 1, made


def test_profile(model, data, tmp_path, on_one_device):
    """The trace has exactly the requested updates, by number."""
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
    """With a learning rate of zero nothing improves: the run stops after the patience, and best/ is the first evaluation."""
    over = {"optimizer": {"learning_rate": 0.0}, "training__early_stopping_patience": 2, "training__eval_steps": 1}
    train(config(model, data, tmp_path, **over))
    assert [row["step"] for row in rows(tmp_path) if "eval/loss" in row] == [1, 2, 3]
    assert "1 " in (tmp_path / "best" / "README.md").read_text()


def test_the_same_command_after_an_early_stop(model, data, tmp_path, on_one_device, capsys):
    """It trains nothing more, and leaves results and other files alone; a lost result is written again."""
    over = {"optimizer": {"learning_rate": 1e-2}, "training__early_stopping_patience": 1, "training__eval_steps": 1}
    over["training__early_stopping_threshold"] = 100.0
    train(config(model, data, tmp_path, **over))
    before, metrics = (tmp_path / "final" / "adapter_model.safetensors").read_bytes(), rows(tmp_path)
    assert metrics[-1]["step"] == 2
    (tmp_path / "final" / "notes.txt").write_text("mine")
    train(config(model, data, tmp_path, **over))
    assert "early stop at step 2" in capsys.readouterr().out.rpartition("resuming")[2]
    assert (tmp_path / "final" / "notes.txt").exists() and rows(tmp_path) == metrics
    shutil.rmtree(tmp_path / "final")
    train(config(model, data, tmp_path, **over))
    assert (tmp_path / "final" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


def spoil(monkeypatch, first: int, last: int) -> None:
    """Make losses NaN in the updates from `first` to `last`."""
    original, seen = BatchLayout.arrays, []

    def arrays(self, batch):
        seen.append(self.microbatches)
        if first <= seen.count(1) <= last:  # evaluations have no microbatches
            batch = {**batch, "weights": batch["weights"] * np.nan}
        return original(self, batch)

    monkeypatch.setattr(BatchLayout, "arrays", arrays)


def test_bad_updates_are_skipped(model, data, tmp_path, on_one_device, monkeypatch, capsys):
    """NaN in updates 5 and 6 is skipped, reported and counted, and the logged metrics are finite."""
    spoil(monkeypatch, 5, 6)
    train(config(model, data, tmp_path))
    logged = {row["step"]: row for row in rows(tmp_path) if "train/skipped_updates" in row}
    assert [logged[step]["train/skipped_updates"] for step in sorted(logged)] == [0, 0, 2, 2, 2, 2]
    assert "train/loss" not in logged[6] and "train/grad_norm" not in logged[6]
    assert all(np.isfinite(v) for row in logged.values() for name, v in row.items() if name != "train/trained_tokens")
    assert [row["step"] for row in rows(tmp_path) if "warning" in row] == [5, 6]
    said = capsys.readouterr().out
    assert "update 5 is not applied: loss nan" in said and "2 skipped so far" in said
    # The schedule counts applied updates.
    assert logged[12]["train/learning_rate"] > 0 and (tmp_path / "final" / "adapter_model.safetensors").exists()


def test_divergence_gives_up(model, data, tmp_path, on_one_device, monkeypatch):
    """With NaN from update 6 on, the run ends after the limit; the checkpoint that the message names has the state of update 5,
    and another start continues after the bad rows."""
    over = {"training__eval_steps": None, "training__max_skipped_updates": 2}
    with monkeypatch.context() as patch:
        spoil(patch, 6, 99)
        with pytest.raises(UserError, match=r"(?s)diverged at step 9: 4 updates in a row.*checkpoint of step 9"):
            train(config(model, data, tmp_path, **over))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())[-1] == 9
    assert not (tmp_path / "final").exists()
    kept = []
    original = Run.restore

    def restore(self):
        first = original(self)
        kept.append((first, int(self.state.step), self.batches.get_state()["row"], self.watch.skipped))
        return first

    monkeypatch.setattr(Run, "restore", restore)
    train(config(model, data, tmp_path, **over))
    ((first, applied, row, skipped),) = kept
    assert (first, applied, skipped) == (9, 5, 4) and row % 4 == 0
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row][-1] == 12


def test_nothing_but_bad_updates(model, data, tmp_path, on_one_device, monkeypatch):
    """A run shorter than the limit does not end successfully without a single update."""
    spoil(monkeypatch, 1, 99)
    with pytest.raises(UserError, match="diverged at step 2"):
        train(config(model, data, tmp_path, training__max_steps=2))


def test_full_run_loads_in_transformers(model, data, tmp_path, on_one_device):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(config(model, data, tmp_path, method={"name": "full"}, training__max_steps=2))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "final")("abc").input_ids])
    assert (tuned(ids).logits - base(ids).logits).abs().max() > 1e-3


def test_killed_from_outside(model, data, whole, tmp_path, on_one_device):
    """After SIGKILL in the middle of a save, resuming gives the result of an uninterrupted run."""
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
        if any("tmp" in p.name for p in checkpoints.glob("*")):  # a temporary folder means that a save is running
            break
        time.sleep(0.002)
    process.kill()
    said = process.communicate(timeout=240)[0]
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "final").exists(), said
    train(settings)
    same_adapter(whole, tmp_path / "run")


def test_told_to_stop(model, data, whole, tmp_path, capsys, monkeypatch, on_one_device):
    """On SIGTERM the current update is saved and the command to resume is printed; the result is that of an uninterrupted
    run."""
    from ftjax.cli import app

    path, out = tmp_path / "config.yaml", tmp_path / "my run"
    settings = config(model, data, tmp_path / "another", evaluate={"training_examples": 0})
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    original = Run.read

    def read(self, number, *rest):
        original(self, number, *rest)
        if number == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Run, "read", read)
        app(["train", str(path), f"output_dir={out}", "training.logging_steps=2"])
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert f"SIGTERM: saved step 8 of 12 in {out}. To resume: ftjax train {path} " in said
    assert (out / "checkpoints" / "8").exists() and not (out / "final").exists()
    program, *again = shlex.split(said.partition("To resume: ")[2].splitlines()[0])
    assert program == "ftjax" and again[2:] == [f"output_dir={out}", "training.logging_steps=2"]
    with pytest.raises(SystemExit) as end:
        app(again)
    assert end.value.code == 0
    same_adapter(whole, out)


def test_folder_that_cannot_be_written(model, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir.*cannot be written"):
        train(config(model, data, tmp_path / "file" / "run"))


def test_disk_that_fills(model, data, tmp_path, on_one_device, monkeypatch):
    """The error of a failed save names the complete checkpoint, and how to resume."""
    import ftjax.train.checkpoint as checkpoint

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"(?s)No space left.*run the same command again"):
        train(config(model, data, tmp_path))
