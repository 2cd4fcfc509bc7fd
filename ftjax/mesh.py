"""Devices in a mesh, and the one table that says which logical axis lies along which mesh axis."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ftjax.config import MeshConfig
from ftjax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis -> mesh axes. `None` (and any axis that is not listed) is replicated.
RULES: dict[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "vocab": ("tensor",),
    "loss_vocab": ("tensor", "fsdp"),  # the output projection while the loss is computed (ftjax.objectives.sft)
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": None,  # every device holds its part of each expert's mlp, not whole experts
    "layers": None,
    "norm": None,
    "rank": None,
}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh `(data, fsdp, tensor, sequence)` over all devices.

    Raises UserError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise UserError(f"mesh: {asked} does not use {len(devices)} device(s) exactly; set one axis to -1 to take what is left")
    shape = tuple(sizes[axis] for axis in AXES)
    if jax.process_count() > 1 or devices[0].platform != "cpu":
        from jax.experimental import mesh_utils

        grid = mesh_utils.create_device_mesh(shape, devices=devices)
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical axes."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def sharding(mesh: Mesh, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """Where the array `name` lies.

    Raises UserError, with the nearest sizes that work, where a dimension does not divide by its mesh axes.
    """
    for size, axis in zip(shape, axes, strict=True):
        parts = math.prod(mesh.shape[a] for a in (RULES.get(axis) or ())) if axis else 1
        if size % parts:
            mesh_axes = " x ".join(f"{a}={mesh.shape[a]}" for a in RULES[axis])
            works = [n for n in range(1, parts) if size % n == 0]
            raise UserError(
                f"{name}: its axis {axis!r} has size {size}, which does not divide by mesh {mesh_axes}; "
                f"sizes that work there: {', '.join(map(str, works))}"
                + (
                    f"; or model.pad_vocab_to_multiple_of: {parts}, which makes it {size + -size % parts}"
                    if axis == "vocab"
                    else ""
                )
            )
    return NamedSharding(mesh, spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def fitting(mesh: Mesh | jax.sharding.AbstractMesh, axis: str, size: int) -> tuple[str, ...] | None:
    """The mesh axes of a logical axis where a dimension of this size divides by them; otherwise None: replicated."""
    rule = RULES.get(axis)
    return rule if rule and size % math.prod(mesh.shape[name] for name in rule) == 0 else None


def constrain(x: jax.Array, *axes: str | None, without: str | None = None) -> jax.Array:
    """Lay an activation out by its logical axes, under `jax.set_mesh`; a dimension that does not divide stays replicated.

    Without a mesh (or with one device) this is the identity.

    Args:
        without: a mesh axis along which the array is whole all the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    entries = []
    for size, axis in zip(x.shape, axes, strict=True):
        rule = tuple(name for name in RULES.get(axis) or () if name != without) if axis else None
        fits = rule and size % math.prod(mesh.shape[a] for a in rule) == 0
        entries.append(rule if fits else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
