"""Reads the settings of a GGUF file as a config.json: the inverse of `ftjax.hub.gguf.settings`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from ftjax.errors import UserError
from ftjax.hub.gguf.families import FAMILIES, Family
from ftjax.hub.gguf.file import GGUFFile, open_gguf, shortest
from ftjax.hub.gguf.rope import FACTORS, LONG, SHORT, rope_parameters
from ftjax.hub.gguf.settings import CONTEXT, FULL, PATTERN, SLIDING, WINDOW

# Settings of other architectures that llama.cpp's converter writes with neutral values.
WITHOUT_EFFECT = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.layer_norm_epsilon": None, WINDOW: 0,
}  # fmt: skip
# Tokens that end a turn, besides the end of the text: llama.cpp stops at each of them.
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")


class Settings:
    """The settings of a file under its architecture's name, each to be taken once."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.path, self.start = file.path, f"{architecture}."
        length = len(self.start)
        self.left = {key[length:]: value for key, value in file.metadata.items() if key.startswith(self.start)}

    def take(self, key: str, *default: Any) -> Any:
        """Return a setting that is the same for all layers."""
        if key in self.left:
            value = self.left.pop(key)
            if isinstance(value, list) and len(set(value)) != 1:
                raise UserError(
                    f"{self.path}: {self.start}{key} differs from layer to layer, which a Hugging Face configuration of this "
                    f"model cannot express: {value}"
                )
            return value[0] if isinstance(value, list) else value
        if default:
            return default[0]
        lacks = f"the file lacks {self.start}{key}"
        raise UserError(f"{self.path}: {lacks}; it is damaged or was not made by llama.cpp's converter")

    def finish(self) -> None:
        """Raise UserError for settings that nobody took, unless they have no effect."""
        unknown = {
            key: value
            for key, value in self.left.items()
            if key != "tensor_data_layout" and not (key in WITHOUT_EFFECT and WITHOUT_EFFECT[key] in (None, value)) and value
        }
        if unknown:
            found = ", ".join(f"{self.start}{key} = {value}" for key, value in sorted(unknown.items()))
            raise UserError(
                f"{self.path}: settings that ftjax does not know: {found}. Use the model's Hugging Face folder instead"
            )


