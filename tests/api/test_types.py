"""Checks the types of the Python API with pyright: its own files, and a caller's."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CALLER = """
from typing import assert_type

import numpy as np

import ftjax

rows = [{"prompt": "a", "completion": "b"}]
run = ftjax.train("run.yaml", data__train=rows, learning_rate=1e-4, on_log=lambda row: print(row["step"]))
assert_type(run, ftjax.Run)
assert_type(run.metrics["train/loss"], np.ndarray)
model = run.model(dtype="float32")
assert_type(model, ftjax.Model)
assert_type(model.generate("a", temperature=0.7), str)
assert_type(model.generate([{"role": "user", "content": "a"}]), str)
assert_type(model.generate(["a", "b"]), list[str])
assert_type(model.score("a", "b").total, float)
assert_type(model.chat(system="x").say("a"), str)
assert_type(model.embed("a"), np.ndarray)
ftjax.evaluate(run, rows, task="loss")["rows"]
assert_type(ftjax.plan({"model": {}}, "v5e-8").fits, bool | None)
ftjax.export(run, "merged", merge=True).name
assert_type(ftjax.tune("run.yaml", {"method.r": [8, 16]}, trials=3).best, ftjax.Run)
try:
    ftjax.check(run, limit=3)
except ftjax.UserError:
    pass
model.generate("a", max_token=3)  # pyright: ignore[reportCallIssue]
ftjax.load(3)  # pyright: ignore[reportArgumentType]
ftjax.export(run, "file", gguf="q9")  # pyright: ignore[reportArgumentType]
"""


def test_pyright_finds_nothing(tmp_path):
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed (extra: types)")
    caller = tmp_path / "caller.py"
    caller.write_text(CALLER)
    own = [ROOT / "ftjax" / "__init__.py", *sorted((ROOT / "ftjax" / "api").glob("*.py")), ROOT / "ftjax" / "tune" / "tune.py"]
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, [*own, caller])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # with [tool.pyright] of pyproject.toml
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["summary"]["filesAnalyzed"] == len(own) + 1
    told = [f"{one['file']}:{one['range']['start']['line'] + 1}: {one['message']}" for one in found["generalDiagnostics"]]
    assert told == []
