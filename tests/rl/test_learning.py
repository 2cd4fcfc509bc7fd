"""A tiny model learns a task from rewards alone."""

import json
import time

import numpy as np
import pytest
from oracle import ONE, Case, make_hf
from tiny_tokenizer import save_tokenizer
from whole_runs import rows

from ftjax.config import Config
from ftjax.rl.learn import Learning
from ftjax.train.run import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_hf(Case("llama", "llama", {"initializer_range": 0.05}), folder)
    save_tokenizer(folder)
    return folder


def test_it_learns(model, tmp_path):
    prompts = [{"prompt": c} for c in "abcdefgh"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "reward.py").write_text(
        "def echo(prompts, completions, **kwargs):\n"
        "    return [float(text[:1] == prompt) for prompt, text in zip(prompts, completions)]\n"
    )
    config = Config.model_validate({
        "model": {"path": str(model), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "method": {"name": "full"},
        "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 32},
        "objective": {"name": "grpo", "rewards": [str(tmp_path / "reward.py")], "max_completion_length": 2, "num_generations": 16},
        "optimizer": {"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
        "training": {"max_steps": 60, "global_batch_size": 128, "logging_steps": 5, "report_to": []},
        "mesh": {"fsdp": 1},
        "output_dir": str(tmp_path / "run"),
    })
    learning = Learning(config)
    train(config, devices=ONE, make_observer=learning.make_observer, make_source=learning.make_source)
    print([(r["step"], round(r["train/reward"],3), r["train/time/rollout"]) for r in rows(tmp_path/"run") if "train/reward" in r])
    print(rows(tmp_path/"run")[-2:])
    assert 0
