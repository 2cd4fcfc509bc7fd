"""A folder with a tiny model, data and a finished run, in which the tests of the Python API work, on one device as most users
have it."""

import json
import shutil

import jax
import pytest
from oracle import ONE, Case, make_hf
from tiny_tokenizer import save_tokenizer

import ftjax

ROWS = [{"prompt": f"Tom has {n} ", "completion": "dogs" * (n % 3 + 1)} for n in range(12)]
SETTINGS = {
    "model": {"path": "model", "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
    "method": {"name": "lora", "r": 4, "lora_alpha": 8},
    "data": {"train": "train.jsonl", "max_length": 64},
    "optimizer": {"learning_rate": 1e-2},
    "training": {"max_steps": 4, "global_batch_size": 4, "logging_steps": 1, "report_to": []},
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    make_hf(Case("llama", "llama", {"max_position_embeddings": 256, "initializer_range": 0.05}), folder / "model")
    save_tokenizer(folder / "model", chat=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ftjax.train(SETTINGS, output_dir="runs/first", devices=ONE, quiet=True)
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """A copy of the folder, as the working directory."""
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
