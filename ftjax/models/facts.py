"""Read a checkpoint's config.json: every field is honoured, known to have no effect, or rejected.

A family reads the fields that it needs from `Facts`; `finish()` then rejects all others. So a field that changes the model is
never silently ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftjax.errors import UserError

# Fields about the file, the tokenizer, or transformers' generation and output types, without effect on logits.
INERT = {
    "_model_name_or_path", "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_llama_config", "keys_to_ignore_at_inference", "label2id",
    "max_length", "max_position_embeddings", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "problem_type", "return_dict", "rope_interleaved", "sep_token_id", "task_specific_params", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
    "use_cache", "use_bfloat16", "prefix", "pruned_heads", "finetuning_task", "_attn_implementation",
    "_attn_implementation_autoset", "name_or_path",
    "cache_implementation", "_num_labels", "gradient_checkpointing", "tie_last_hidden_states",
    "original_max_position_embeddings",  # read by Phi-3; elsewhere only by transformers 4
}  # fmt: skip

# Fields of every transformers configuration that change the model unless they have these values.
REFUSED_UNLESS = {
    "add_cross_attention": False, "is_decoder": False, "is_encoder_decoder": False, "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False, "quantization_config": None, "rope_interleaved": False, "is_causal": True,
}  # fmt: skip

INSTEAD = (
    "use the original checkpoint in bfloat16 or float16, and set model.quantization: nf4 or int8 to quantise it for training"
)


class Facts:
    """A config.json, completed with transformers' defaults, that tracks which fields have been read.

    Attributes:
        notes: remarks for the user.
        max_positions: rows of the table of learned positions; set by families with such a table, otherwise None.
        carried: prefixes of the names of tensors that the model does not use and that an export keeps.
        read_in_rope: keys of `rope_parameters` that this family reads, beside those that every family does.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)
        self._taken: set[str] = set()
        self.model_type: str = values["model_type"]
        self.notes: list[str] = []
        self.max_positions: int | None = None
        self.carried: list[str] = []
        self.read_in_rope: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """Read a field that the family honours. Raises UserError if it is missing."""
        self._taken.add(name)
        if name not in self._values:
            raise UserError(f"config.json of this {self.model_type} model lacks {name!r}")
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Read an optional field."""
        self._taken.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Read a field for which only these values are supported. Raises UserError for others."""
        self._taken.add(name)
        value = self._values.get(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"config.json of this {self.model_type} model has {name} = {value!r}, but ftjax supports only "
                f"{' or '.join(map(repr, allowed))}: {why}"
            )

    def inert(self, *names: str) -> None:
        """Mark fields of the family that have no effect on logits or gradients."""
        self._taken.update(names)

    def note(self, text: str) -> None:
        """Add a remark about something in this config.json that has no effect here but may surprise the user."""
        self.notes.append(text)

    def dropout(self, *names: str) -> None:
        """Read the dropout rates that transformers applies in training; here they have no effect."""
        on = {name: rate for name in names if (rate := self.get(name))}
        if on:
            self.note(
                f"config.json of this {self.model_type} model asks for dropout while training "
                f"({', '.join(f'{name} = {rate}' for name, rate in on.items())}), which ftjax does not apply; an adapter's own "
                "dropout (method.lora_dropout) works"
            )

    def finish(self) -> None:
        """Raise UserError for fields that were neither read nor known to have no effect."""
        if quantised := self._values.get("quantization_config"):
            kind = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            raise UserError(
                f"config.json of this {self.model_type} model has weights that are quantised (quantization_config: {kind}), "
                f"in a format that ftjax cannot read; {INSTEAD}. If its tensors are not quantised, remove that field"
            )
        for name, value in REFUSED_UNLESS.items():
            if self._values.get(name, value) != value and name not in self._taken:
                self.only(name, value, why="it changes the model")
        left = {
            name: value
            for name, value in self._values.items()
            if name not in self._taken and name not in INERT and name not in REFUSED_UNLESS and value not in (None, False)
        }
        if left:
            found = ", ".join(f"{name} = {json.dumps(value, default=str)}" for name, value in sorted(left.items()))
            raise UserError(
                f"config.json of this {self.model_type} model has fields that ftjax does not know: {found}. "
                "If they have no effect on the model, remove them from config.json"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, completed and standardised by transformers' configuration class for its model_type.

    Raises UserError if the file is missing or malformed, or if ftjax does not support the model_type.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: expected a model folder with config.json; found {found}")
    return complete_config(read_object(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's folder; empty if there is no such file. Raises UserError if it is malformed."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); was the download cut off?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; was the download cut off?") from None
    except (ValueError, RecursionError) as error:  # nested too deeply, or a number with too many digits
        raise UserError(f"{path}: not valid JSON: {str(error).partition(';')[0]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _untagged(value: Any) -> Any:
    """Return the value with `{"__float__": "Infinity"}`, as transformers writes what JSON lacks, replaced by the number."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _untagged(inner) for key, inner in value.items()}
    return [_untagged(inner) for inner in value] if isinstance(value, list) else value


def complete_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Complete a raw config with the defaults of transformers' class; `rope_theta` and `rope_scaling` of older checkpoints
    become `rope_parameters`."""
    from ftjax.models.registry import check_supported

    if not isinstance(raw, Mapping) or "model_type" not in raw:
        raise UserError(f"{where}: expected a JSON object with model_type")
    model_type = raw["model_type"]
    if model_type == "mistral" and "layer_types" in raw:  # as transformers' AutoConfig does
        model_type = "ministral"
    check_supported(model_type, where, text=raw.get("text_config"))
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type].from_dict({**_untagged(raw), "model_type": model_type})
    except Exception as error:  # transformers raises several kinds for values it refuses
        raise UserError(f"{where}: transformers refuses this configuration: {error}") from None
    return {**config.to_dict(), "model_type": model_type}
