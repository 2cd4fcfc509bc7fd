"""Configures a tiny run, and compares the results of such runs."""

import json

from safetensors.numpy import load_file

from ftjax.config import Config


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
    """Assert that two adapters are equal bit for bit."""
    want, got = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (one, other))
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].tobytes() == got[name].tobytes(), name
