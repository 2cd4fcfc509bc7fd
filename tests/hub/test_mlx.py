"""Tests with mlx-lm that it loads merged folders and gives the tokens that ftjax gives. `make test-all` only: pip makes an
environment, with MLX's wheel for CPUs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_cases import WRITTEN, make_base
from oracle import load, logits, write_merged

from ftjax.config import FullConfig, ModelConfig
from ftjax.hub.tokenizer.files import write_tokenizer
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.written import MLX

pytestmark = pytest.mark.sweep  # makes an environment with pip
HERE = Path(__file__).parent
PACKAGES = ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")
TEXTS = ["once upon a time there was", "a little girl once\n\n upon 1234 times"]
COUNT = 16
# Values that all published models of a family have, and mlx-lm takes for granted.
PUBLISHED = {
    "gpt2": {"n_ctx": 64}, "gpt-neox": {"intermediate_size": 128}, "mixtral-window": {"head_dim": 8},
    "granite-tied-biases": {"head_dim": 8},
}  # fmt: skip
# What mlx-lm 0.32.2 cannot load, or computes in another way than transformers.
OTHERWISE = {
    "gemma2": "instead of",  # without windows
    "mixtral-window": "instead of",  # without Llama 3's RoPE
    "gpt2": "parameters not in model",  # under the names of the model without a head only
    "gpt-oss": "parameters not in model",  # in MXFP4 only
    "gpt-oss-plain": "parameters not in model",
    "ministral": "Model type ministral not supported",
    "gpt-neox-serial": "Missing 1 parameters",  # its output is never tied
    "phi3-whole-heads": "instead of",  # LongRoPE with the usual attention factor only
}
# Families that were compared, those of `MLX` and others that mlx-lm has in another way.
COMPARED = {name: case for name, case in WRITTEN.items() if case.model_type in {*MLX, "ministral", "gpt2", "gpt_oss", "gemma2"}}


@pytest.fixture(scope="session")
def mlx() -> Path:
    """Return the Python of an environment with mlx-lm: FTJAX_MLX_PYTHON, or one that is kept between runs."""
    if given := os.environ.get("FTJAX_MLX_PYTHON"):
        return Path(given)
    place = HERE.parents[1] / ".cache" / "mlx"
    complete = place / ".complete"
    if not complete.exists() or complete.read_text() != " ".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        done = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {PACKAGES[0]} here: {done.stderr.strip().splitlines()[-1]}")
        complete.write_text(" ".join(PACKAGES))
    return place / "bin" / "python"


def test_mlx_continues_texts_as_ftjax_does(mlx, tmp_path):
    asked, models = [], {}
    for name, case in COMPARED.items():
        case = replace(case, values={**case.values, **PUBLISHED.get(name, {})})
        base, written = make_base(case, tmp_path / name), tmp_path / f"{name}-written"
        models[name], settings = load(base), ModelConfig(path=str(base))
        written.mkdir()
        write_merged(written, *models[name], FullConfig(), base)
        write_tokenizer(written, load_tokenizer(settings), settings, base)
        ids = [load_tokenizer(settings)(text).input_ids for text in TEXTS]
        asked.append({"folder": str(written), "ids": ids, "count": COUNT})
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [mlx, HERE / "mlx_tokens.py", tmp_path / "asked.json", tmp_path / "answers.json"]
    # On CPUs, MLX would compile with a C++ compiler, which need not be there.
    environment = {"HF_HUB_OFFLINE": "1", "MLX_DISABLE_COMPILE": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    different = {}
    for name, one, answer in zip(COMPARED, asked, json.loads((tmp_path / "answers.json").read_text()), strict=True):
        if "error" in answer:
            different[name] = answer["error"]
            continue
        for ids, found in zip(one["ids"], answer["next"], strict=True):
            whole = np.array([[*ids, *found]], np.int32)
            best = logits(*models[name], whole[:, :-1])[0].argmax(-1)[len(ids) - 1 :].tolist()
            if best != found:
                different[name] = f"{found} instead of {best}"
    assert different.keys() == OTHERWISE.keys(), "\n".join(f"{name}: {reason}" for name, reason in different.items())
    assert {name: reason for name, reason in different.items() if OTHERWISE[name] not in reason} == {}
