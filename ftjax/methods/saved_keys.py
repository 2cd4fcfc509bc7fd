"""Keys of an `adapter_config.json`. On reading, each is honoured, known to have no effect, or refused by name; on writing, keys
that older versions of PEFT refuse are left out unless needed."""

from collections.abc import Collection, Mapping
from typing import Any

from ftjax.errors import UserError

# Where an adapter comes from, and how it was started or trained: they do not change the meaning of its tensors.
INERT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "library_name", "unsloth_version",
}  # fmt: skip
# Keys that PEFT 0.13, the oldest version that ftjax writes for, refuses at any value
NEWER = {
    "alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "kasa_config", "lora_bias", "lora_ga_config", "monteclora_config", "peft_version", "qalora_group_size", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
SILENT = {"peft_version", "qalora_group_size"}  # those of them without effect at any value


def without_newer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json without keys that older versions of PEFT refuse and that are at their default."""
    return {key: value for key, value in settings.items() if key not in NEWER or not (key in SILENT or _unset(value))}


def refuse_unknown(where: str, saved: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise UserError for keys that are set, unknown, and not without effect.

    Args:
        where: the file, for the message.
        known: keys that the method honours, or that have no effect in it.
    """
    odd = [f"{key} = {value!r}" for key, value in saved.items() if key not in {*INERT, *known} and not _unset(value)]
    if odd:
        raise UserError(
            f"{where} asks for {', '.join(odd)}, which is not supported; merge the adapter into its base model with PEFT and "
            "give the merged model, or remove what is known to change nothing"
        )


def _unset(value: Any) -> bool:
    """Return whether a key is unset. An empty mapping is set: PEFT then takes the defaults of what it configures."""
    return value is None or value is False or value == [] or value == ""
