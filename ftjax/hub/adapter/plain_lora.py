"""LoRA in the form that every tool reads: one rank for all layers, alpha = rank, and only keys for A and B.

Any scale of a layer is multiplied into its B; smaller ranks are padded with zeros, which leave the product unchanged.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax.config import LoraConfig
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import CONFIG, PREFIX, WEIGHTS, adapter_file, method_that_reads, read_adapter_config, settings_of
from ftjax.hub.public import public_name
from ftjax.hub.safetensors import Tensor, write_file
from ftjax.methods.lora_targets import scale_of
from ftjax.methods.method import Method
from ftjax.methods.saved_keys import without_newer

PATTERNS = ("rank_pattern", "alpha_pattern")  # they make layers differ, and vLLM ignores them


class Update(NamedTuple):
    """The update `b @ a` of a layer's weight; a is [r, in], b [out, r]."""

    a: np.ndarray
    b: np.ndarray


def read_updates(adapter: Path, why: str) -> tuple[dict, dict[str, Update]]:
    """Return `(adapter_config.json, the update of each module by its Hugging Face name)`.

    Args:
        why: what needs plain LoRA, for the message.

    Raises UserError if the adapter has parts that are not such an update.
    """
    saved = read_adapter_config(adapter)
    method, source = method_that_reads(adapter, saved), adapter_file(adapter)
    if parts := beyond_plain(method, saved, source.keys()):
        instead = "leave it as it is" if method.no_merge else "ftjax export --merge folds it into its base model"
        raise UserError(f"{adapter}: {why}, and this adapter has {' and '.join(parts)}; {instead}")
    config, updates = settings_of(adapter, method, saved), {}
    for name in source.keys():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            module, a, b = layer.removeprefix(PREFIX), source.read(name), source.read(f"{layer}.lora_B.weight")
            scale = np.float32(scale_of(module, a.shape[0], config))
            updates[module] = Update(a, (b * scale).astype(b.dtype))
    return saved, dict(sorted(updates.items()))


def beyond_plain(method: Method, saved: Mapping, names: Iterable[str]) -> list[str]:
    """Return what an adapter has beyond updates `b @ a` of dense layers, for a message."""
    if method.config is not LoraConfig:
        return [method.kind]
    parts = {
        "DoRA": bool(saved.get("use_dora")),
        "updates of experts (target_parameters)": bool(saved.get("target_parameters")),
        f"trained biases (bias: {saved.get('bias')})": saved.get("bias", "none") != "none",
    }
    told = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".bias")
    other = sorted(name for name in names if not name.endswith(told))
    return [part for part, found in parts.items() if found] + ([f"tensors such as {other[0]}"] if other else [])


def write_plain(folder: Path, saved: Mapping, updates: Mapping[str, Update], target_modules: list[str]) -> None:
    """Write the two files of a PEFT folder.

    Args:
        saved: an adapter_config.json; all of it is kept except ranks, layers and a local base model path.
    """
    rank = max(update.a.shape[0] for update in updates.values())
    tensors = []
    for module, (a, b) in updates.items():
        pad = rank - a.shape[0]
        parts = {"lora_A": np.pad(a, ((0, pad), (0, 0))), "lora_B": np.pad(b, ((0, 0), (0, pad)))}
        for name, value in parts.items():
            tensors.append(Tensor(f"{PREFIX}{module}.{name}.weight", value.shape, value.dtype, lambda value=value: value))
    write_file(folder / WEIGHTS, tensors)
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    if base := saved.get("base_model_name_or_path"):
        plain["base_model_name_or_path"] = public_name(base)
    plain |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None, "target_modules": target_modules}
    (folder / CONFIG).write_text(json.dumps(without_newer({**saved, **plain}), indent=2, sort_keys=True) + "\n")


def targets(saved: Mapping, updates: Mapping[str, Update]) -> list[str]:
    """Return `target_modules` for these modules: last parts of their names if the adapter's configuration used only those,
    else whole names."""
    some = saved.get("layers_to_transform") is not None or saved.get("exclude_modules")
    if some or isinstance(saved["target_modules"], str):
        return sorted(updates)
    return sorted({module.rsplit(".", 1)[-1] for module in updates})
