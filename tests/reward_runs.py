"""Tiny runs that learn from rewards."""

import json
from pathlib import Path

from oracle import ONE
from whole_runs import rows

from ftjax.config import Config
from ftjax.rl.learn import Learning
from ftjax.train.run import train

# `echo`: 1 for an answer that begins with its prompt, a letter; `early`: how much of it are letters up to m.
ECHO = """
def early(completions, **columns):
    return [sum(c in "abcdefghijklm" for c in text) / 4 for text in completions]


def echo(prompts, completions, **columns):
    return [float(text[:1] == prompt) for prompt, text in zip(prompts, completions)]
"""
TIMES = ("time/", "second", "memory")


def write_prompts(folder: Path) -> None:
    """Write eight prompts of one letter, and the reward."""
    lines = [json.dumps({"prompt": letter, "answer": letter}) for letter in "abcdefgh"]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "echo.py").write_text(ECHO)


def early(folder: Path) -> list[str]:
    """Return a reward that differs between the first answers of an untrained model."""
    return [f"{folder / 'echo.py'}:early"]


def make_config(model: Path, folder: Path, out: Path, objective: dict | None = None, **training) -> Config:
    return Config.model_validate(settings(model, folder, out, objective, **training))


def settings(model: Path, folder: Path, out: Path, objective: dict | None = None, **training) -> dict:
    data, method = training.pop("data", {}), training.pop("method", {"name": "lora", "r": 4, "lora_alpha": 8})
    own = {"name": "grpo", "rewards": [f"{folder / 'echo.py'}:echo"], "num_generations": 4, "max_completion_length": 4}
    return {
        "model": {"path": str(model), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "method": method,
        "data": {"train": str(folder / "prompts.jsonl"), "max_length": 16, **data},
        "objective": {**own, **(objective or {})},
        "optimizer": {"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
        "training": {"max_steps": 6, "global_batch_size": 16, "logging_steps": 1, "report_to": [], **training},
        "evaluate": {"training_examples": 0},
        "mesh": {"fsdp": 1},
        "output_dir": str(out),
    }  # fmt: skip


def run(config: Config, devices=ONE, **options) -> None:
    learning = Learning(config, **options)
    train(config, devices=devices, make_observer=learning.make_observer, make_source=learning.make_source)


def logged(folder: Path) -> list[dict]:
    """Return all that a run has logged, but times."""
    return [{key: value for key, value in row.items() if not any(one in key for one in TIMES)} for row in rows(folder)]
