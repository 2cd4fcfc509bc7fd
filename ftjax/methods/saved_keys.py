"""Keys of an `adapter_config.json`. Of one that somebody made each is honoured, known to be without effect, or refused by name;
what is written has no key that older versions of PEFT refuse, unless it is needed."""

from collections.abc import Collection, Mapping
from typing import Any

from ftjax.errors import UserError

# Where an adapter comes from, and how it was started or trained: what its tensors mean is the same without.
INERT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "library_name", "unsloth_version",
}  # fmt: skip
# Keys that PEFT 0.13 refuses, whatever their value: it is the oldest that ftjax writes for
NEWER = {
    "alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "kasa_config", "lora_bias", "lora_ga_config", "monteclora_config", "peft_version", "qalora_group_size", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
SILENT = {"peft_version", "qalora_group_size"}  # of those, what says nothing at any value


def without_newer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says, without keys that older versions of PEFT do not know and that are at their default."""
    return {key: value for key, value in settings.items() if key not in NEWER or not (key in SILENT or _unset(value))}


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
