"""What a checkpoint says about generation: how long a text may be, and which tokens end it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftjax.errors import UserError
from ftjax.generate.sample import Sampling
from ftjax.generate.text import turn_end

LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The `rope_parameters` of a config.json: one dict, or one for each layer type."""
    found = config.get("rope_parameters") or {}
    return [found] if "rope_theta" in found or "rope_type" in found else [one for one in found.values() if one]


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens of the longest text."""
    length = next((config[name] for name in LENGTHS if config.get(name)), None)
    if length is None:
        raise UserError(f"config.json says nothing of the model's context; expected one of {', '.join(LENGTHS)}")
    stretched = [rope["factor"] for rope in ropes(config) if rope.get("rope_type") == "dynamic"]
    return int(length * max(1, *stretched)) if stretched else int(length)


def recomputes_at(config: Mapping[str, Any]) -> int | None:
    """The length from which LongRoPE rotates by other frequencies; a text that outgrows it is computed anew, as
    transformers does for Phi-3. (With `dynamic` frequencies, transformers keeps the keys as they were.)"""
    switches = [
        rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        for rope in ropes(config)
        if rope.get("rope_type") == "longrope"
    ]
    return int(min(switches)) if switches else None


def depends_on_length(config: Mapping[str, Any]) -> bool:
    """Whether tokens are rotated by frequencies that depend on the length of the whole text."""
    return any(rope.get("rope_type") in ("longrope", "dynamic") for rope in ropes(config))


def generation_config(source: Path | None) -> dict[str, Any]:
    """generation_config.json of a model folder; empty where there is none."""
    path = None if source is None or not source.is_dir() else source / "generation_config.json"
    if path is None or not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def end_ids(config: Mapping[str, Any], settings: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the EOS of generation_config.json (`settings`) or else of config.json, the tokenizer's, and
    what closes an answer in its chat template."""
    stated = settings.get("eos_token_id")
    stated = config.get("eos_token_id") if stated is None else stated
    ids = [*stated] if isinstance(stated, list) else [stated]
    if tokenizer is not None:
        ids.append(tokenizer.eos_token_id)
        ids.append(turn_end(tokenizer) if tokenizer.chat_template else None)
    return frozenset(int(i) for i in ids if i is not None)


def recommended(settings: Mapping[str, Any], asked: Mapping[str, Any]) -> Sampling:
    """Sampling as `asked`, and where that is None as generation_config.json says; greedy where neither says anything.

    A model that is not meant to be sampled from (`do_sample`) is decoded greedily unless a temperature is asked for.
    """
    own = {name: settings.get(name) for name in asked} if settings.get("do_sample") else {}
    own["repetition_penalty"] = settings.get("repetition_penalty")
    if settings.get("do_sample") and own.get("temperature") is None:
        own["temperature"] = 1.0
    chosen = {name: own.get(name) if value is None else value for name, value in asked.items()}
    return Sampling(**{name: value for name, value in chosen.items() if value is not None})
