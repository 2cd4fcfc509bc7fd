"""Keys of an `adapter_config.json` that somebody made: each is honoured, known to be without effect, or refused by name."""

from collections.abc import Collection, Mapping
from typing import Any

from ftjax.errors import UserError

# Where an adapter comes from, and how it was started or trained: what its tensors mean is the same without.
INERT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "library_name", "unsloth_version",
}  # fmt: skip


def refuse_unknown(where: str, saved: Mapping[str, Any], known: Collection[str]) -> None:
    """UserError for keys that are set and neither known nor without effect.

    Args:
        where: the file, for the message.
        known: the keys that the method honours, or that change nothing in it.
    """
    odd = [f"{key} = {value!r}" for key, value in saved.items() if key not in {*INERT, *known} and not _unset(value)]
    if odd:
        raise UserError(
            f"{where} asks for {', '.join(odd)}, which is not supported; merge the adapter into its base model with PEFT and "
            "give the merged model, or remove what is known to change nothing"
        )


def _unset(value: Any) -> bool:
    """Whether a key says nothing. An empty mapping says something: PEFT then takes the defaults of what it configures."""
    return value is None or value is False or value == [] or value == ""
