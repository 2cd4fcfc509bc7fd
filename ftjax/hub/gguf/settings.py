"""Writes config.json as the settings of a GGUF file.

llama.cpp's `src/llama-arch.cpp` lists the keys; which fields of config.json they hold stands in `ftjax.hub.gguf.family`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ftjax.errors import UserError
from ftjax.hub.gguf.families import family_of
from ftjax.hub.gguf.family import Family
from ftjax.hub.gguf.rope import rope_keys
from ftjax.models.causal_lm import Sizes

FULL, SLIDING = "full_attention", "sliding_attention"
CONTEXT, WINDOW, PATTERN = "context_length", "attention.sliding_window", "attention.sliding_window_pattern"


def gguf_settings(
    config: Mapping[str, Any], sizes: Sizes, note: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return `(settings by key, without the architecture's name; tensors with factors of RoPE by name)` for a config.json
    that transformers completed.

    Args:
        note: called with remarks for the user.

    Raises UserError if llama.cpp cannot compute this model as it is.
    """
    family = family_of(config)
    for only in family.only:
        if config.get(only.name) not in only.allowed(config):
            raise _refused(family, config, only.name, " or ".join(map(repr, only.allowed(config))))
    if family.fixed_heads and sizes.head_dim * sizes.heads != sizes.embed:
        raise _refused(family, config, "head_dim", f"{sizes.embed // sizes.heads} (hidden_size / num_attention_heads)")
    values = {key: _number(name, config.get(name)) for key, name in family.keys.items()}
    for key, name in family.keys.items():
        if values[key] is None and key in family.defaults:
            raise _refused(family, config, name, f"{family.defaults[key]} where a file does not say")
    if values.get("feed_forward_length", 0) is None:  # GPT-2's default
        values["feed_forward_length"] = 4 * sizes.embed
    for computed in family.computed:
        values |= computed.keys(config)
    if (remark := family.remark(config)) is not None:
        note(remark)
    values |= {
        CONTEXT: _context(config, sizes), "vocab_size": sizes.vocab,
        "attention.key_length": sizes.head_dim, "attention.value_length": sizes.head_dim,
        **_windows(family, config, sizes, note),
    }  # fmt: skip
    factors: dict[str, np.ndarray] = {}
    if family.ropes:
        keys, factors = _rope(family, config, sizes, note)
        values |= {f"rope.{key}": value for key, value in keys.items()}
    return {key: value for key, value in values.items() if value is not None}, factors


def _number(name: str, value: Any) -> Any:
    floats = (
        "_eps",
        "_epsilon",
        "_multiplier",
        "_scaling",
        "_softcapping",
        "_factor",
    )  # config.json may have 2 where 2.0 is meant
    return float(value) if name.endswith(floats) and value is not None else value


def _context(config: Mapping[str, Any], sizes: Sizes) -> int:
    return config.get("max_position_embeddings") or sizes.positions


def _refused(family: Family, config: Mapping[str, Any], name: str, known: str) -> UserError:
    return UserError(
        f"this {config['model_type']} model cannot be written as GGUF: its config.json has {name} = {config.get(name)!r}, but "
        f"llama.cpp computes every model of this architecture ({family.architecture}) as with {known}"
    )


def _windows(family: Family, config: Mapping[str, Any], sizes: Sizes, note: Callable[[str], None]) -> dict[str, Any]:
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if family.windows is not None:
        local = [kind == SLIDING for kind in kinds]
        return {WINDOW: window, PATTERN: local} if any(local) or family.always_windows else {}
    # An older llama.cpp takes another window of its own for Phi-3 if a file does not say.
    own = {WINDOW: window or 0} if family.architecture == "phi3" else {}
    if not window or (kinds is not None and SLIDING not in kinds):
        return own
    if window < _context(config, sizes):
        note(
            f"llama.cpp has no sliding windows for this architecture ({family.architecture}). The file gives this model's "
            f"window, {window} tokens, as the longest text: up to there llama.cpp computes the same"
        )
    return {CONTEXT: min(window, _context(config, sizes)), **own}


def _rope(
    family: Family, config: Mapping[str, Any], sizes: Sizes, note: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    parameters = config["rope_parameters"]
    local = parameters.get(SLIDING) if family.local_rope else None
    parameters = parameters.get(FULL, local) if family.local_rope else parameters
    for one in (parameters, *([] if local is None else [local])):
        kind = one.get("rope_type", "default")
        known = ("default",) if one is local and one is not parameters else family.ropes
        if kind not in known:
            where = " in layers with windows" if one is local else ""
            raise UserError(
                f"this {config['model_type']} model cannot be written as GGUF: its RoPE is of type {kind}{where}, but "
                f"llama.cpp has only {', '.join(known)} for this architecture ({family.architecture})"
            )
    if parameters.get("rope_type") == "longrope" and config.get("original_max_position_embeddings"):
        parameters = {"original_max_position_embeddings": config["original_max_position_embeddings"], **parameters}
    if family.rounded_yarn and parameters.get("truncate") is False:
        parameters = {**parameters, "truncate": True}
        note("llama.cpp rounds the bounds between which YaRN changes frequencies; this model does not, so answers may differ")
    keys, factors = rope_keys(parameters, sizes.head_dim, config["max_position_embeddings"])
    if local is not None:
        keys["freq_base_swa"] = float(local["rope_theta"])
        if family.one_theta and keys["freq_base_swa"] != keys["freq_base"]:
            raise _refused(family, config, "rope_parameters", "one rope_theta for all layers")
    return keys, factors
