"""Converts the RoPE settings of a GGUF file to the `rope_parameters` of a Hugging Face config.

llama.cpp stores linear and YaRN scaling as keys, but Llama 3's only as its effect: `rope_freqs.weight`, the factor that
divides each frequency.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.errors import UserError
from ftjax.hub.gguf.file import shortest

# `low_freq_factor` of every Llama 3 release. Only two of the three numbers that define the transition are independent, so one
# may be chosen; `llama3_factors` then checks the result against the file.
LOW_FREQ_FACTOR = 1.0
ORIGINAL_LENGTH, HIGH_FREQ_FACTOR = 8192, 4.0  # of the same releases, used if they reproduce the file


def rope_parameters(path: Path, rope: Mapping[str, Any], head_dim: int, factors: np.ndarray | None) -> dict[str, Any]:
    """Return `rope_parameters` as transformers writes them.

    Args:
        path: for messages.
        rope: the keys under `llama.rope.`, without that prefix. Each is used or refused.
        head_dim: dimensions of a head; all of them must rotate.
        factors: `rope_freqs.weight`, one float32 for each pair of dimensions.

    Raises UserError if Hugging Face's Llama has no such RoPE.
    """
    left = dict(rope)

    def refuse(what: str) -> UserError:
        return UserError(f"{path}: {what}, which a Hugging Face Llama configuration cannot express")

    dimensions = left.pop("dimension_count", head_dim)
    if dimensions != head_dim:
        raise refuse(f"RoPE on {dimensions} of a head's {head_dim} dimensions")
    # llama.cpp's default for an absent key, as in older files
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": shortest(left.pop("freq_base", 10000.0))}
    kind = left.pop("scaling.type", "linear")
    factor = left.pop("scaling.factor", 0.0) or left.pop("scale_linear", 0.0)  # the key of 2023
    if kind == "linear" and factor in (0.0, 1.0):
        kind = "none"
    left.pop("scaling.finetuned", None)  # only a note whether the model was trained with the scaling
    original = left.pop("scaling.original_context_length", 0)
    if kind == "linear":
        parameters |= {"rope_type": "linear", "factor": shortest(factor)}
    elif kind == "yarn":
        if not original or not factor:
            raise refuse("YaRN scaling without a factor and an original context length")
        parameters |= {
            "rope_type": "yarn",
            "factor": shortest(factor),
            "original_max_position_embeddings": int(original),
        }
        attention = left.pop("scaling.attn_factor", 1.0)
        if attention != 1.0:
            parameters["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
        for key in ("beta_fast", "beta_slow"):
            if (value := left.pop(f"scaling.yarn_{key}", None)) is not None:
                parameters[key] = shortest(value)
    elif kind != "none":
        raise refuse(f"RoPE scaling of type {kind!r}")
    if unknown := sorted(name for name, value in left.items() if value):
        raise refuse(f"RoPE settings {', '.join(unknown)}")
    if factors is None or np.all(factors == 1):
        return parameters
    if kind != "none":
        raise refuse(f"both {kind} scaling and a table of RoPE factors")
    found = _llama3(np.float64(parameters["rope_theta"]), factors.astype(np.float64))
    if found is None:
        raise refuse("a table of RoPE factors (rope_freqs.weight) that is not Llama 3's")
    return {**parameters, "rope_type": "llama3", **found}


def llama3_factors(theta: float, pairs: int, parameters: Mapping[str, Any]) -> np.ndarray:
    """Return `[pairs]` float64: the divisor of each frequency in Llama 3's scaling (meta-llama/llama-models,
    `apply_scaling`)."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * theta ** (-np.arange(pairs) / pairs) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / parameters["factor"] + smooth)


def _llama3(theta: float, factors: np.ndarray) -> dict[str, Any] | None:
    """Return the parameters that give these factors in float32; None if there are none."""
    pairs = len(factors)
    factor = float(f"{np.max(factors):.6g}")
    between = (factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6))
    guesses = [(HIGH_FREQ_FACTOR, ORIGINAL_LENGTH)]
    if between.sum() >= 2:
        # Within the transition 1/factors is linear in the frequency: slope and offset give both numbers.
        frequency = theta ** (-np.arange(pairs) / pairs) / (2 * math.pi)
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(frequency[between], smooth[between], 1)
        if offset < 0:
            high = round(LOW_FREQ_FACTOR * (1 - 1 / offset), 4)
            guesses.append((high, round(slope * (high - LOW_FREQ_FACTOR))))
    for high, original in guesses:
        found = {
            "factor": factor,
            "low_freq_factor": LOW_FREQ_FACTOR,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if high > LOW_FREQ_FACTOR and np.allclose(llama3_factors(theta, pairs, found), factors, rtol=2e-5, atol=0):
            return found
    return None
