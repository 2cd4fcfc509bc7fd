"""Fields of config.json under the names that transformers 4 and tools of its time read.

transformers 5 keeps all RoPE settings in `rope_parameters` and renamed a few other fields. Tools that read only the older
names (4.57, mlx-lm, llama.cpp's converter, ONNX's exporter) would silently use their defaults. transformers 5 reads both.
"""

from collections.abc import Mapping
from typing import Any

from ftjax.models.composite import TEXT, TIED

# transformers 4 accepts a scaling of these families only as {type, factor} or {type, short_factor, long_factor}.
NAMED_TYPE = {"olmo2", "phi3"}
NEWER = {"gemma4_text", "gemma4_unified_text"}  # families that transformers 4 lacks, and whose classes take only new fields
OLDER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}  # of layers; transformers 5 reads both
LETTERS = {"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"}  # of layers, in a pattern
REPLACED = {"nemotron_h": "layers_block_type"}  # a field that older code refuses, and transformers 5 does without


def older_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the older fields for `config`, a config.json that transformers 5 completed.

    If transformers 4 cannot express a scaling, the fields still hold all of it, so that version 4 refuses it and does not
    ignore a part.
    """
    family = config["model_type"]
    fields: dict[str, Any] = {"torch_dtype": config["dtype"]} if config.get("dtype") else {}
    if isinstance(text := config.get(TEXT), Mapping):
        tied = {TIED: config[TIED]} if TIED in config else {}  # version 4 reads it inside
        fields[TEXT] = {**text, **older_fields({"model_type": family, **text}), **tied}
    if family == "qwen3_moe":
        fields["num_experts"] = config["num_local_experts"]
    if family == "gemma3_text" and (pattern := _pattern(config["layer_types"])):
        fields["sliding_window_pattern"] = pattern
    if family == "granitemoehybrid" and config.get("layer_types"):
        fields["layer_types"] = [OLDER_TYPES.get(kind, kind) for kind in config["layer_types"]]
    if family == "nemotron_h" and (kinds := config.get("layers_block_type")):
        fields["hybrid_override_pattern"] = "".join(LETTERS[kind] for kind in kinds)
        fields["num_hidden_layers"] = len(kinds)
    if (rope := config.get("rope_parameters")) and family not in NEWER:
        fields |= _rope(family, rope, config)
    return fields


def _rope(family: str, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    local = parameters.get("sliding_attention")
    rope = dict(parameters.get("full_attention", parameters))
    theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    if family == "gpt_neox":  # transformers 5 would take rope_theta for an unknown field
        fields = {"rotary_emb_base": theta, "rotary_pct": part}
    else:
        fields = {"rope_theta": theta} | ({"partial_rotary_factor": part} if part is not None else {})
    if family == "gemma3_text" and local:
        fields["rope_local_base_freq"] = local["rope_theta"]
    if kind == "default" and not rope:  # MRoPE has settings of its own
        return {**fields, "rope_scaling": None}
    original = rope.get("original_max_position_embeddings")
    if kind == "longrope" and original is not None:  # version 4 reads it outside the scaling
        fields["original_max_position_embeddings"] = original
        if family == "phi3":  # so does version 5
            rope.pop("original_max_position_embeddings")
            if rope.get("factor") == config["max_position_embeddings"] / original:  # both versions compute it so
                rope.pop("factor")
    rope = {name: float(value) if name == "factor" and value is not None else value for name, value in rope.items()}
    return {**fields, "rope_scaling": {"type" if family in NAMED_TYPE else "rope_type": kind, **rope}}


def _pattern(layer_types: list[str]) -> int | None:
    """Return n if every n-th layer has full attention; None if the layers follow no such rule."""
    whole = [number for number, kind in enumerate(layer_types, start=1) if kind == "full_attention"]
    pattern = whole[0] if whole else len(layer_types) + 1
    return pattern if whole == list(range(pattern, len(layer_types) + 1, pattern)) else None
