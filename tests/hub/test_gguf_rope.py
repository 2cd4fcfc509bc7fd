"""Tests RoPE in GGUF files: transformers computes the frequencies of llama.cpp from the configuration that ftjax reads."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ftjax.errors import UserError
from ftjax.hub.gguf.rope import FACTORS, LONG, SHORT, llama3_factors, rope_keys, rope_parameters


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


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, "factor": 32.0}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, **LLAMA3},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32768},
        {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32768,
            "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0,
        },
        {**LONGROPE, "attention_factor": 1.25, "short_factor": [1.0, 1.5] * 16, "long_factor": [2.0, 4.0] * 16},
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn-all", "longrope"],
)  # fmt: skip
def test_keys_and_tables_are_read_as_they_were_written(tmp_path, parameters):
    keys, factors = rope_keys(parameters, 64, 131072)
    kept = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in keys.items()}  # as in a file
    found = rope_parameters(tmp_path, kept, 64, factors, context=131072)
    assert found.keys() == parameters.keys()
    for name, value in parameters.items():
        assert found[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    assert set(factors) == (
        {FACTORS} if "low_freq_factor" in parameters else {SHORT, LONG} if "long_factor" in parameters else set()
    )


def test_attention_factors_of_yarn():
    """llama.cpp multiplies by 1 + 0.1 ln factor itself: the file gives what is left of the model's factor."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32768}
    assert "scaling.attn_factor" not in rope_keys(yarn, 64, 131072)[0]
    left = rope_keys({**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}, 64, 131072)[0]["scaling.attn_factor"]
    assert left == pytest.approx(1 / (1 + 0.1 * np.log(4.0)))


def test_what_llama_cpp_has_not_is_refused():
    with pytest.raises(UserError, match="type dynamic cannot be written"):
        rope_keys({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 64, 4096)
