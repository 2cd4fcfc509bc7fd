"""Tests config.json files of well-known checkpoints as published: they are accepted, and give the real model's size."""

import pytest
from published import FURTHER, NEMOTRON3, PUBLISHED, QWEN3_5

from ftjax.models.facts import complete_config
from ftjax.models.model import build_module
from ftjax.models.nn.param import specs


def test_published_config_of_nemotron_3():
    """nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16: 23 layers of Mamba-2, 23 with 128 experts, and 6 of attention."""
    root = build_module(complete_config(NEMOTRON3, "Nemotron-3-Nano"))
    embed, heads, channels = 2688, 64, 64 * 64 + 2 * 8 * 128
    mamba = embed * (64 * 64 + channels + heads) + 5 * channels + 3 * heads + 64 * 64 * (1 + embed)
    experts = 128 * (embed + 1) + 2 * embed * (128 * 1856 + 3712)
    attention = embed * 2 * (32 + 2) * 128
    layers = 23 * (mamba + experts) + 6 * attention + 52 * embed
    assert sum(spec.size for spec in specs(root).values()) == 2 * 131072 * embed + embed + layers
    assert root.notes == ()


def test_published_config_of_a_composite():
    """Qwen/Qwen3.5-27B: all fields beside those that transformers knows are read; two tables of 5120 by 248320, 64 layers."""
    root = build_module(complete_config(QWEN3_5, "Qwen3.5-27B"))
    mlp, norms = 3 * 17408, 2
    attention = 2 * 24 * 256 + 2 * 4 * 256 + 24 * 256
    channels = 2 * 16 * 128 + 48 * 128
    linear = channels + 2 * 48 * 128 + 2 * 48
    layers = 64 * (mlp + norms) + 16 * attention + 48 * linear
    vectors = 16 * 2 * 256 + 48 * (4 * channels + 2 * 48 + 128)
    assert sum(spec.size for spec in specs(root).values()) == 5120 * (2 * 248320 + 1 + layers) + vectors
    assert root.notes == ()


@pytest.mark.parametrize("name", [*PUBLISHED, *FURTHER])
def test_published_config(name):
    size, config = {**PUBLISHED, **FURTHER}[name]
    root = build_module(complete_config(config, name))
    assert sum(spec.size for spec in specs(root).values()) == size
