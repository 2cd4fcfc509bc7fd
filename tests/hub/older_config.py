"""Writes config.json as transformers 4 does, under a Python that has it."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig


def write_config(folder: str, model_type: str, values: dict[str, Any]) -> None:
    """Write config.json as this version of transformers does, for existing weights; `values` are as transformers 5 has them."""
    architectures = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    config = AutoConfig.for_model(model_type, **older(model_type, values), architectures=architectures, dtype="float32")
    config.save_pretrained(folder)


def older(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with RoPE under the names of transformers 4, those of a composite's text model too."""
    values = dict(values)
    if "text_config" in values:
        text = values["text_config"]
        return {**values, "text_config": older(text.get("model_type", model_type), text)}
    rope = values.pop("rope_parameters", {})
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    theta, part = ("rotary_emb_base", "rotary_pct") if model_type == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    kind = "type" if model_type in {"olmo2", "phi3"} else "rope_type"
    names = {"rope_theta": theta, "partial_rotary_factor": part}
    values |= {names[name]: value for name, value in rope.items() if name in names}
    if rope.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in rope.items() if name not in {*names, "rope_type"}}
        values["rope_scaling"] = {kind: rope["rope_type"], **scaling}
    if local and model_type == "gemma3_text":
        values["rope_local_base_freq"] = local["rope_theta"]
    return values
