"""Tiny models that llama.cpp computes as they are: the cases of the families, with what it does not know taken out."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

from cases import CASES
from oracle import Case, make_hf
from qwen_tokenizer import qwen

SILU = {"hidden_act": "silu"}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LOCAL = {"rope_type": "default", "rope_theta": 500.0}
EPS = {"rms_norm_eps": 1e-6}
MAMBA = {"mamba_conv_bias": True, "mamba_proj_bias": False}
# Changes by the name of a case; windows that llama.cpp lacks are longer than the tests' texts.
CHANGES = {
    "llama": {}, "llama-tied-biases": SILU, "llama3.1": {}, "llama-linear": {}, "llama-yarn": {},
    "gemma": {}, "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3": {"query_pre_attn_scalar": 12, "attn_logit_softcapping": None},
    "mixtral": {}, "mixtral-window": SILU | {"sliding_window": 64}, "qwen3-moe": {},
    "gpt-oss": {"swiglu_limit": 7.0, "rope_parameters": YARN}, "gpt-oss-plain": {"swiglu_alpha": 1.702, "attention_bias": True},
    "mistral": {"sliding_window": 48}, "mistral-no-window": SILU, "ministral": {"sliding_window": 48},
    "qwen2": {"use_sliding_window": False, "rope_parameters": YARN}, "qwen2-tied": SILU | {"head_dim": 8},
    "qwen3": {"use_sliding_window": False, "layer_types": None}, "qwen3-tied": SILU | PLAIN | {"attention_bias": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": False}, "gpt-neox": {"hidden_act": "gelu"},
    "gpt-neox-serial": {"attention_bias": True},
    "phi3": {"sliding_window": None}, "phi3-plain": SILU | {"head_dim": 8}, "phi3-whole-heads": {},
    "olmo2": {"attention_bias": False}, "olmo2-tied": SILU | PLAIN | {"head_dim": 8},
    "olmo3": {"rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL}},
    "olmo3-other-layers": SILU | {
        "attention_bias": False, "rope_parameters": {"full_attention": LOCAL, "sliding_attention": LOCAL}
    },
    "smollm3": SILU | PLAIN | {
        "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False, "layer_types": None, "attention_bias": False
    },
    "smollm3-no-windows": {"no_rope_layer_interval": 4, "mlp_bias": False},
    "granite": {}, "granite-tied-biases": SILU,
    "bamba": {}, "bamba-tied-biases": SILU | {"mamba_expand": 2} | MAMBA,
    "granitemoehybrid": {}, "granitemoehybrid-dense": SILU | MAMBA,
    "nemotron-h": {"layers_block_type": ["mamba", "moe", "attention", "mamba", "moe"]},
    "nemotron-h-dense": {
        "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "mlp_bias": False, "use_bias": False, "use_conv_bias": True,
    },
    "falcon-h1": {}, "falcon-h1-without-norm": {},
    "falcon-h1-norm-first": SILU | MAMBA | PLAIN | {
        "mamba_norm_before_gate": False, "projectors_bias": False, "attention_bias": False, "embedding_multiplier": 2.0
    },
    "granitemoe": {}, "granitemoe-tied-biases": SILU,
    "olmoe": {"clip_qkv": None, "norm_topk_prob": False, "attention_bias": False, "num_key_value_heads": 4},
    "olmoe-tied": SILU | PLAIN,
    "glm4": {}, "glm4-whole-heads": SILU | PLAIN,
    "glm4-moe": {"n_group": 1, "topk_group": 1}, "glm4-moe-plain": SILU,
    "qwen3.5": EPS | {"linear_value_head_dim": 8},
    "qwen3.5-tied": SILU | EPS | {"linear_value_head_dim": 12, "attention_bias": False},
    "qwen3.5-moe": EPS, "qwen3.5-images": EPS, "qwen3-next": EPS | {"linear_value_head_dim": 8, "mlp_only_layers": []},
    "qwen3-vl": {"attention_bias": False}, "gemma3-images": {"query_pre_attn_scalar": 12},
    "lfm2": {}, "lfm2-untied": PLAIN | {"conv_bias": False}, "lfm2-moe": {"routed_scaling_factor": 1.0},
}  # fmt: skip


def changed(values: dict, changes: dict) -> dict:
    """Return the values with these changes of the text model."""
    changes = {**changes, "vocab_size": 304}
    if "text_config" in values:
        changes = {"text_config": {**values["text_config"], **changes}}
    return copy.deepcopy({**values, **changes})


WRITTEN = {case.name: replace(case, values=changed(case.values, CHANGES[case.name])) for case in CASES if case.name in CHANGES}


def with_tokenizer(folder: Path, **changes) -> Path:
    """Add a byte-level tokenizer of 304 tokens to a folder."""
    files = qwen(folder / "tokenizer", **{"tokenizer_class": "GPT2Tokenizer", "chat_template": "left out", **changes})
    for file in files.iterdir():
        shutil.move(file, folder / file.name)
    files.rmdir()
    return folder


def make_base(case: Case, folder: Path) -> Path:
    """Write a model of random weights with a tokenizer."""
    make_hf(case, folder)
    return with_tokenizer(folder)
