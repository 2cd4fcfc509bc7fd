"""Devices in a mesh, and the one table that says which logical axis lies along which mesh axis."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ftjax.config import MeshConfig
from ftjax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor", "sequence")

# Logical axis -> mesh axes. `None` (and any axis that is not listed) is replicated. Of two dimensions of one array that lie
# along the same mesh axis the first has it: experts' weights have whole experts along `expert`, all others their `embed`.
RULES: dict[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    "vocab": ("tensor",),
    "loss_vocab": ("tensor", "fsdp"),  # the output projection while the loss is computed (ftjax.objectives.sft)
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "wide": ("tensor", "fsdp", "expert"),  # an adapter's heads, kv_heads or mlp: its matrix has no `embed` to cut
    "experts": ("expert",),
    "layers": None,
    "norm": None,
    "rank": None,
}
CUT = ("fsdp", "expert")  # the mesh axes along which dense weights are cut to save memory


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of `AXES` over all devices; slices lie along `data`, the axis with the least traffic.

    Raises UserError where the sizes do not multiply to the number of devices, or the slices do not divide `data`.
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
    if sizes["data"] % config.slices:
        raise UserError(f"mesh.slices: {config.slices} slices lie along data, and data={sizes['data']} is no multiple of that")
    shape = tuple(sizes[axis] for axis in AXES)
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        return Mesh(np.asarray(devices).reshape(shape), AXES)
    from jax.experimental import mesh_utils

    if config.slices == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, devices=devices), AXES)
    inside = (shape[0] // config.slices, *shape[1:])
    across = (config.slices, *(1 for _ in shape[1:]))
    has_slices = hasattr(devices[0], "slice_index")  # GPUs and CPUs have none: a process is the unit instead
    grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices=devices, process_is_granule=not has_slices)
    return Mesh(grid, AXES)


def describe(mesh: Mesh) -> str:
    """`fsdp=4 x tensor=2`: the axes with more than one device."""
    return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def parts(sizes: Mapping[str, int], *axes: str) -> int:
    """Into how many parts dimensions with these logical axes are cut by a mesh of these sizes (`mesh.shape`)."""
    return math.prod(sizes[name] for axis in axes for name in RULES[axis] or ())


def _rules(
    axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None, sizes: Mapping[str, int] | None = None
) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension; none where it is replicated.

    Args:
        shape: of the array on a mesh of these `sizes`; a `wide` dimension that does not divide is not cut to save memory.
    """
    used: set[str] = set()
    found = []
    for number, axis in enumerate(axes):
        rule = tuple(name for name in (RULES.get(axis) or () if axis else ()) if name not in used)
        if axis == "wide" and shape and shape[number] % math.prod(sizes[name] for name in rule):
            rule = tuple(name for name in rule if name not in CUT)
        used.update(rule)
        found.append(rule)
    return found


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical axes."""
    return PartitionSpec(*(rule or None for rule in _rules(axes)))


def sharding(mesh: Mesh, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """Where the array `name` lies.

    Raises UserError, with the nearest sizes that work, where a dimension does not divide by its mesh axes.
    """
    rules = _rules(axes, shape, mesh.shape)
    for size, axis, rule in zip(shape, axes, rules, strict=True):
        count = math.prod(mesh.shape[a] for a in rule)
        if size % count:
            mesh_axes = " x ".join(f"{a}={mesh.shape[a]}" for a in rule if mesh.shape[a] > 1)
            works = [n for n in range(1, count) if size % n == 0]
            raise UserError(
                f"{name}: its axis {axis!r} has size {size}, which does not divide by mesh {mesh_axes}; "
                f"sizes that work there: {', '.join(map(str, works))}"
                + (
                    f"; or model.pad_vocab_to_multiple_of: {count}, which makes it {size + -size % count}"
                    if axis == "vocab"
                    else ""
                )
            )
    return NamedSharding(mesh, PartitionSpec(*(rule or None for rule in rules)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def fitting(mesh: Mesh | jax.sharding.AbstractMesh, axis: str, size: int) -> tuple[str, ...] | None:
    """The mesh axes of a logical axis where a dimension of this size divides by them; otherwise None: replicated."""
    rule = RULES.get(axis)
    return rule if rule and size % parts(mesh.shape, axis) == 0 else None


def constrain(x: jax.Array, *axes: str | None, without: tuple[str, ...] = ()) -> jax.Array:
    """Lay an activation out by its logical axes, under `jax.set_mesh`; a dimension that does not divide stays replicated.

    Without a mesh (or with one device, or inside `shard_map`, where each device has its part) this is the identity.

    Args:
        without: mesh axes along which the array is whole all the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    entries = []
    for size, rule in zip(x.shape, _rules(axes, x.shape, mesh.shape), strict=True):
        rule = tuple(name for name in rule if name not in without)
        entries.append(rule if rule and size % math.prod(mesh.shape[name] for name in rule) == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
