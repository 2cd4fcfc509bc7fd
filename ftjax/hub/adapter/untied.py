"""Unties a base model's output from its embedding, for an adapter that trains one of the two, or each separately.

PEFT then wraps or copies one side and leaves the other as it was. Here the model gets a separate output that starts as a
copy of the embedding, so that a merged model says `tie_word_embeddings: false` and holds both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.hub.adapter.file import AdapterFile, Renamed
from ftjax.hub.adapter.peft import PREFIX, adapter_file, read_adapter_config
from ftjax.hub.load import check_tied
from ftjax.hub.source import TensorSource
from ftjax.methods.tied import tied_names
from ftjax.methods.walk import matches
from ftjax.models.composite import with_text
from ftjax.models.model import build_module


class Beside:
    """The tensors of two sources; the second takes precedence."""

    def __init__(self, source: TensorSource, more: TensorSource):
        self._of = {name: one for one in (source, more) for name in one.keys()}

    def keys(self) -> list[str]:
        return list(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._of[name].shape(name))

    def dtype(self, name: str) -> np.dtype:
        return self._of[name].dtype(name)

    def read(self, name: str, index=()) -> np.ndarray:
        return self._of[name].read(name, index)


def with_adapters_output(
    adapter: Path, hf_config: dict[str, Any], source: TensorSource | None
) -> tuple[dict[str, Any], TensorSource | None]:
    """Return config.json and tensors (None: config only) of a base model, with a separate output if an adapter's folder
    needs one.

    Raises UserError if the base's file holds an output that differs from the embedding that config.json ties to it.
    """
    saved, root = read_adapter_config(adapter), build_module(hf_config)
    names = tied_names(root)
    if names is None or saved.get("task_type") == "SEQ_CLS" or "peft_type" not in saved:
        return hf_config, source
    stored = adapter_file(adapter)
    if not _apart(saved, stored, *names):
        return hf_config, source
    if source is None:
        return with_text(hf_config, tie_word_embeddings=False), None
    check_tied(root, source, str(adapter))
    tables = [f"{name}.weight" for name in names]
    # The base has one table, which the file may name after either side.
    held = [f"{PREFIX}{name}.base_layer.weight" for name in names]
    kept = [f"{PREFIX}{table}" for table in tables]
    found = [(stored, name) for name in held if name in stored.keys()]
    found += [(stored.original, name) for name in kept if name in stored.original.keys()]
    table = found[0] if found else (source, tables[0])
    return with_text(hf_config, tie_word_embeddings=False), Beside(source, Renamed(table[0], dict.fromkeys(tables, table[1])))


def _apart(saved: Mapping[str, Any], stored: AdapterFile, embedding: str, output: str) -> bool:
    """Return whether an adapter trains only one side, or each separately."""
    rows = saved.get("trainable_token_indices")
    if isinstance(rows, Mapping):
        own, others = ([ids for key, ids in rows.items() if ids and matches(name, [key])] for name in (embedding, output))
        if others and own[:1] != others[:1]:
            return True
    asked = any(_trains(saved, name) for name in (embedding, output))
    return asked and not (saved.get("ensure_weight_tying") and _one(stored, embedding, output))


def _trains(saved: Mapping[str, Any], name: str) -> bool:
    """Return whether `modules_to_save` or `target_modules` name a module."""
    if any(name.endswith(one) for one in saved.get("modules_to_save") or ()):
        return True
    targets, excluded = saved.get("target_modules"), saved.get("exclude_modules")
    if not targets or targets == "all-linear" or saved.get("layers_to_transform") not in (None, []):
        return False
    return matches(name, targets) and not (excluded and matches(name, excluded))


def _one(stored: AdapterFile, embedding: str, output: str) -> bool:
    """Return whether the file has equal weights for both sides: PEFT ties only embeddings named `embed_tokens`."""
    pairs = {("weight", "weight"), ("lora_embedding_A", "lora_B.weight"), ("lora_embedding_B", "lora_A.weight")}
    found = [(f"{PREFIX}{embedding}.{a}", f"{PREFIX}{output}.{b}") for a, b in pairs]
    found = [pair for pair in found if set(pair) <= set(stored.keys())]
    values = [(stored.read(a), stored.read(b)) for a, b in found]
    return bool(values) and all(np.array_equal(a, b if a.shape == b.shape else b.T) for a, b in values)
