"""LoRA on the weights of routed experts: each expert has an update `scale * B A` of its own, as PEFT's `target_parameters`.

PEFT keeps the matrices of a weight's X experts in two: A `[X R, I]`, expert after expert, and B `[O, R X]`, in which the
experts of each rank follow each other. It wraps the module of the experts once for each weight, in the order of the module's
parameters, so that the first one's matrices are under `base_layer` if there are two (peft/tuners/lora/layer.py,
`ParamWrapper`).

Legend: X experts, I in, O out, R rank (the largest of the stacked layers).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from ftjax.config import LoraConfig
from ftjax.methods.method import Fetch
from ftjax.models.model import Model
from ftjax.models.nn.experts import UPDATE, ExpertMatrices
from ftjax.models.nn.param import INDEXED, Buffer, Init, Row, Spec, param, specs


@dataclass(frozen=True)
class ExpertsSite:
    """A weight of all experts (of all stacked layers at once).

    Attributes:
        name: of the parameter, such as `gate_up_proj`.
        names: Hugging Face's name of the parameter in each stacked layer.
    """

    path: str
    module: ExpertMatrices
    name: str
    names: tuple[str, ...]
    spec: Spec


def expert_sites(root: nnx.Module) -> Iterator[ExpertsSite]:
    """Yield every weight of routed experts, in the order of the module tree and of each module's parameters."""
    rows = specs(root)
    for path, node in list(nnx.iter_graph(root)):
        if isinstance(node, ExpertMatrices) and node.ADAPTABLE:
            layer = ".".join(map(str, path))
            for name in node.INPUT_AXES:
                spec = rows[f"{layer}.{name}"]
                yield ExpertsSite(layer, node, name, tuple(piece.name for piece in spec.pieces()), spec)


def is_targeted(name: str, config: LoraConfig) -> bool:
    """Return whether a parameter is one of `target_parameters`, by PEFT's rule: its whole name or the end of it."""
    return any(name == one or name.endswith(f".{one}") for one in config.target_parameters)


class ExpertsUpdate(nnx.Module):
    """The matrices A `[X, R, I]` and B `[X, O..., R]` of one weight; see `ftjax.models.nn.experts.product`."""

    def __init__(self, site: ExpertsSite, ranks: np.ndarray, scales: np.ndarray):
        """`ranks` and `scales`: one per stacked layer."""
        depth = len(site.spec.stacked)
        stack, stack_axes = site.spec.shape[:depth], tuple(axis for axis in site.spec.row.axes if axis in INDEXED)
        shape, axes = list(site.spec.shape[depth:]), list(site.spec.row.axes[depth:])
        at = site.module.INPUT_AXES[site.name]
        size_in, axis_in = shape.pop(at), axes.pop(at)
        rank = int(ranks.max())
        row = {"trainable": True, "adapter": True, "ranks": tuple(map(int, ranks))}
        shape_A, axes_A = (*stack, shape[0], rank, size_in), (*stack_axes, axes[0], "rank", axis_in)
        shape_B, axes_B = (*stack, *shape, rank), (*stack_axes, *axes, "rank")
        self.lora_A = param(shape_A, axes_A, "lora_A.weight", init=Init("uniform", 1 / math.sqrt(size_in)), **row)
        self.lora_B = param(shape_B, axes_B, "lora_B.weight", init=Init("zeros"), **row)
        scale = np.where(np.arange(rank) < ranks[:, None], scales[:, None], 0).astype(np.float32)
        self.scale = Buffer(scale.reshape(*stack, rank), row=Row((*stack_axes, "rank"), "scale"))

    def without_adapter(self) -> None:
        """Return what to put here when the method is removed."""
        return None


def is_of_experts(spec: Spec) -> bool:
    """Return whether a parameter is A or B of experts."""
    return spec.row.adapter and "experts" in spec.row.axes and spec.row.name.startswith("lora_")