def model_type_of(file: GGUFFile) -> str:
    """Return Hugging Face's `model_type` of a file. Raises UserError if ftjax does not read its architecture."""
    architecture = file.metadata.get("general.architecture")
    if architecture == "llama":
        return "mixtral" if file.metadata.get("llama.expert_count") else "llama"
    if architecture == "olmo2":
        return "olmo3" if file.metadata.get(f"olmo2.{WINDOW}") else "olmo2"
    found = [name for name, family in FAMILIES.items() if family.architecture == architecture]
    if not found:
        known = ", ".join(sorted({family.architecture for family in FAMILIES.values()}))
        raise UserError(
            f"{file.path}: a GGUF file of architecture {architecture!r}; ftjax reads those of {known}. Use the model's Hugging "
            "Face folder instead"
        )
    return found[0]


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of the model in this file.

    Raises UserError for an architecture that ftjax does not read, and for settings that config.json cannot express.
    """
    file = open_gguf(path)
    model_type = model_type_of(file)
    family = FAMILIES[model_type]
    settings = Settings(file, family.architecture)
    config: dict[str, Any] = {"architectures": [CLASSES[model_type]], "model_type": model_type}
    heads = settings.left.get("attention.head_count")
    for key, name in family.keys.items():
        default = [heads] if key == "attention.head_count_kv" else []
        default += [family.defaults[key]] if key in family.defaults else [None] if key.endswith("softcapping") else []
        value = settings.take(key, *default)
        config[name] = shortest(value) if isinstance(value, float) else value
    layers, embed, heads = (config[family.keys[key]] for key in ("block_count", "embedding_length", "attention.head_count"))
    head_dim = settings.take("attention.key_length", embed // heads)
    if settings.take("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{path}: keys and values of different sizes, which a Hugging Face {model_type} cannot express")
    if not family.fixed_heads:
        config["head_dim"] = head_dim
    settings.take("vocab_size", None)
    config["vocab_size"] = _tensor_shape(file, "token_embd.weight")[0]
    context = settings.take(CONTEXT)
    config["n_positions" if model_type == "gpt2" else "max_position_embeddings"] = context
    config |= _windows(family, settings, layers)
    config |= _rope(file, family, settings, head_dim, context)
    config |= {only.name: only.allowed(config)[0] for only in family.only}
    config |= {name: _bias(file, modules, layers) for name, modules in family.biases.items()}
    config |= {"tie_word_embeddings": "output.weight" not in file.tensors, "dtype": _dtype(file), **_special_ids(file)}
    settings.finish()
    return config


def _windows(family: Family, settings: Settings, layers: int) -> dict[str, Any]:
    if family.windows is None:
        if family.architecture == "phi3":  # llama.cpp reads it, and goes without windows
            return {"sliding_window": settings.take(WINDOW, None) or None}
        return {}
    window = settings.take(WINDOW, family.defaults.get(WINDOW))
    pattern = settings.left.pop(PATTERN, family.windows)
    if isinstance(pattern, int):
        pattern = [layer % pattern < pattern - 1 for layer in range(layers)]
    local = [bool(here) and bool(window) for here in pattern[:layers]]
    return {"sliding_window": window, "layer_types": [SLIDING if here else FULL for here in local]}


def _rope(file: GGUFFile, family: Family, settings: Settings, head_dim: int, context: int) -> dict[str, Any]:
    rope = {key[len("rope.") :]: settings.left.pop(key) for key in list(settings.left) if key.startswith("rope.")}
    if not family.ropes:
        return {}
    local = rope.pop("freq_base_swa", family.defaults.get("rope.freq_base_swa", rope.get("freq_base", 10000.0)))
    tables = {n: file.read_rows(n, slice(None)).astype(np.float32) for n in (FACTORS, SHORT, LONG) if n in file.tensors}
    found = rope_parameters(file.path, rope, head_dim, tables, context=context, partial=family.partial_rope)
    if family.rounded_yarn and found["rope_type"] == "yarn":  # as published; llama.cpp rounds all the same
        found["truncate"] = False
    original = {"original_max_position_embeddings": rope.get("scaling.original_context_length") or context}
    more = original if family.architecture == "phi3" else {}
    if family.local_rope:
        return {"rope_parameters": {FULL: found, SLIDING: {"rope_type": "default", "rope_theta": shortest(local)}}}
    if local != rope.get("freq_base", 10000.0):
        raise UserError(f"{file.path}: another RoPE in layers with windows, which a Hugging Face configuration cannot express")
    return {"rope_parameters": found, **more}


def _tensor_shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise UserError(
            f"{file.path}: the file has no tensor {name}; it holds {len(file.tensors)} tensors. Is it a vocabulary?"
        )
    return file.tensors[name].shape


def _bias(file: GGUFFile, modules: Sequence[str], layers: int) -> bool:
    names = [f"blk.{layer}.{module}.bias" for layer in range(layers) for module in modules]
    have = [name in file.tensors for name in names]
    if any(have) and not all(have):
        present, absent = names[have.index(True)], names[have.index(False)]
        raise UserError(f"{file.path}: it has {present} but not {absent}; a Hugging Face Llama has biases on all or on none")
    return any(have)


def _dtype(file: GGUFFile) -> str:
    types = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({GGMLType.F16}): "float16", frozenset({GGMLType.BF16}): "bfloat16"}.get(frozenset(types), "float32")


def _special_ids(file: GGUFFile) -> Mapping[str, Any]:
    def token_id(name: str) -> int | None:
        return file.metadata.get(f"tokenizer.ggml.{name}")

    ends = list(dict.fromkeys(i for name in END_IDS if (i := token_id(name)) is not None))
    return {
        "bos_token_id": token_id("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": token_id("padding_token_id"),
    }
