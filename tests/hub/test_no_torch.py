"""Tests that models and tokenizers are read without PyTorch."""

import os
import shutil
import subprocess
import sys

from gguf_writing import hub_folder, sentencepiece_keys, write_llama

from ftjax.hub.no_torch import names_python_file

CODE = """
import sys
sys.modules["torch"] = None  # as where it is not installed
from pathlib import Path
from ftjax.config import ModelConfig
from ftjax.hub.fetch import resolve_model
from ftjax.hub.load import open_model
from ftjax.hub.tokenizer.load import load_tokenizer
for path in sys.argv[1:]:
    tokenizer = load_tokenizer(ModelConfig(path=path))
    print(*tokenizer("the cat").input_ids)
    if not path.endswith("spm"):
        config, source = open_model(resolve_model(path))
        print(config["num_hidden_layers"], float(source.read("model.norm.weight").sum()))
assert not [name for name in sys.modules if name.startswith("torch.")]
"""


STARTED = """
import sys
from ftjax.hub.no_torch import start_transformers
start_transformers()
assert "torch" not in sys.modules  # it is not there yet, and can be imported
from transformers import CONFIG_MAPPING, AutoTokenizer
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.models.facts import complete_config
complete_config({"model_type": "qwen3"}, "x")
from pathlib import Path
from ftjax.train.track import Tracker
Tracker(Path(sys.argv[1]), ["tensorboard"], {}, active=True).log(1, {"train/loss": 2.0})
assert not [name for name in sys.modules if name.split(".")[0] == "torch"]
import torch
print(torch.zeros(1).item())
"""


def test_a_command_starts_without_torch(tmp_path):
    """Where it is installed too."""
    done = subprocess.run(
        [sys.executable, "-c", STARTED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0 and done.stdout == "0.0\n", done.stderr
    assert "not found" not in done.stderr


def test_python_files_of_the_user_may_need_torch():
    assert names_python_file({"objective": {"rewards": ["length", "mine.py:reward"]}})
    assert not names_python_file({"objective": {"rewards": ["length"]}, "model": {"path": "some/model"}, "steps": 3})


def test_a_folder_a_gguf_file_and_a_sentencepiece_model(untrained, tmp_path):
    config, tensors = hub_folder(untrained)
    keys = sentencepiece_keys(untrained / "tokenizer.model", bos=1, eos=2, unknown=0)
    gguf = write_llama(tmp_path / "model.gguf", config, tensors, tokenizer=keys)
    (tmp_path / "spm").mkdir()
    shutil.copyfile(untrained / "tokenizer.model", tmp_path / "spm" / "tokenizer.model")
    paths = [str(untrained), str(gguf), str(tmp_path / "spm")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", CODE, *paths], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    folder, weights, *others = done.stdout.splitlines()
    assert others == [folder, weights, folder]
    assert weights.startswith(f"{config['num_hidden_layers']} ")
