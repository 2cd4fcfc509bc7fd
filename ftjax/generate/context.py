"""Read generation defaults from a checkpoint: sampling settings."""

from collections.abc import Mapping
from typing import Any

from ftjax.generate.sample import Sampling


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
