"""Tests that config.json also has the fields of transformers 4, with the values of published folders."""

import json
from pathlib import Path

import pytest
from cases import CASES, LLAMA3_ROPE
from oracle import Case, hf_config

from ftjax.hub.model_folder import write_config
from ftjax.models.facts import complete_config
from ftjax.models.model import build_module

SCALING = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NONE = {"rope_theta": 10000.0, "rope_scaling": None}
WANT = {
    "bamba": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
    "granitemoehybrid": {**NONE, "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"]},
    "nemotron-h": {"hybrid_override_pattern": "ME*-ME", "num_hidden_layers": 6, "layers_block_type": "absent"},
    "falcon-h1": NONE,
    "lfm2-moe": {"rope_theta": 1e6, "rope_scaling": None},
    "olmo-hybrid": {},
    "llama": NONE,
    "llama3.1": {"rope_theta": 10000.0, "rope_scaling": SCALING},
    "llama-linear": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-dynamic": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama-yarn": {"rope_theta": 500.0, "rope_scaling": {**YARN, "beta_fast": 16.0}},
    "gemma": NONE,
    "gemma2": NONE,
    "gemma3": {
        "rope_theta": 1000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    },
    "gemma3-ropes": {"rope_theta": 500.0, "rope_local_base_freq": 300.0, "rope_scaling": YARN},
    "gemma4": {"rope_theta": "absent", "rope_scaling": "absent"},  # transformers 4 does not have it
    "gemma4-images-and-sound": {"text_config": {"rope_theta": "absent", "rope_scaling": "absent"}},
    "gemma4-unified": {"rope_theta": "absent", "rope_scaling": "absent"},
    "gemma4-unified-images": {"text_config": {"rope_theta": "absent", "rope_scaling": "absent"}},
    "mixtral": {"rope_theta": 1e6, "rope_scaling": None, "num_local_experts": 4},
    "qwen3-moe": {**NONE, "num_experts": 6},
    "deepseek-v3": {
        "rope_theta": 500.0, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}, "n_routed_experts": 8,
    },
    "deepseek-v2": {
        "rope_theta": 500.0, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}, "n_routed_experts": 8,
    },
    "glm4-moe-lite": {"rope_theta": 10000.0, "rope_scaling": SCALING, "n_routed_experts": 8},
    "glm4": {**NONE, "partial_rotary_factor": 0.5},
    "glm4-moe": {**NONE, "partial_rotary_factor": 0.5, "n_routed_experts": 8},
    "olmoe": {**NONE, "num_experts": 6},
    "gpt-oss": {"rope_theta": 500.0, "rope_scaling": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
    "gpt-oss-plain": {"rope_theta": 500.0, "rope_scaling": None},  # without the field, transformers 4 uses the published YaRN
    "llama4": {"rope_theta": 500.0, "rope_scaling": YARN, "num_local_experts": 4},
    "llama4-images": {"text_config": {"rope_theta": 500000.0, "rope_scaling": None, "tie_word_embeddings": False}},
    "mistral": NONE,
    "ministral": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": {"rope_theta": 500.0, "rope_scaling": {**YARN, "truncate": False}},
    "qwen3-tied": {"rope_theta": 10000.0, "rope_scaling": SCALING},
    "qwen3.5": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_scaling": {
        "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    }},
    "gemma3-images": {"text_config": {
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None, "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    }},
    "ministral3": {
        "rope_theta": 500.0, "rope_scaling": {
            **YARN, "original_max_position_embeddings": 8, "beta_fast": 16.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7,
        },
    },
    "mistral3": {"text_config": {"rope_theta": 500.0, "rope_scaling": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 6, "llama_4_scaling_beta": 0.4,
    }}},
    "mistral3-mistral": {"text_config": {**NONE, "torch_dtype": "bfloat16", "tie_word_embeddings": True}},
    "qwen3-vl": {"text_config": {"rope_theta": 500.0, "rope_scaling": {
        "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    }}},
    "lfm2": {"rope_theta": 1e6, "rope_scaling": None},
    "qwen3.5-images": {"text_config": {
        "rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 0, 0]},
    }},
    "qwen3.5-moe": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_scaling": None, "num_experts": 4},
    "qwen3.5-moe-images": {"text_config": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_scaling": None}},
    "qwen3-next": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_scaling": None, "num_experts": 4},
    "gpt2": {},
    "gpt-neox": {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": None},
    "gpt-neox-serial": {
        "rotary_pct": 1.0, "rotary_emb_base": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "phi3": {
        "rope_theta": 500.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]},
    },
    "phimoe": {
        "rope_theta": 500.0, "num_local_experts": 4, "original_max_position_embeddings": 16, "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0, 1.5, 1.2, 1.3], "long_factor": [2.0, 4.0, 3.0, 3.5],
            "short_mscale": 1.2, "long_mscale": 0.8, "original_max_position_embeddings": 16,
        },
    },
    "olmo2": NONE,
    "olmo3": {"rope_theta": 500.0, "rope_scaling": YARN},
    "smollm3": {"rope_theta": 10000.0, "rope_scaling": SCALING},
    "granite": NONE,
    "granitemoe": {**NONE, "num_local_experts": 6},
}  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
LINEAR_OLMO = Case("olmo2-linear", "olmo2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4}})
LONG_LLAMA = Case("llama-longrope", "llama", {"rope_parameters": {
    "rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}})  # fmt: skip


def written(case: Case, folder: Path) -> tuple[dict, dict, dict]:
    """Return `(config completed by transformers 5, config.json as ftjax writes it, that one completed by transformers 5)`."""
    config = complete_config(json.loads(hf_config(case).to_json_string()), case.name)
    write_config(folder, config, "bfloat16", folder / "nothing")
    text = (folder / "config.json").read_text()
    return config, json.loads(text), complete_config(json.loads(text), case.name)  # it changes its argument


def picked(found: dict, want: dict) -> dict:
    """Return the fields that are asked for, those of a text model too."""
    return {key: picked(found[key], value) if key == "text_config" else found.get(key, "absent") for key, value in want.items()}


@pytest.mark.parametrize("name", WANT)
def test_what_transformers_4_reads(name, tmp_path):
    _, on_disk, _ = written(BY_NAME[name], tmp_path)
    assert on_disk["torch_dtype"] == on_disk["dtype"] == "bfloat16"
    assert picked(on_disk, WANT[name]) == WANT[name]
    if name.startswith("gpt"):
        assert name.startswith("gpt-oss") or not {"rope_theta", "partial_rotary_factor"} & set(on_disk)


def test_every_family_is_held():
    assert {case.model_type for case in CASES} == {BY_NAME[name].model_type for name in WANT}


@pytest.mark.parametrize("case", [*CASES, LINEAR_OLMO, LONG_LLAMA], ids=str)
def test_nothing_changes_for_transformers_5(case, tmp_path):
    config, _, again = written(case, tmp_path)
    for one in (config, again):
        one.pop("dtype")
        one["partial_rotary_factor"] = None  # a field of Phi-3, also in rope_parameters
        for rope in (one.get("rope_parameters") or {}, *(one.get("rope_parameters") or {}).values()):
            if isinstance(rope, dict):
                rope.pop("type", None)  # the older name of rope_type
    texts = [one.pop("text_config", {}) for one in (config, again)]
    assert {key: again[key] for key in config if again[key] != config[key]} == {}
    for text in texts:  # transformers 5 reads these of the whole model
        text.pop("dtype", None)
        text.pop("tie_word_embeddings", None)
    assert {key: texts[1][key] for key in texts[0] if texts[1][key] != texts[0][key]} == {}
    build_module({**again, "text_config": texts[1]} if texts[1] else again)


def test_scalings_that_transformers_4_has_rules_for(tmp_path):
    _, on_disk, _ = written(LINEAR_OLMO, tmp_path)
    assert on_disk["rope_scaling"] == {"type": "linear", "factor": 4.0}
    _, on_disk, again = written(LONG_LLAMA, tmp_path)
    assert on_disk["original_max_position_embeddings"] == 16
    assert on_disk["rope_scaling"]["long_factor"] == [2.0] * 4
    build_module(again)
