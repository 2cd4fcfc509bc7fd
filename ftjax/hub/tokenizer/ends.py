"""The tokens that end an answer, by a checkpoint's files and its chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftjax.data.template import Template
from ftjax.errors import UserError
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


def turn_end(tokenizer: Any) -> int | None:
    """Return the token that closes an answer in the chat template (`<end_of_turn>`), which may differ from EOS, or None."""
    try:
        return Template(tokenizer).closers[0]
    except UserError:  # several templates and no default
        return None
