"""A tiny model, its prompts and its reward."""

import pytest
from oracle import Case, make_hf
from reward_runs import write_prompts
from tiny_tokenizer import save_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_hf(Case("llama", "llama", {"initializer_range": 0.05}), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_prompts(folder)
    return folder
