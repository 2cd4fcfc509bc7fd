"""Tests how real processes on CPUs, joined by `ftjax train --coordinator`, stop and resume. Their results: test_matrix.py."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from buckets import bucket
from processes import (
    ALL,
    COMMAND,
    end,
    environment,
    launch,
    launch_verb,
    make_settings,
    rows,
    run,
    same_losses,
    start,
    wait_for_step,
    whole_run,
)
from safetensors.numpy import load_file, save_file
from verbs import evaluate, generate

STEPS = 60  # enough that a signal sent after the first few arrives before the last, even on a busy machine


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Return a configuration without its output_dir; an epoch has 10 updates, so that runs stop within one."""
    made = make_settings(tmp_path_factory.mktemp("model"))
    training = {**made["training"], "max_steps": STEPS, "save_steps": STEPS}
    return {**made, "training": training, "evaluate": {"training_examples": 0}}  # test_matrix.py has answers during training


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """Return the folder of one process on one device, never stopped."""
    out = tmp_path_factory.mktemp("whole")
    whole_run(settings, out, devices=1)
    assert len(rows(out)) == STEPS
    return out


@pytest.fixture(scope="module")
def stopped(settings, whole, tmp_path_factory):
    """Send SIGTERM to the third of four processes; return the folder and the outputs after all have saved the same step and
    ended."""
    out = tmp_path_factory.mktemp("four") / "run"

    def then(running):
        wait_for_step(running, out, 3)
        running[2].send_signal(signal.SIGTERM)

    running, said = run(4, settings, out, then)
    assert [process.returncode for process in running] == [1] * 4, "\n".join(said)
    return out, said


def saved_step(out) -> int:
    return max(int(path.name) for path in (out / "checkpoints").iterdir())


def test_four_processes(stopped, whole):
    out, said = stopped
    step = saved_step(out)
    assert step < STEPS and list(rows(out)) == list(range(1, step + 1))
    assert f"SIGTERM: saved step {step} of {STEPS}" in said[0]
    assert not any("saved step" in text or "trainable params" in text for text in said[1:])  # only the first one prints
    same_losses(rows(out), rows(whole))


def test_two_go_on_then_one(stopped, whole, settings, tmp_path):
    """Runs of four processes, of two and of one follow each other; all but the last stop within an epoch."""
    out = tmp_path / "run"
    shutil.copytree(stopped[0], out)
    go_on_and_stop(2, settings, out)
    whole_run(settings, out, devices=1)
    same_results(out, whole)


@pytest.mark.sweep  # the test above has fewer processes
def test_one_goes_on_then_four(stopped, whole, settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped[0], out)
    go_on_and_stop(1, settings, out)
    running, said = run(4, settings, out)
    assert [process.returncode for process in running] == [0] * 4, "\n".join(said)
    same_results(out, whole)


def go_on_and_stop(count, settings, out) -> None:
    first = saved_step(out)

    def then(running):
        wait_for_step(running, out, first + 3)
        running[-1].send_signal(signal.SIGTERM)

    running, said = run(count, settings, out, then)
    assert [process.returncode for process in running] == [1] * count, "\n".join(said)
    assert first < saved_step(out) < STEPS


def same_results(out, whole) -> None:
    same_losses(rows(out), rows(whole))
    assert len(rows(out)) == STEPS
    evaluated, want = (rows(folder, "eval/loss") for folder in (out, whole))
    assert evaluated[STEPS]["eval/loss"] == pytest.approx(want[STEPS]["eval/loss"], abs=1e-6)
    ours, theirs = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (out, whole))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


def test_one_is_killed(settings, tmp_path):
    """The other process does not wait for ever, and says why it ends."""
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
    assert took[-1] < 30 and running[0].returncode not in (0, None)
    assert "another process of this run has ended" in said[0] and "same command on all hosts" in said[0], said[0]


def test_one_comes_late(settings, whole, tmp_path):
    """The others wait for it, and the run's results do not change."""
    out = tmp_path / "run"
    short = {
        **settings,
        "training": {**settings["training"], "max_steps": 2},
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
    }
    running, said = run(2, short, out, wait={1: 60 if ALL else 3})
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    assert rows(out)[1]["train/loss"] == pytest.approx(rows(whole)[1]["train/loss"], abs=1e-6)


# A script that trains on devices of its choice, with the arguments of `ftjax train`.
CHOICE = """import sys
import jax
from ftjax.config.load import load_config
from ftjax.distributed.join import joined
from ftjax.train.run import train
_, _, path, _, coordinator, _, count, _, number = sys.argv
with joined(coordinator, int(count), int(number)):
    train(load_config(path), devices={devices})
"""


def test_devices_of_ones_choice(settings, whole, tmp_path):
    """The second of each process's two; a choice that is not the same on all is refused."""
    out = tmp_path / "run"
    short = {**settings, "training": {**settings["training"], "max_steps": 2}}
    each = CHOICE.format(devices="jax.devices()[1::2]")
    running, said = run(2, short, out, devices=2, code={0: each, 1: each})
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    record = json.loads((out / "run.json").read_text())
    assert record["devices"]["count"] == record["mesh"]["fsdp"] == 2 == len(rows(out))
    assert rows(out)[1]["train/loss"] == pytest.approx(rows(whole)[1]["train/loss"], abs=1e-6)
    own = CHOICE.format(devices="jax.local_devices()")
    running = launch(2, short, tmp_path / "own", devices=2, code={0: own, 1: own})
    for text in end(running, timeout=120):
        assert "the choice of devices differs from that of process 0" in text and "ids of all devices: [0, 1] on" in text


# What hosts may differ in, and what is said of it on all of them. Arguments of the second process; words of the message.
DIFFERENCES = {
    "learning rate": (["optimizer.learning_rate=0.1"], ["optimizer.learning_rate: 0.001 on process 0, 0.1 here"]),
    "prompts": (["evaluate.training_prompts=[abc]"], ["evaluate.training_prompts"]),
    "weights": (["model.path={folder}/model"], ["digest of the model's files"]),
    "adapter": (["method.adapter_path={folder}/adapter"], ["digest of the adapter's files"]),
    "weights of sources": (["data.train=[{{path: {train}, weight: 2.0}}]"], ["data.train: digest"]),
    "fewer rows": (["data.validation={folder}/fewer.jsonl"], ["data.validation: documents: 12 on process 0, 9 here"]),
    "order of the rows": (["data.train={folder}/reversed.jsonl"], ["data.train: digest"]),
    "no data": (["data.train={folder}/nothing.jsonl"], ["nothing.jsonl: no such file"]),
    "a typo": (["training.max_stepz=3"], ["training.max_stepz: unknown key; did you mean max_steps?"]),
    "folder": (["output_dir={folder}/elsewhere"], ["output_dir: ", "is not the folder that process 0 sees"]),
}
# One message names these together; each of the others ends the run by itself.
TOGETHER = ["learning rate", "prompts", "weights", "adapter", "weights of sources", "fewer rows"]
APART = [[name] for name in DIFFERENCES if ALL or name in ("no data", "a typo", "folder")]


