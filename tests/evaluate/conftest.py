"""Fixtures for the tests of evaluation: a tiny model, data and a trained run."""

import json
import shutil

import pytest
import yaml
from oracle import ONE, Case, make_hf
from tiny_tokenizer import save_tokenizer

from ftjax.config import Config
from ftjax.train.run import train

WORDS = ["abc", "bad", "cab", "dab", "fed", "ace", "beef", "cafe", "deaf", "face", "fade", "bead"]


@pytest.fixture
def written(tmp_path):
    """Return `written("a.jsonl", {...}, {...})`, which writes a file with these rows and returns its path."""

    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the folder of a random Llama with two layers whose tokens are characters."""
    folder = tmp_path_factory.mktemp("tiny")
    make_hf(Case("llama", "llama"), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """Write words, and whether they begin with one of the first three letters."""
    path = tmp_path_factory.mktemp("rows") / "words.jsonl"
    rows = [{"prompt": f"{word}:", "completion": "yes" if word[0] in "abc" else "no"} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def run(tiny, rows_file, tmp_path_factory):
    """A LoRA run that has learned the words."""
    folder = tmp_path_factory.mktemp("runs") / "words"
    config = Config.model_validate({
        "model": {"path": str(tiny), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "method": {"name": "lora", "r": 8, "lora_alpha": 16},
        "data": {"train": str(rows_file), "validation": str(rows_file), "max_length": 32, "contamination": "ignore"},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"max_steps": 80, "global_batch_size": 4, "eval_steps": 40, "report_to": [], "logging_steps": 20},
        "output_dir": str(folder),
    })  # fmt: skip
    train(config, devices=ONE)
    return folder


@pytest.fixture
def changed(run, tmp_path):
    """Return `changed(section={...})`, which copies the run and changes settings in its config.yaml."""

    def change(**sections):
        folder = tmp_path / "changed"
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        for name, values in sections.items():
            config[name] |= values
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": str(folder)}))
        return folder

    return change
