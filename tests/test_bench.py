"""Runs each benchmark on the smallest model: both sides do the same work, and the printed figures are the measured ones.

Only figures that do not depend on the machine are asserted.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Case, hf_config, make_hf
from quick_compile import QUICK
from tiny_tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"
SMALL = ("--length", 16, "--steps", 3, "--r", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_hf(Case("tiny", "llama"), folder)
    save_tokenizer(folder, chat=True)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text(f"{json.dumps({'prompt': 'Say it twice: hello', 'completion': 'hello hello'})}\n" * 40)
    return file


def run(name: str, out: Path, *options) -> Any:
    command = [sys.executable, str(BENCH / f"{name}.py"), *map(str, options), "--json", str(out)]
    environment = {**os.environ, "XLA_FLAGS": QUICK}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.sweep
def test_step(model, tmp_path):
    sides = run("step", tmp_path / "step.json", "--model", model, "--method", "full", *SMALL)["full"]
    mine, peer = sides["ftjax"], sides["PEFT"]
    assert peer["loss_difference"] < 1e-4 and len(mine["loss"]) == len(peer["loss"]) == 3
    assert peer["trained"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert peer["ratio"] == pytest.approx(mine["tokens_per_second"] / peer["tokens_per_second"])
    assert mine["tokens_per_second"] == pytest.approx(2 * 16 / statistics.median(mine["seconds"][1:]))
    assert 0 < mine["share"] < 1 and mine["peak_bytes"] > 0 < peer["peak_bytes"]


@pytest.mark.sweep
def test_step_on_random_weights_and_quantised(tmp_path):
    """A config.json is enough, as on a GPU without downloads. Rows of 64 are one block of nf4, as in bitsandbytes."""
    folder = tmp_path / "model"
    folder.mkdir()
    hf_config(Case("tiny", "llama", {"hidden_size": 64, "intermediate_size": 128})).save_pretrained(folder)
    found = run("step", tmp_path / "step.json", "--model", folder, "--method", "qlora", *SMALL)
    assert found["qlora"]["PEFT"]["loss_difference"] < 1e-4


@pytest.mark.sweep
def test_the_peer_does_the_work_of_the_reference(shared, model, tmp_path):
    options = ("--model", model, "--peer", shared / "bench" / "peft_reference.py", *SMALL)
    assert run("step", tmp_path / "step.json", *options)["lora"]["PEFT"]["loss_difference"] < 1e-4


@pytest.mark.sweep
def test_generate(model, tmp_path):
    found = run("generate", tmp_path / "generate.json", "--model", model, "--rows", 2, "--prompt", 8, "--new", 4, "--times", 1)
    assert found["same"] == 1  # greedy: the answers are transformers' own
    assert all(found[side][part] > 0 for side in ("ftjax", "transformers") for part in ("prefill", "decode"))


@pytest.mark.sweep
def test_end_to_end(model, tmp_path):
    row = {"instruction": "Say it twice.", "input": "hello", "output": "hello hello"}
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    options = ("--data", tmp_path, "--updates", 2, "--length", 64, "--r", 2, "--validation", 2)
    found = run("end_to_end", tmp_path / "end.json", "--model", model, *options)
    # Two rows of 64 tokens hold one document each: 11 letters of the answer and its end.
    assert found["ftjax"]["trained"] == found["TRL"]["trained"] == 2 * 2 * 12
    assert abs(found["ftjax"]["validation_loss"] / found["TRL"]["validation_loss"] - 1) < 0.02


@pytest.mark.sweep
def test_preference(model, tmp_path):
    pairs = [{"prompt": f"{n} ab", "chosen": f" {'cd' * n}", "rejected": " fe"} for n in range(1, 9)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = ("--data", data, "--pairs", 4, "--updates", 2, "--length", 64, "--r", 2)
    found = run("preference", tmp_path / "preference.json", "--model", model, *options)
    np.testing.assert_allclose(found["ftjax"]["loss"], found["TRL"]["loss"], rtol=1e-4)
    assert found["speed"] > 0 and found["memory"] > 0 and found["ftjax"]["loss"][1] != found["ftjax"]["loss"][0]


@pytest.mark.sweep
def test_data(model, rows, tmp_path):
    options = ("--model", model, "--train", rows, "--max-length", 64, "--times", 1, "--target-tokens", 4000, "--batch", 2)
    found = run("data", tmp_path / "data.json", *options)
    assert found["tokens"] < found["packed_tokens"] and all(value > 0 for value in found.values())


@pytest.mark.sweep
def test_load(model, tmp_path):
    found = run("load", tmp_path / "load.json", "--model", model, "--times", 1)
    assert found["bytes"] == sum(p.numel() * 4 for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert set(found["seconds"]) == set(found["cpu_seconds"]) == set(found["peak_bytes"]) == {"plain", "load", "write"}
    assert found["peak_bytes"]["load"] > 0


@pytest.mark.sweep
def test_startup(model, tmp_path):
    found = run("startup", tmp_path / "startup.json", "--model", model, "--times", 1, "--length", 64)
    assert found["help"] < found["first"]


@pytest.mark.sweep
def test_methods(model, tmp_path):
    lora, full, again = run("methods", tmp_path / "methods.json", model, "--length", 16, "--steps", 1, "--only", "full")
    assert lora["trained"] < full["trained"] and lora["bytes"] < full["bytes"]
    assert (full["share"], again["trained"]) == (1, lora["trained"])


@pytest.mark.sweep
def test_quantized(model, rows, tmp_path):
    exact, int8, nf4 = run("quantized", tmp_path / "quantized.json", model, rows, "--steps", 2, "--length", 64)
    assert int8["weight_error"] < nf4["weight_error"] and int8["logit_error"] < nf4["logit_error"]
    assert abs(int8["loss_before"] / exact["loss_before"] - 1) < 0.05


@pytest.mark.sweep
def test_rewards(model, tmp_path):
    options = ("--prompts", 2, "--answers", 2, "--tokens", 4, "--updates", 3, "--length", 64, "--r", 2, "--trl-batch", 4)
    found = run("rewards", tmp_path / "rewards.json", "--model", model, *options)
    mine, theirs = found["ftjax"], found["TRL"]
    assert found["speed"] == pytest.approx(mine["tokens_per_second"] / theirs["tokens_per_second"])
    for side in (mine, theirs):
        assert len(side["seconds"]) == len(side["tokens"]) == 2 and all(4 <= count <= 16 for count in side["tokens"])
        for at, whole in enumerate(side["seconds"]):
            assert sum(side[phase][at] for phase in ("rollout", "reward", "update")) == pytest.approx(whole)
    assert mine["gap"] < 1e-5


@pytest.mark.sweep
def test_serve(model, tmp_path):
    options = ("--requests", 4, "--rows", 4, "--shortest", 4, "--longest", 8, "--new", 4, "--times", 1, "--adapters", 2)
    sides = run("serve", tmp_path / "serve.json", "--model", model, *options)
    assert list(sides) == ["ftjax", "one adapter", "adapters", "transformers"] and sides["transformers"]["same"] == 1
    assert all(found["speed"] > 0 and 0 < found["p50"] <= found["p99"] for found in sides.values())


@pytest.mark.sweep
def test_decode(model, tmp_path):
    found = run("decode", tmp_path / "decode.json", "--model", model, "--rows", 1, 2, "--context", 4, "--new", 4)
    assert found["weights"] == sum(p.numel() * 4 for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert set(found["seconds"]) == {"1", "2"} and found["copied"] > 0
