"""Converts RoPE settings between the keys and tensors of a GGUF file and the `rope_parameters` of a Hugging Face config.

llama.cpp stores linear and YaRN scaling as keys, but Llama 3's and LongRoPE's only as their effect: tensors with the factors
that divide each frequency.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.errors import UserError
from ftjax.hub.gguf.file import shortest
from ftjax.models.nn.rope import make_rope

FACTORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
# `low_freq_factor` of every Llama 3 release. Only two of the three numbers that define the transition are independent, so one
# may be chosen; `llama3_factors` then checks the result against the file.
LOW_FREQ_FACTOR = 1.0
ORIGINAL_LENGTH, HIGH_FREQ_FACTOR = 8192, 4.0  # of the same releases, used if they reproduce the file


def rope_parameters(
    path: Path,
    rope: Mapping[str, Any],
    head_dim: int,
    factors: Mapping[str, np.ndarray],
    *,
    context: int,
    partial: bool = False,
) -> dict[str, Any]:
    """Return `rope_parameters` as transformers writes them.

    Args:
        path: for messages.
        rope: the keys under `llama.rope.`, without that prefix. Each is used or refused.
        head_dim: dimensions of a head.
        factors: the file's tensors with factors by name, one float32 for each pair of dimensions.
        context: the longest text in tokens.
        partial: whether the family may rotate a part of a head.

    Raises UserError if the Hugging Face model has no such RoPE.
    """
    left = dict(rope)

    def refuse(what: str) -> UserError:
        return UserError(f"{path}: {what}, which a Hugging Face configuration of this model cannot express")

    dimensions = left.pop("dimension_count", head_dim)
    if dimensions != head_dim and not partial:
        raise refuse(f"RoPE on {dimensions} of a head's {head_dim} dimensions")
    # llama.cpp's default for an absent key, as in older files
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": shortest(left.pop("freq_base", 10000.0))}
    if partial:
        parameters["partial_rotary_factor"] = dimensions / head_dim
    kind = left.pop("scaling.type", "linear")
    factor = left.pop("scaling.factor", 0.0) or left.pop("scale_linear", 0.0)  # the key of 2023
    if SHORT in factors:
        kind = "longrope"  # llama.cpp's converter does not say so for Phi-3
    elif kind == "linear" and factor in (0.0, 1.0):
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
            parameters["attention_factor"] = attention * _yarn_attention(factor)
        for key in ("beta_fast", "beta_slow"):
            if (value := left.pop(f"scaling.yarn_{key}", None)) is not None:
                parameters[key] = shortest(value)
    elif kind == "longrope":
        if not {SHORT, LONG} <= set(factors) or not original:
            raise refuse("LongRoPE without both tables of factors and an original context length")
        parameters |= {
            "rope_type": "longrope",
            "factor": context / original,
            "original_max_position_embeddings": int(original),
            "attention_factor": shortest(left.pop("scaling.attn_factor", 1.0)),
            "short_factor": [shortest(value) for value in factors[SHORT]],
            "long_factor": [shortest(value) for value in factors[LONG]],
        }
    elif kind != "none":
        raise refuse(f"RoPE scaling of type {kind!r}")
    if unknown := sorted(name for name, value in left.items() if value):
        raise refuse(f"RoPE settings {', '.join(unknown)}")
    table = factors.get(FACTORS)
    if table is None or np.all(table == 1):
        return parameters
    if kind != "none":
        raise refuse(f"both {kind} scaling and a table of RoPE factors")
    found = _llama3(np.float64(parameters["rope_theta"]), table.astype(np.float64))
    if found is None:
        raise refuse(f"a table of RoPE factors ({FACTORS}) that is not Llama 3's")
    return {**parameters, "rope_type": "llama3", **found}


def rope_keys(parameters: Mapping[str, Any], head_dim: int, context: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return `(the keys under `llama.rope.` without that prefix, tensors with factors by name)`; the inverse of
    `rope_parameters`.

    Args:
        parameters: as standardised by transformers, of one RoPE.
        head_dim: dimensions of a head.
        context: the longest text in tokens (`max_position_embeddings`).

    Raises UserError if llama.cpp has no such RoPE.
    """
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    rope = make_rope(dict(parameters), head_dim, context)
    pairs = len(rope.inv_freq)
    keys: dict[str, Any] = {"dimension_count": 2 * pairs, "freq_base": theta}
    if kind == "default":
        return keys, {}
    if kind == "linear":
        return keys | {"scaling.type": "linear", "scaling.factor": float(parameters["factor"])}, {}
    if kind == "llama3":
        return keys, {FACTORS: llama3_factors(theta, pairs, parameters).astype(np.float32)}
    original = parameters.get("original_max_position_embeddings") or context
    factor = float(parameters.get("factor") or context / original)
    if kind == "yarn" and parameters.get("truncate") is not False:  # llama.cpp always rounds YaRN's bounds
        keys |= {"scaling.type": "yarn", "scaling.factor": factor, "scaling.original_context_length": int(original)}
        if not math.isclose(attention := rope.scaling / _yarn_attention(factor), 1.0, rel_tol=1e-6):
            keys["scaling.attn_factor"] = attention
        given = {key: float(value) for key in ("beta_fast", "beta_slow") if (value := parameters.get(key))}
        return keys | {f"scaling.yarn_{key}": value for key, value in given.items()}, {}
    if kind == "longrope":
        keys |= {"scaling.type": "longrope", "scaling.original_context_length": int(original)}
        tables = {SHORT: parameters["short_factor"], LONG: parameters["long_factor"]}
        keys["scaling.attn_factor"] = rope.scaling
        return keys, {name: np.asarray(values, np.float32) for name, values in tables.items()}
    which = "yarn with truncate = false" if kind == "yarn" else kind
    raise UserError(f"rope_parameters of type {which} cannot be written as GGUF: llama.cpp has no such RoPE")


def _yarn_attention(factor: float) -> float:
    """Return the factor on cos and sin that llama.cpp uses for YaRN by itself (ggml's `rope_yarn`)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


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