@pytest.mark.parametrize("names", [TOGETHER, *APART], ids=lambda names: names[0] if len(names) == 1 else "several")
def test_hosts_that_differ(settings, whole, tmp_path, names):
    """All processes are refused before the first update, with exit code 2 and the differences."""
    lines = Path(settings["data"]["train"]).read_text().splitlines(keepends=True)
    (tmp_path / "reversed.jsonl").write_text("".join(lines[::-1]))
    (tmp_path / "fewer.jsonl").write_text("".join(lines[:9]))
    shutil.copytree(settings["model"]["path"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + np.float32(1e-3)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    shutil.copytree(whole / "final", tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(
        {key: value * np.float32(2) for key, value in weights.items()}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    if "adapter" in names:
        settings = {**settings, "method": {**settings["method"], "adapter_path": str(whole / "final")}}
    arguments = [text for name in names for text in DIFFERENCES[name][0]]
    words = [word for name in names for word in DIFFERENCES[name][1]]
    own = {1: [text.format(folder=tmp_path, train=settings["data"]["train"]) for text in arguments]}
    soon = f"import ftjax.distributed.agree\nftjax.distributed.agree.LOOK = 3.0\n{COMMAND}"  # seconds until a file must be seen
    running = launch(2, settings, tmp_path / "run", own=own, code={1: soon})
    said = end(running, timeout=120)
    assert [process.returncode for process in running] == [2, 2], "\n".join(said)
    for text in said:
        assert "error: process 1 of 2" in text and all(word in text for word in words) and "Traceback" not in text, text
    assert not rows(tmp_path / "run")


def test_other_documents_are_refused(settings, stopped, tmp_path):
    """A checkpoint resumes with its own documents only; the error names those that differ."""
    out, path = tmp_path / "run", tmp_path / "train.jsonl"
    shutil.copytree(stopped[0], out)
    text = (out / "config.yaml").read_text().replace(settings["data"]["train"], str(path))
    (out / "config.yaml").write_text(text)
    changed = {**settings, "data": {**settings["data"], "train": str(path)}}
    shutil.copy(settings["data"]["train"], path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    from ftjax.errors import UserError

    with pytest.raises(UserError) as error:
        whole_run(changed, out, devices=1)
    assert f"data.train: {path}: 299 documents (before: 300)" in str(error.value)
    assert "allow_changed_data" in str(error.value)
    path.write_text("".join([*lines[:-1], json.dumps({"prompt": "abc", "completion": "cba"}) + "\n"]))
    with pytest.raises(UserError, match=r"data.train: .*train\.jsonl"):
        whole_run(changed, out, devices=1)
    path.write_text("".join(lines) + "\n")  # an empty line changes no document
    allowed = {**changed, "training": {**changed["training"], "allow_changed_data": True}}
    first = saved_step(out)
    for data, one in (("".join(lines) + "\n", changed), ("".join(lines[:200]), allowed)):
        path.write_text(data)
        copy = tmp_path / f"copy-{len(data)}"
        shutil.copytree(out, copy)
        whole_run(one, copy, devices=1)
        assert list(rows(copy)) == list(range(1, STEPS + 1)) and first < STEPS


@pytest.mark.sweep  # test_loop.py has a short one
def test_checkpoints_in_a_bucket_that_refuses_now_and_then(settings, whole, tmp_path):
    """Two hosts with separate disks lose nothing if one request of seven is refused. The bucket has `best/` too."""
    with bucket(refuse_every=7) as (variables, refused):
        folders = {i: [f"output_dir={tmp_path / f'disk{i}'}"] for i in range(2)}
        elsewhere = {**settings["training"], "checkpoint_dir": "gs://bucket/run/checkpoints", "eval_steps": 3}
        changed = {**settings, "training": elsewhere}
        out = tmp_path / "disk0"

        def then(running):
            wait_for_step(running, out, 4)
            running[1].send_signal(signal.SIGTERM)

        running, said = run(2, changed, out, then, own=folders, more=variables)
        assert [process.returncode for process in running] == [1, 1], "\n".join(said)
        before = rows(out)
        assert 4 <= max(before) < STEPS and (out / "best").exists() and not (out / "checkpoints").exists()
        best = load_file(out / "best" / "adapter_model.safetensors")
        shutil.rmtree(out)
        running, said = run(2, changed, out, own=folders, more=variables)
        assert [process.returncode for process in running] == [0, 0], "\n".join(said)
        assert f"resuming from step {max(before)} of {STEPS}" in said[0]
        assert len(refused) > 20
    same_losses({**before, **rows(out)}, rows(whole))
    assert len({**before, **rows(out)}) == STEPS
    assert load_file(out / "best" / "adapter_model.safetensors").keys() == best.keys()


def test_a_disk_that_fills_on_one_host(settings, tmp_path):
    """A save that fails on one host ends both with its message; Orbax would have each wait for the other."""
    out = tmp_path / "run"
    often = {**settings, "method": {"name": "full"}, "training": {**settings["training"], "save_steps": 2, "max_steps": 6}}
    code = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (60_000, -1))\n{COMMAND}"
    running = launch(2, often, out, code={1: code})
    said = end(running, timeout=150)
    assert [process.returncode for process in running] == [2, 2], "\n".join(said)
    assert all("error: process 1 of 2" in text and "a checkpoint could not be written" in text for text in said), said


# The last action of the first process, while the others wait for it.
AT_THE_END = {
    "slow": "time.sleep(25); return original(*args, **more)",  # longer than the heartbeat timeout
    "failing": "raise OSError(28, 'No space left on device')",
}


@pytest.mark.parametrize("how", AT_THE_END if ALL else ["failing"])
def test_the_end_of_the_first_process(settings, tmp_path, how):
    """The others wait for the files that it writes last, and fail if it fails."""
    before, last = COMMAND[: COMMAND.index("from ftjax")], COMMAND[COMMAND.index("from ftjax") :]
    code = (
        f"{before}import time\nimport ftjax.train.loop as loop\noriginal = loop.next_commands\n"
        "def last(*args, **more):\n"
        f"    {AT_THE_END[how]}\nloop.next_commands = last\n{last}"
    )
    short = {**settings, "training": {**settings["training"], "max_steps": 2, "save_steps": 2}}
    running = launch(2, short, tmp_path / "run", code={0: code})
    said = end(running, timeout=150)
    ends = [process.returncode for process in running]
    if how == "slow":
        assert ends == [0, 0] and (tmp_path / "run" / "final").is_dir(), said
    else:
        assert 0 not in ends and all("error: process 0 of 2" in text and "No space left" in text for text in said), (ends, said)


def test_the_keyboard_while_others_are_waited_for(settings, tmp_path):
    """Ctrl-C at a process that waits for the first one's last files ends both."""
    before, last = COMMAND[: COMMAND.index("from ftjax")], COMMAND[COMMAND.index("from ftjax") :]
    mark = tmp_path / "mark"
    code = (
        f"{before}import time, pathlib\nimport ftjax.train.loop as loop\n"
        f"def last(*args, **more):\n    pathlib.Path({str(mark)!r}).touch()\n    time.sleep(100)\n"
        f"loop.next_commands = last\n{last}"
    )
    heeding = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{COMMAND}"  # even in a background job
    short = {**settings, "training": {**settings["training"], "max_steps": 2, "save_steps": 2}}
    running = launch(2, short, tmp_path / "run", code={0: code, 1: heeding})
    while not mark.exists() and running[0].poll() is None:
        time.sleep(0.1)
    time.sleep(3)  # the other has finished training
    running[1].send_signal(signal.SIGINT)
    start_of_end = time.monotonic()
    said = end(running, timeout=150)
    assert time.monotonic() - start_of_end < 60 and [process.returncode for process in running] == [130, 130], said
    assert all("stopped by the keyboard" in text for text in said)


def test_hosts_with_unlike_devices(settings, tmp_path):
    """Hosts with different numbers of devices are refused before anything waits for a missing device."""
    running = launch(2, settings, tmp_path / "run", devices=[1, 3])
    said = end(running, timeout=150)
    assert [process.returncode for process in running] == [2, 2], "\n".join(said)
    assert all("error: process 1 of 2" in text and "devices: 1 on process 0, 3 here" in text for text in said), said


# ---- other commands, joined by JAX's environment variables ----


def test_generate_and_evaluate_are_joined(settings, tmp_path, monkeypatch, capsys):
    """They give one answer, one folder and the results of one process; a folder that only one process can write is refused."""
    model, data = settings["model"]["path"], settings["data"]["validation"]
    asked = ["generate", model, "--prompt", "abc", "--max-new-tokens", "6", "--dtype", "float32"]
    generate(model, prompt=["abc"], max_new_tokens=6, dtype="float32")
    answer = capsys.readouterr().out.strip().splitlines()[-1]
    many = end(launch_verb(2, asked, tmp_path))
    assert [answer in text for text in many] == [True, False], (answer, many)
    measured = ["evaluate", model, "--data", data, "--task", "loss", "evaluate.batch_size=4", "model.dtype=float32"]
    monkeypatch.chdir(tmp_path)
    evaluate(model, ["evaluate.batch_size=4", "model.dtype=float32"], data=data, task="loss")
    (path,) = tmp_path.glob("evaluation/*/results.json")
    want = json.loads(path.read_text())["metrics"]
    shutil.rmtree(tmp_path / "evaluation")
    running = launch_verb(2, measured, tmp_path)
    said = end(running)
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    got = json.loads(path.read_text())["metrics"]
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name]["value"] == pytest.approx(value["value"], rel=1e-6), name
    assert not [line for line in said[1].splitlines() if "written" in line]
    shutil.copytree(model, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + np.float32(1e-3)
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for verb, more, words in ((asked, ["--temperature", "1"], ["what is asked", "options: "]), (measured, [], [])):
        other = [text.replace(model, str(tmp_path / "other")) for text in verb]
        running = launch_verb(2, verb, tmp_path, instead={1: [*other, *more]})
        said = end(running)
        assert [process.returncode for process in running] == [2, 2]
        words = [*words, "differs from that of process 0", "digest of the model's files"]
        assert all(word in text for text in said for word in words), said


def test_verbs_of_one_process(tmp_path):
    """Commands such as `export` run on the first process, and the others say so."""
    variables = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    process = start(["export", str(tmp_path), "--out", str(tmp_path / "out")], env=environment(1, **variables))
    (said,) = end([process])
    assert process.returncode == 2 and "ftjax export is the work of one process" in said and "process 1 of several" in said, (
        said
    )
    running = start(["train", str(tmp_path)], env=environment(1, JAX_COORDINATOR_ADDRESS="127.0.0.1:1"))
    (said,) = end([running])
    assert running.returncode == 2 and "missing: JAX_NUM_PROCESSES, JAX_PROCESS_ID" in said, said
