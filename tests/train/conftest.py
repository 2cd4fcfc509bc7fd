"""Fixtures for whole runs: a tiny model and its data."""

import json

import numpy as np
import pytest
from oracle import Case, make_hf
from tiny_tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_hf(Case("llama", "llama", {"initializer_range": 0.05}), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", 90), ("validation", 12)):
        words = ["".join(rng.choice(list("abcdef"), rng.integers(2, 12))) for _ in range(count)]
        rows = [json.dumps({"prompt": word, "completion": word[::-1]}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder
