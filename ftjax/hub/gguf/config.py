"""Reads the settings of a GGUF file as a config.json: the inverse of `ftjax.hub.gguf.settings`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from ftjax.errors import UserError
from ftjax.hub.gguf.families import architectures, families_as
from ftjax.hub.gguf.family import Family
from ftjax.hub.gguf.file import GGUFFile, open_gguf, shortest
from ftjax.hub.gguf.rope import FACTORS, LONG, SHORT, rope_parameters
from ftjax.hub.gguf.settings import CONTEXT, FULL, PATTERN, SLIDING, WINDOW
from ftjax.hub.gguf.taken import Settings

# Tokens that end a turn, besides the end of the text: llama.cpp stops at each of them.
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def family_in(file: GGUFFile) -> tuple[str, Family]:
    """Return `(Hugging Face's model_type, family)` of a file. Raises UserError if ftjax does not read its architecture."""
    architecture = file.metadata.get("general.architecture")
    settings = Settings(file, str(architecture)).left
    for model_type, family in families_as(str(architecture)):
        if family.told_by(settings):
            return model_type, family
    raise UserError(
        f"{file.path}: a GGUF file of architecture {architecture!r}; ftjax reads those of {', '.join(architectures())}. Use "
        "the model's Hugging Face folder instead"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of the model in this file.

    Raises UserError for an architecture that ftjax does not read, and for settings that config.json cannot express.
    """
    file = open_gguf(path)
    model_type, family = family_in(file)
    settings = Settings(file, family.architecture)
    config: dict[str, Any] = {"architectures": [CLASSES[model_type]], "model_type": model_type}
    layers, embed, heads = (settings.left.get(key) for key in ("block_count", "embedding_length", "attention.head_count"))
    for key, name in family.keys.items():
        default = [heads] if key == "attention.head_count_kv" else []
        default += [family.defaults[key]] if key in family.defaults else [None] if key.endswith("softcapping") else []
        value = settings.take(key, *default)
        config[name] = shortest(value) if isinstance(value, float) else value
    for computed in family.computed:
        config |= computed.fields(settings, config)
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
    for only in family.only:
        if config.setdefault(only.name, only.allowed(config)[0]) not in only.allowed(config):
            found = f"{only.name} = {config[only.name]}"
            raise UserError(f"{path}: {found}, which llama.cpp computes otherwise than a Hugging Face {model_type}")
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
    here = [f"blk.{layer}.{module}" for layer in range(layers) for module in modules]
    names = [f"{module}.bias" for module in here if f"{module}.weight" in file.tensors]  # other layers are of another kind
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
