"""Writes a LoRA adapter as a GGUF file, which llama.cpp adds to its base model (`--lora`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf.constants import GGUFType

from ftjax.errors import UserError
from ftjax.hub.adapter.plain_lora import Update, read_updates
from ftjax.hub.gguf.families import copies_output, family_of, parts
from ftjax.hub.gguf.write import TYPES, Stored, write_file
from ftjax.models.composite import text_of
from ftjax.models.model import Model, build_module

ASKED = ("f32", "f16", "bf16")  # llama.cpp has no products for others here


def write_adapter(path: Path, adapter: Path, config: Mapping[str, Any], asked: str, name: str) -> None:
    """Write an adapter folder's update.

    Every layer gets one rank, and its scale is multiplied into B, as in `ftjax export --portable`.

    Args:
        config: config.json of the base model, completed by transformers.
        asked: one of `ASKED`.

    Raises UserError if the adapter has more than updates `b @ a` of dense layers.
    """
    if asked not in ASKED:
        raise UserError(f"export: an adapter is written as {', '.join(ASKED)}, not as {asked}: --gguf f16 --lora")
    layers = Model.of(build_module(config), config).sizes.layers
    config = text_of(config)
    family = family_of(config)
    _, updates = read_updates(adapter, "llama.cpp reads plain LoRA only")
    rank = max(update.a.shape[0] for update in updates.values())
    stored = []
    for part in parts(family, config, layers, [f"{module}.weight" for module in updates]):
        hub = part.hub[0]
        if "output.weight" in part.gguf and config.get("tie_word_embeddings") and not copies_output(family, config):
            raise UserError(f"{adapter}: it adapts {hub}, which is the embedding too; ftjax export --merge makes them two")
        found = None if len(part.hub) > 1 else part.updates(*padded(updates[hub.removesuffix(".weight")], rank))
        if found is None:
            raise UserError(f"{adapter}: llama.cpp has no adapters of single experts; ftjax export --merge folds them in")
        for name, factors in found.items():
            for end, value in zip(("lora_a", "lora_b"), factors, strict=True):
                kind = TYPES[asked][0] if value.ndim == 2 else GGMLType.F32
                stored.append(Stored(f"{name}.{end}", value.shape, kind, lambda value=value: value))
    values = {
        "general.type": GGUFType.ADAPTER, "general.name": name, "general.file_type": int(TYPES[asked][1]),
        "adapter.type": "lora", "adapter.lora.alpha": float(rank),
    }  # fmt: skip
    write_file(path, family.architecture, values, stored)


def padded(update: Update, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors in float32 and this rank; the added zeros leave the product unchanged."""
    pad = rank - update.a.shape[0]
    a, b = (factor.astype(np.float32) for factor in update)
    return np.pad(a, ((0, pad), (0, 0))), np.pad(b, ((0, 0), (0, pad)))
