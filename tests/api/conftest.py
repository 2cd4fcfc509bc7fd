"""A folder with a tiny model, data and a finished run, in which the tests of the Python API work, on one device as most users
have it."""

import json
import shutil

import jax
import pytest
from oracle import ONE, Case, make_hf
from tiny_settings import ROWS, SETTINGS
from tiny_tokenizer import save_tokenizer

import ftjax


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
