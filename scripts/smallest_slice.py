"""Finds the smallest v5e slice on which LoRA fits, by the arithmetic of `mesh: auto`.

Rank 16 on every linear layer, frozen weights in bfloat16, `remat: full`, one row of 4096 tokens per chip, weights sharded over
all chips of a slice: whole experts over as many as their number divides by, so that they are not gathered. To what `mesh: auto`
counts this adds the largest layer's gathered weights, twice: the next layer's are gathered while one computes.
"""

import math
from collections import Counter
from functools import cache

from published import FURTHER, PUBLISHED

from ftjax.chips import CHIPS
from ftjax.config import Config
from ftjax.methods import lora
from ftjax.models.facts import complete_config
from ftjax.models.model import Model, build_module
from ftjax.models.registry import FAMILIES
from ftjax.train.auto_mesh import ROOM, device_bytes, state_bytes

LENGTH = 4096
SLICES = (1, 4, 8, 16, 32, 64, 128, 256)
KNOWN = PUBLISHED | FURTHER
OTHER = {  # instead of a family's example, if that has the same sizes, or its config.json is not known here
    "google/gemma-2b-it": "google/gemma-2b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "allenai/OLMoE-1B-7B-0924-Instruct": "allenai/OLMoE-1B-7B-0924",
    "Qwen/Qwen3.5-4B": "Qwen/Qwen3.5-27B",
}
SAME_SIZES = {"google/gemma-2b", "mistralai/Mixtral-8x7B-v0.1", "allenai/OLMoE-1B-7B-0924"}


def smallest_slice(model_type: str) -> str:
    """Return a family's slice, and the checkpoint if it is not the family's example; nothing if no config.json is known."""
    example = FAMILIES[model_type].example
    name = OTHER.get(example, example)
    if name not in KNOWN:
        return ""
    chips = _chips(name)
    found = f"v5e-{chips}" if chips else "more than v5e-256"
    return found if name == example or name in SAME_SIZES else f"{found} ({name.rpartition('/')[2]})"


@cache
def _chips(name: str) -> int | None:
    facts = complete_config(KNOWN[name], name)
    root = build_module(facts)
    config = Config.model_validate({
        "model": {"path": name, "remat": "full"}, "method": {"name": "lora", "r": 16, "lora_alpha": 32},
        "data": {"train": "train.jsonl", "max_length": LENGTH},
    })  # fmt: skip
    lora.attach(root, config.method)
    model = Model.of(root, facts)
    state = state_bytes(config, model)
    room = ROOM * CHIPS["v5e"].hbm
    return next((n for n in SLICES if device_bytes(model, state, n, LENGTH) + 2 * _layer(model, n) <= room), None)


def _layer(model: Model, chips: int) -> float:
    """Return the bytes of the largest layer's weights as one chip gathers them."""
    if chips == 1:
        return 0
    layers: Counter = Counter()
    for path, spec in model.frozen.items():
        if spec.stacked:
            axes = spec.row.axes
            apart = math.gcd(chips, spec.shape[axes.index("experts")]) if "experts" in axes else 1
            block = path[: path.index("block") + len("block")]
            layers[block] += 2 * math.prod(spec.shape) / math.prod(spec.stacked) / apart
    return max(layers.values())
