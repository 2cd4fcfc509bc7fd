"""The benchmarks, each on the smallest model: that both sides do the same work, and that what is printed is what was measured.

No figure is asserted but those that do not depend on the machine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import Case, make_hf
from quick_compile import QUICK
from tiny_tokenizer import save_tokenizer

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"
PEER = BENCH.parents[2] / "shared" / "bench" / "peft_reference.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_hf(Case("tiny", "llama"), folder)
    save_tokenizer(folder, chat=True)
    return folder


def run(name: str, out: Path, *options) -> dict:
    command = [sys.executable, str(BENCH / f"{name}.py"), *map(str, options), "--json", str(out)]
    environment = {**os.environ, "XLA_FLAGS": QUICK}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.skipif(not PEER.exists(), reason="the peer's script is not here")
def test_step(model, tmp_path):
    found = run("step", tmp_path / "step.json", "--model", model, "--length", 16, "--steps", 3, "--r", 2)
    assert found["loss_difference"] < 1e-3 and len(found["ftjax"]["loss"]) == len(found["peft"]["loss"]) == 3
    assert found["ratio"] == pytest.approx(found["ftjax"]["tokens_per_second"] / found["peft"]["tokens_per_second"])


def test_generate(model, tmp_path):
    found = run("generate", tmp_path / "generate.json", "--model", model, "--rows", 2, "--prompt", 8, "--new", 4, "--times", 1)
    assert found["same"] == 1  # greedy: the answers are transformers' own
    assert all(found[side][part] > 0 for side in ("ftjax", "transformers") for part in ("prefill", "decode"))


def test_end_to_end(model, tmp_path):
    row = {"instruction": "Say it twice.", "input": "hello", "output": "hello hello"}
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    options = ("--data", tmp_path, "--updates", 2, "--length", 64, "--r", 2, "--validation", 2)
    found = run("end_to_end", tmp_path / "end.json", "--model", model, *options)
    # Two rows of 64 tokens hold one document each: 11 letters of the answer and its end.
    assert found["ftjax"]["trained"] == found["TRL"]["trained"] == 2 * 2 * 12
    assert abs(found["ftjax"]["validation_loss"] / found["TRL"]["validation_loss"] - 1) < 0.02
