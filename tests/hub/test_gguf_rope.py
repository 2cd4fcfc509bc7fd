"""Tests RoPE in GGUF files: transformers computes the frequencies of llama.cpp from the configuration that ftjax reads."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ftjax.errors import UserError
from ftjax.hub.gguf.rope import FACTORS, llama3_factors, rope_parameters


def frequencies(parameters: dict, head_dim: int, length: int = 131072) -> tuple[np.ndarray, float]:
    """Return transformers' `(inv_freq, attention_factor)` of a configuration."""
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=length, rope_parameters=dict(parameters))
    config.standardize_rope_params()
    if parameters["rope_type"] == "default":
        theta = parameters["rope_theta"]
        return 1 / theta ** (np.arange(0, head_dim, 2) / head_dim), 1.0
    inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
    return inv_freq.numpy().astype(np.float64), factor


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("theta", "asked"),
    [
        (500000.0, {"factor": 8.0, **LLAMA3}),  # Llama 3.1
        (500000.0, {"factor": 32.0, **LLAMA3}),  # Llama 3.2
        (100000.0, {"factor": 4.0, **LLAMA3, "high_freq_factor": 8.0, "original_max_position_embeddings": 4096}),
        (500000.0, {"factor": 16.0, **LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 6.0}),
    ],
)
def test_llama3_is_found_in_its_factors(tmp_path, head_dim, theta, asked):
    original = {"rope_type": "llama3", "rope_theta": theta, **asked}
    plain, _ = frequencies({"rope_type": "default", "rope_theta": theta}, head_dim)
    scaled, _ = frequencies(original, head_dim)
    factors = (plain / scaled).astype(np.float32)
    np.testing.assert_allclose(llama3_factors(theta, head_dim // 2, asked), factors, rtol=1e-5)
    keys = {"freq_base": theta, "dimension_count": head_dim}
    found = rope_parameters(tmp_path, keys, head_dim, {FACTORS: factors}, context=0)
    if asked["low_freq_factor"] == 1.0:
        assert found == original
    np.testing.assert_allclose(frequencies(found, head_dim)[0], scaled, rtol=2e-5)


def test_factors_of_one_are_no_scaling(tmp_path):
    found = rope_parameters(tmp_path, {"freq_base": 1e4}, 8, {FACTORS: np.ones(4, np.float32)}, context=0)
    assert found == {"rope_type": "default", "rope_theta": 1e4}


def test_other_factors_are_refused(tmp_path):
    factors = np.linspace(1, 9, 32, dtype=np.float32)
    with pytest.raises(UserError, match=r"rope_freqs\.weight\) that is not Llama 3's"):
        rope_parameters(tmp_path, {"freq_base": 5e5}, 64, {FACTORS: factors}, context=0)
    with pytest.raises(UserError, match="both linear scaling and a table"):
        rope_parameters(tmp_path, {"scaling.type": "linear", "scaling.factor": 2.0}, 64, {FACTORS: factors}, context=0)


@pytest.mark.parametrize(
    "keys", [{"scaling.type": "linear", "scaling.factor": 2.5}, {"scale_linear": 2.5}, {"scaling.factor": 2.5}]
)
def test_linear(tmp_path, keys):
    found = rope_parameters(tmp_path, {"freq_base": 10000.0, **keys}, 64, {}, context=0)
    assert found == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


@pytest.mark.parametrize("keys", [{}, {"scaling.type": "none", "scaling.factor": 4.0}, {"scaling.factor": 1.0}])
def test_none(tmp_path, keys):
    assert rope_parameters(tmp_path, keys, 64, {}, context=0) == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("attention", [None, 0.5])
def test_yarn(tmp_path, attention):
    """llama.cpp scales cos and sin by attn_factor * (1 + 0.1 ln factor) (ggml's `rope_yarn`)."""
    keys = {"scaling.type": "yarn", "scaling.factor": 16.0, "scaling.original_context_length": 4096, "scaling.finetuned": True}
    if attention is not None:
        keys |= {"scaling.attn_factor": attention, "scaling.yarn_beta_fast": 16.0, "scaling.yarn_beta_slow": 2.0}
    found = rope_parameters(tmp_path, {"freq_base": 10000.0, **keys}, 64, {}, context=0)
    inv_freq, scale = frequencies(found, 64, 65536)
    assert scale == pytest.approx((attention or 1.0) * (1 + 0.1 * np.log(16.0)))
    plain, _ = frequencies({"rope_type": "default", "rope_theta": 10000.0}, 64)
    low, high = (16.0, 2.0) if attention else (32.0, 1.0)
    turns = 4096 * plain / (2 * np.pi)
    fast, slow = turns > low * 1.5, turns < high / 1.5
    assert fast.any() and slow.any()
    np.testing.assert_allclose(inv_freq[fast], plain[fast], rtol=1e-5)
    np.testing.assert_allclose(inv_freq[slow], plain[slow] / 16.0, rtol=1e-5)


def test_unknown_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"scaling\.yarn_ext_factor"):
        rope_parameters(tmp_path, {"freq_base": 1e4, "scaling.yarn_ext_factor": 0.5}, 64, {}, context=0)
