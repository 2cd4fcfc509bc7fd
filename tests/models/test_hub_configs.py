"""Tests config.json files of well-known checkpoints as published: they are accepted, and give the real model's size."""

import pytest
import torch
from oracle import auto_class
from published import COUNTED, FURTHER, PUBLISHED
from transformers import AutoConfig

from ftjax.models.facts import complete_config
from ftjax.models.model import build_module
from ftjax.models.nn.param import specs

CONFIGS = PUBLISHED | FURTHER


def weights(name: str) -> int:
    """Return the number of weights of the model that is trained, and of no other part of the checkpoint."""
    root = build_module(complete_config(CONFIGS[name], name))
    return sum(spec.size for spec in specs(root).values())


@pytest.mark.parametrize("name", COUNTED)
def test_the_weights_of_the_published_files(name):
    counted = COUNTED[name]
    assert (weights(name) if isinstance(counted, int) else float(f"{weights(name):.3g}")) == counted


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_of_transformers_model(name):
    """Parameters and buffers that are saved, of the text model and its output alone."""
    config = AutoConfig.for_model(**CONFIGS[name])
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    parts = [model.get_decoder(), model.get_output_embeddings()]
    saved = {id(value): value.numel() for part in parts for value in part.state_dict(keep_vars=True).values()}
    assert weights(name) == sum(saved.values())


@pytest.mark.parametrize("name", ["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Qwen/Qwen3.5-27B"])
def test_every_field_has_its_effect(name):
    assert build_module(complete_config(CONFIGS[name], name)).notes == ()
