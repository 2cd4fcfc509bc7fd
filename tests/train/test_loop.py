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
from oracle import ONE
from processes import environment, start
from safetensors.numpy import load_file
from whole_runs import config, losses, rows, same_adapter

from ftjax.config.load import load_config
from ftjax.errors import UserError
from ftjax.train.layout import BatchLayout
from ftjax.train.loop import Run
from ftjax.train.observer import Observation
from ftjax.train.run import train


def own_environment() -> dict[str, str]:
    """Of a process with one device, which finds the programs that this one has compiled."""
    return environment(1, JAX_COMPILATION_CACHE_DIR=jax.config.jax_compilation_cache_dir)


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
    out = tmp_path_factory.mktemp("whole")
    train(config(model, data, out), devices=ONE)
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


@pytest.mark.parametrize("stop", [5, pytest.param(10, marks=pytest.mark.sweep)])
def test_resume_is_uninterrupted(model, data, whole, stop, tmp_path, monkeypatch):
    """Weights bit for bit, the metrics line for line: dropout, data order, optimizer, averaging window."""
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Stop):
            train(config(model, data, tmp_path), devices=ONE)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')  # a kill cuts a line
    train(config(model, data, tmp_path), devices=ONE)
    same_adapter(whole, tmp_path)

    def timeless(folder):
        return [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows(folder)]

    assert timeless(whole) == timeless(tmp_path)
    starts = [one["step"] for one in json.loads((tmp_path / "run.json").read_text())["starts"]]
    assert starts == [0, max(step for step in (3, 6, 9) if step <= stop)]