def file_name(model: Model, spec: Spec) -> str:
    """Return PEFT's name of A or B of experts, with `{}` for the layer."""
    module = spec.module.rpartition(".")[0]
    outer = [other for other in _updated(model, spec.path) if _place(other) > _place(spec.path)]
    return f"base_model.model.{module}.{'base_layer.' * len(outer)}{spec.row.name}"


def _updated(model: Model, path: str) -> list[str]:
    """Return the paths of A or B of all weights of the same experts."""
    layer, _, end = path.rsplit(".", 2)
    return [other for other in model.specs if other.startswith(f"{layer}.") and other.endswith(f".{end}")]


def _place(path: str) -> int:
    """Return a weight's place among the parameters of PyTorch's module."""
    return ("gate_up_proj", "down_proj").index(path.rsplit(".", 2)[1].removesuffix(UPDATE))


def to_file(spec: Spec, value: np.ndarray) -> np.ndarray:
    """Convert one layer's A `[X, R, I]` or B `[X, O..., R]` to PEFT's `[X R, I]` or `[O, R X]`."""
    if spec.row.name.startswith("lora_A"):
        return value.reshape(-1, value.shape[-1])
    value = value.reshape(value.shape[0], -1, value.shape[-1])
    return np.ascontiguousarray(value.transpose(1, 2, 0)).reshape(value.shape[1], -1)


def from_file(spec: Spec, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Convert PEFT's A or B to the layout in memory, of this shape."""
    if spec.row.name.startswith("lora_A"):
        return value.reshape(shape)
    return np.ascontiguousarray(value.reshape(value.shape[0], -1, shape[0]).transpose(2, 0, 1)).reshape(shape)


def update_of(model: Model, path: str, index: tuple[int, ...], shape: tuple[int, ...], fetch: Fetch) -> np.ndarray | None:
    """Return the update of an experts' weight, float32 of this shape; None for a weight without one.

    Args:
        index: the stacked layer, and the expert and the part of its outputs where the weight is one of those.
    """
    layer = f"{path}{UPDATE}"
    if f"{layer}.lora_A" not in model.specs:
        return None
    spec = model.specs[path]
    depth = len(spec.stacked)
    lora_A = fetch(f"{layer}.lora_A", index[: depth + 1]).astype(np.float32)
    lora_B = fetch(f"{layer}.lora_B", index).astype(np.float32) * model.buffers[f"{layer}.scale"][index[:depth]]
    lora_B = lora_B.reshape(*lora_A.shape[:-2], -1, lora_B.shape[-1])
    update = lora_B @ lora_A
    inputs_last = model.specs[f"{layer}.lora_A"].row.axes[-1] == spec.row.axes[-1]
    return (update if inputs_last else np.swapaxes(update, -1, -2)).reshape(shape)


def problems(root: nnx.Module, config: LoraConfig) -> Iterator[str]:
    """Yield `target_parameters` that match nothing, and options that PEFT has not for them."""
    if not config.target_parameters:
        return
    names = [name for site in expert_sites(root) for name in site.names]
    if not names:
        yield (
            "method.target_parameters: it names weights of routed experts, and this model has none that an adapter can update; "
            "leave it out"
        )
        return
    for one in config.target_parameters:
        if not any(name == one or name.endswith(f".{one}") for name in names):
            ends = ", ".join(dict.fromkeys(".".join(name.rsplit(".", 3)[1:]) for name in names))
            yield f"method.target_parameters: no weight of experts is named {one!r}; the model has {ends}"
    for option, why in _excluded(config).items():
        yield f"method.target_parameters with {option}: {why}; leave one of them out"


def _excluded(config: LoraConfig) -> Mapping[str, str]:
    start: Any = config.init_lora_weights
    found = {
        "lora_dropout": "the updates of experts have no dropout of their inputs" if config.lora_dropout else "",
        "use_dora: true": "PEFT has no DoRA of experts" if config.use_dora else "",
        f"init_lora_weights: {start}": "" if start in (True, "gaussian") else "experts start as true or gaussian",
    }
    return {option: why for option, why in found.items() if why}
