"""`mesh: auto`: choose the axes that the devices are divided among.

`choose_mesh` tries every way to divide the devices among data, fsdp, tensor and sequence, keeps those that divide the batch and
every parameter, and takes the one that fits in memory with the least communication. It spreads rows first, because then only
the gradients of trained parameters are reduced. It shards weights no further than memory requires, because each layer
all-gathers them. Next come the tokens of a row, and last the matrices, whose results are reduced in every layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from ftjax.config import Config, MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import AXES, divisions, sharding
from ftjax.models.model import Model
from ftjax.models.nn.param import Spec
from ftjax.placement import in_slices, tpu_slices
from ftjax.train.offload import on_devices
from ftjax.train.optimizer import make_optimizer
from ftjax.train.step import optimizer_shapes

ROOM = 0.8  # share of a device's memory; the rest is for values that live within a layer


def choose_mesh(
    config: Config, model: Model, devices: Sequence[Any], memory: int, others: Sequence[Model] = ()
) -> tuple[MeshConfig, str]:
    """Return sizes for `config.mesh`, and the reason in a sentence. TPUs report the number of their slices.

    Args:
        model: with its method attached.
        devices: all devices, of all slices.
        memory: bytes per device.
        others: further models that only read each batch, such as a teacher.

    Raises UserError if no division fits the batch and the model.
    """
    slices = config.mesh.slices if config.mesh.slices > 1 else tpu_slices(devices) or 1
    count = sum(map(len, in_slices(devices, slices)))
    rows = config.training.global_batch_size // config.training.gradient_accumulation_steps
    length = config.data.max_length
    state = state_bytes(config, model) + sum(frozen_bytes(config, other.specs) for other in others)
    saved = 2 * model.sizes.layers * model.sizes.embed  # per token: the input of every layer, which remat `full` keeps
    models = (model, *others)
    found = []
    for data, fsdp, tensor, sequence in divisions(count // slices, 4):
        spread = slices * data * fsdp
        if rows % spread or length % sequence:
            continue
        if any(one.sizes.heads % (tensor * sequence) or not _divides(one, fsdp, tensor) for one in models):
            continue
        need = state / (fsdp * tensor) + saved * (rows // spread) * (length // sequence)
        fits = need <= ROOM * memory
        found.append(((not fits, 0 if fits else need, tensor * sequence, tensor, fsdp), (data, fsdp, tensor, sequence), need))
    if not found:
        raise UserError(
            f"mesh: auto finds no division of {count} devices that fits the {rows} rows of a microbatch and the model's sizes; "
            f"set training.global_batch_size to a multiple of {count}, or the sizes of mesh by hand"
        )
    (no_room, *_), (data, fsdp, tensor, sequence), need = min(found)
    chosen = MeshConfig(data=slices * data, fsdp=fsdp, tensor=tensor, sequence=sequence, slices=slices)
    return chosen, _reason(chosen, rows, state, need, memory, bool(no_room))


def state_bytes(config: Config, model: Model) -> int:
    """Return the bytes of weights, gradients and optimizer state of one full copy, as devices hold them."""
    trained = {path: spec.abstract for path, spec in model.trainable.items()}
    optimizer = make_optimizer(config.optimizer, model.trainable, steps=1)
    moments = on_devices(optimizer_shapes(trained, optimizer))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves([trained, trained, moments])) + frozen_bytes(
        config, model.frozen
    )


def frozen_bytes(config: Config, specs: Mapping[str, Spec]) -> int:
    """Return the bytes of frozen parameters as devices hold them."""
    held = [spec.abstract if spec.row.quantization else spec.astype(config.model.dtype).abstract for spec in specs.values()]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))


def _divides(model: Model, fsdp: int, tensor: int) -> bool:
    mesh = AbstractMesh(tuple({"fsdp": fsdp, "tensor": tensor}.get(axis, 1) for axis in AXES), AXES)
    try:
        for spec in model.specs.values():
            sharding(mesh, spec.path, spec.shape, spec.row.axes)
    except UserError:
        return False
    return True


def _reason(mesh: MeshConfig, rows: int, state: int, need: float, memory: int, too_large: bool) -> str:
    gb = 1e9
    parts = []
    if mesh.fsdp * mesh.tensor > 1:
        parts.append(
            f"{state / gb:.1f} GB of weights, gradients and optimizer state are sharded over {mesh.fsdp * mesh.tensor}"
        )
    else:
        parts.append(f"{state / gb:.1f} GB of weights, gradients and optimizer state fit on each device")
    if (spread := mesh.data * mesh.fsdp) > 1:
        parts.append(f"the {rows} rows of a microbatch over {spread}")
    if mesh.sequence * mesh.tensor > 1:
        parts.append("the remaining devices share the tokens of a row or the heads")
    text = f"{'; '.join(parts)}; about {need / gb:.1f} of {memory / gb:.1f} GB per device"
    return text + (": too much, so every device that divides is used; expect to run out of memory" if too_large else "")