def test_checkpoints_elsewhere(model, data, whole, tmp_path, monkeypatch, capsys):
    """A new host, whose disk is empty, goes on from a folder that all hosts share; another configuration is refused there."""
    shared = str(tmp_path / "bucket" / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            train(config(model, data, tmp_path / "first", training__checkpoint_dir=shared), devices=ONE)
    assert not (tmp_path / "first" / "checkpoints").exists()
    with pytest.raises(UserError, match=r"(?s)bucket.*another configuration.*optimizer.learning_rate"):
        another = config(model, data, tmp_path / "other", training__checkpoint_dir=shared, optimizer={"learning_rate": 1.0})
        train(another, devices=ONE)
    assert (tmp_path / "first" / "best" / "adapter_model.safetensors").exists()
    third = tmp_path / "bucket" / "third"
    shutil.copytree(shared, third)
    shutil.rmtree(third / "best")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", lambda *_: None)  # no later evaluation is better
        for name, folder in (("second", shared), ("third", third)):
            train(config(model, data, tmp_path / name, training__checkpoint_dir=str(folder)), devices=ONE)
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
again, meta, _ = Checkpoints(folder, 2).restore(state)
assert meta == {"step": 4} and (np.asarray(again.params["a"]) == np.arange(8)).all()
print("went through the bucket")
"""


def test_checkpoints_in_a_bucket():
    """`gs://` works through epath, gcsfs and tensorstore, with a service that refuses some requests."""
    with bucket(refuse_every=25) as (variables, refused):
        done = subprocess.run(
            [sys.executable, "-c", BUCKET], env={**os.environ, **variables}, capture_output=True, text=True, timeout=400
        )
    assert done.returncode == 0 and "went through the bucket" in done.stdout, done.stderr[-3000:]
    assert len(refused) > 2


REWRITTEN = """
import tensorstore

store = tensorstore.KvStore.open("gs://bucket/some/").result()
store.write("one", b"1").result()
found = store.read("one").result()
assert found.value == b"1"
assert store.write("one", b"2", if_equal=found.stamp.generation).result().generation != found.stamp.generation
print(store["one"].decode())
"""


def test_an_object_of_the_bucket_is_rewritten_after_it_was_read():
    """Orbax does so with its manifests when it has to read them again, which depends on time."""
    with bucket(refuse_every=25) as (variables, _):
        done = subprocess.run(
            [sys.executable, "-c", REWRITTEN], env={**os.environ, **variables}, capture_output=True, text=True, timeout=400
        )
    assert done.returncode == 0 and done.stdout == "2\n", done.stderr[-3000:]


def test_bucket_that_cannot_be_opened(model, data, tmp_path, monkeypatch):
    """Missing gcsfs or missing rights are reported at the start."""
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"checkpoint_dir.*gs://nowhere/run.*gcsfs"):
        train(config(model, data, tmp_path / "run", training__checkpoint_dir="gs://nowhere/run"))


def test_resume_on_other_devices(model, data, whole, tmp_path, monkeypatch):
    """A checkpoint of one device goes on on eight: the same batches, losses within 1e-5."""
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            train(config(model, data, tmp_path, method={"name": "lora", "r": 4, "lora_alpha": 8}), devices=ONE)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    train(config(model, data, tmp_path, method={"name": "lora", "r": 4, "lora_alpha": 8}, mesh=mesh))
    straight = tmp_path / "straight"
    train(config(model, data, straight, method={"name": "lora", "r": 4, "lora_alpha": 8}), devices=ONE)
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(straight).values()), rtol=1e-5)


class Watcher:
    """An observer that notes on which devices the parameters are."""

    def __init__(self):
        self.facts, self.places = {}, set()

    def __call__(self, params):
        self.places |= {device for value in params.values() for device in value.devices()}
        return Observation({}, [])


def test_a_device_of_ones_choice(model, data, whole, tmp_path, capsys):
    """It need not be the first: the same bits, everything lies there, and the run says and records what it uses."""
    chosen, watcher = jax.devices()[6:7], Watcher()
    train(config(model, data, tmp_path), devices=chosen, make_observer=lambda *_: watcher)
    same_adapter(whole, tmp_path)
    assert watcher.places == set(chosen)
    assert json.loads((tmp_path / "run.json").read_text())["devices"]["count"] == 1
    assert "devices: 1 cpu" in capsys.readouterr().out


def test_arithmetic(model, data, tmp_path, monkeypatch, capsys):
    """The metrics agree with each other and with the formula that is printed; a chip that is known gives an MFU."""
    import ftjax.train.log as log

    monkeypatch.setattr(log, "peak_of", lambda devices: 1e12 * len(devices))
    over = {"training__max_steps": 4, "training__eval_steps": None, "training__logging_steps": 4}
    train(config(model, data, tmp_path, **over), devices=ONE)
    (row,) = (row for row in rows(tmp_path) if "train/mfu" in row)
    assert row["train/mfu"] == pytest.approx(row["train/tflops_per_second_per_device"])
    assert row["train/tokens_per_second"] == row["train/tokens_per_second_per_device"] > 0
    per_token = row["train/tflops_per_second_per_device"] * 1e12 / row["train/tokens_per_second"]
    full = float(next(line for line in capsys.readouterr().out.splitlines() if "FLOPs per token" in line).split()[0])
    assert 0.7 * full < per_token < full  # the rows have many short documents; the printed line assumes long ones


def test_later_updates_and_evaluations_compile_nothing(model, data, tmp_path, monkeypatch, lowered):
    """Twelve rows in batches of four and of what is left over: one shape all the same."""
    made = []
    original = Run.evaluate

    def evaluate(self, *rest):
        original(self, *rest)
        made.append(lowered())

    monkeypatch.setattr(Run, "evaluate", evaluate)
    train(config(model, data, tmp_path, training__eval_batch_size=5, training__save_steps=12), devices=ONE)
    assert len(made) == 3 and len(set(made)) == 1, made


def test_profile(model, data, tmp_path):
    """The trace holds those updates and no others, by their numbers."""
    from jax.profiler import ProfileData

    over = {"training__max_steps": 6, "training__eval_steps": None, "training__profile_steps": [3, 5]}
    train(config(model, data, tmp_path, **over), devices=ONE)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    events = [e for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines for e in line.events]
    assert sorted({dict(e.stats)["step_num"] for e in events if e.name == "train"}) == [3, 4, 5]


def test_profile_after_the_end(model, data, tmp_path):
    with pytest.raises(UserError, match=r"profile_steps.*12 steps"):
        train(config(model, data, tmp_path, training__profile_steps=[10, 15]), devices=ONE)


def test_other_configuration_is_refused(model, data, whole):
    with pytest.raises(UserError, match=r"(?s)another configuration.*learning_rate"):
        train(config(model, data, whole, optimizer={"learning_rate": 3e-2}))


def test_finished_run_is_left_alone(model, data, whole, capsys):
    before = (whole / "final" / "adapter_model.safetensors").read_bytes()
    train(config(model, data, whole), devices=ONE)
    assert (whole / "final" / "adapter_model.safetensors").read_bytes() == before


def test_early_stopping(model, data, tmp_path):
    """A learning rate of zero never improves: the run stops after the patience, and best/ is the first."""
    over = {"optimizer": {"learning_rate": 0.0}, "training__early_stopping_patience": 2, "training__eval_steps": 1}
    train(config(model, data, tmp_path, **over), devices=ONE)
    assert [row["step"] for row in rows(tmp_path) if "eval/loss" in row] == [1, 2, 3]
    assert "1 " in (tmp_path / "best" / "README.md").read_text()


def test_the_same_command_after_an_early_stop(model, data, tmp_path, capsys):
    """It trains nothing more, and leaves the result and whatever else lies in its folder; a lost result is written anew."""
    over = {"optimizer": {"learning_rate": 1e-2}, "training__early_stopping_patience": 1, "training__eval_steps": 1}
    over["training__early_stopping_threshold"] = 100.0
    train(config(model, data, tmp_path, **over), devices=ONE)
    before, metrics = (tmp_path / "final" / "adapter_model.safetensors").read_bytes(), rows(tmp_path)
    assert metrics[-1]["step"] == 2
    (tmp_path / "final" / "notes.txt").write_text("mine")
    train(config(model, data, tmp_path, **over), devices=ONE)
    assert "early stop at step 2" in capsys.readouterr().out.rpartition("resuming")[2]
    assert (tmp_path / "final" / "notes.txt").exists() and rows(tmp_path) == metrics
    shutil.rmtree(tmp_path / "final")
    train(config(model, data, tmp_path, **over), devices=ONE)
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


def test_bad_updates_are_skipped(model, data, tmp_path, monkeypatch, capsys):
    """NaN in updates 5 and 6: the run goes on without them, says and counts it, and its numbers are numbers."""
    spoil(monkeypatch, 5, 6)
    train(config(model, data, tmp_path), devices=ONE)
    logged = {row["step"]: row for row in rows(tmp_path) if "train/skipped_updates" in row}
    assert [logged[step]["train/skipped_updates"] for step in sorted(logged)] == [0, 0, 2, 2, 2, 2]
    assert "train/loss" not in logged[6] and "train/grad_norm" not in logged[6]
    assert all(np.isfinite(v) for row in logged.values() for name, v in row.items() if name != "train/trained_tokens")
    assert [row["step"] for row in rows(tmp_path) if "warning" in row] == [5, 6]
    said = capsys.readouterr().out
    assert "update 5 is not applied: loss nan" in said and "2 skipped so far" in said
    # The schedule counts applied updates.
    assert logged[12]["train/learning_rate"] > 0 and (tmp_path / "final" / "adapter_model.safetensors").exists()


def test_divergence_gives_up(model, data, tmp_path, monkeypatch):
    """NaN from update 6 on: after so many in a row the run ends; the checkpoint is where the message says, with the state of
    update 5, and another start goes on behind the bad rows."""
    over = {"training__eval_steps": None, "training__max_skipped_updates": 2}
    with monkeypatch.context() as patch:
        spoil(patch, 6, 99)
        with pytest.raises(UserError, match=r"(?s)diverged at step 9: 4 updates in a row.*checkpoint of step 9"):
            train(config(model, data, tmp_path, **over), devices=ONE)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())[-1] == 9
    assert not (tmp_path / "final").exists()
    kept = []
    original = Run.restore

    def restore(self):
        first = original(self)
        kept.append((first, int(self.state.step), self.batches.get_state()["row"], self.watch.skipped))
        return first

    monkeypatch.setattr(Run, "restore", restore)
    train(config(model, data, tmp_path, **over), devices=ONE)
    ((first, applied, row, skipped),) = kept
    assert (first, applied, skipped) == (9, 5, 4) and row % 4 == 0
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row][-1] == 12


def test_nothing_but_bad_updates(model, data, tmp_path, monkeypatch):
    """A run that is shorter than the patience does not end well without a single update."""
    spoil(monkeypatch, 1, 99)
    with pytest.raises(UserError, match="diverged at step 2"):
        train(config(model, data, tmp_path, training__max_steps=2), devices=ONE)


def test_full_run_loads_in_transformers(model, data, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(config(model, data, tmp_path, method={"name": "full"}, training__max_steps=2), devices=ONE)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "final")("abc").input_ids])
    assert (tuned(ids).logits - base(ids).logits).abs().max() > 1e-3


def test_killed_from_outside(model, data, whole, tmp_path):
    """SIGKILL in the middle of a save: going on gives the result as if nothing had been."""
    path = tmp_path / "config.yaml"
    settings = config(model, data, tmp_path / "run", training__save_steps=1, evaluate={"training_examples": 0})
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    process = start(["train", path], env=own_environment())
    deadline = time.monotonic() + 240
    checkpoints = tmp_path / "run" / "checkpoints"
    while time.monotonic() < deadline and process.poll() is None:
        if any("tmp" in p.name for p in checkpoints.glob("*")):  # a temporary folder means that a save is running
            break
        time.sleep(0.002)
    process.kill()
    said = process.communicate(timeout=240)[0]
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "final").exists(), said
    train(settings, devices=ONE)
    same_adapter(whole, tmp_path / "run")


STOP_IN_8 = """
import os
import signal

from ftjax.cli import main
from ftjax.train.loop import Run

original = Run.read


def read(self, number, *rest):  # of an update, while the next is under way
    original(self, number, *rest)
    if number == 7:
        os.kill(os.getpid(), signal.SIGTERM)


Run.read = read
main()
"""


def test_told_to_stop(model, data, whole, tmp_path):
    """SIGTERM: the update under way is saved, and the whole command to go on is said; the result is as if nothing had been."""
    path, out = tmp_path / "config.yaml", tmp_path / "my run"
    settings = config(model, data, tmp_path / "another", evaluate={"training_examples": 0})
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    given = [f"output_dir={out}", "training.logging_steps=2"]
    process = start(["train", path, *given], STOP_IN_8, env=own_environment())
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 1, said
    assert f"SIGTERM: saved step 8 of 12 in {out}. To resume: ftjax train {path} " in said
    assert (out / "checkpoints" / "8").exists() and not (out / "final").exists()
    again = shlex.split(said.partition("To resume: ")[2].splitlines()[0])
    assert again == ["ftjax", "train", str(path), *given]
    train(load_config(path, given), devices=ONE)
    same_adapter(whole, out)


def test_folder_that_cannot_be_written(model, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir.*cannot be written"):
        train(config(model, data, tmp_path / "file" / "run"))


def test_disk_that_fills(model, data, tmp_path, monkeypatch):
    """A save that fails says which checkpoint is whole, and how to go on."""
    import ftjax.train.checkpoint as checkpoint

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"(?s)No space left.*run the same command again"):
        train(config(model, data, tmp_path), devices=ONE)
