"""Read generation defaults from a checkpoint: sampling settings and end-of-text tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftjax.generate.sample import Sampling
from ftjax.generate.text import turn_end
from ftjax.models.composite import text_of
from ftjax.models.facts import read_object


def generation_config(source: Path | None) -> dict[str, Any]:
    """Read generation_config.json of a model folder; return an empty dict if there is none."""
    return {} if source is None else read_object(source / "generation_config.json")


def end_ids(config: Mapping[str, Any], settings: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    """Return the token ids that end an answer.

    These are the EOS tokens of generation_config.json (`settings`) or else of config.json, the tokenizer's EOS token, and the
    token that closes an answer in its chat template.
    """
    stated = settings.get("eos_token_id")
    stated = text_of(config).get("eos_token_id") if stated is None else stated
    ids = [*stated] if isinstance(stated, list) else [stated]
    if tokenizer is not None:
        ids.append(tokenizer.eos_token_id)
        ids.append(turn_end(tokenizer) if tokenizer.chat_template else None)
    return frozenset(int(i) for i in ids if i is not None)


def recommended(settings: Mapping[str, Any], asked: Mapping[str, Any]) -> Sampling:
    """Return the sampling settings in `asked`, with None replaced by the value in generation_config.json.

    Decoding is greedy unless `asked` has a temperature or generation_config.json sets `do_sample`.
    """
    own = {name: settings.get(name) for name in asked} if settings.get("do_sample") else {}
    own["repetition_penalty"] = settings.get("repetition_penalty")
    if settings.get("do_sample") and own.get("temperature") is None:
        own["temperature"] = 1.0
    chosen = {name: own.get(name) if value is None else value for name, value in asked.items()}
    return Sampling(**{name: value for name, value in chosen.items() if value is not None})
