"""The device mesh, and the one table of rules that map logical axes to mesh axes."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ftjax.chips import chip_of
from ftjax.config import MeshConfig
from ftjax.errors import UserError
from ftjax.placement import ORDER, arrange, in_slices, near_along, tpu_slices
from ftjax.torus import Near, Torus

AXES = ("data", "fsdp", "expert", "tensor", "sequence")

# Logical axis -> mesh axes. `None` (and any axis that is not listed) is replicated. If two dimensions of an array map to the
# same mesh axis, the first takes it: experts' weights have whole experts along `expert`, all others their `embed`.
RULES: dict[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "samples": ("data", "fsdp", "expert", "tensor"),  # rows whose next token is chosen, each from its whole vocabulary
    "length": ("sequence",),
    "vocab": ("tensor",),
    "loss_vocab": ("tensor", "fsdp", "expert"),  # the output projection during the loss (ftjax.objectives.sft)
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "wide": ("tensor", "fsdp", "expert"),  # an adapter's heads, kv_heads or mlp: its matrix has no `embed` to shard
    "experts": ("expert",),
    "layers": None,
    "norm": None,
    "rank": None,
}
WEIGHT_AXES = ("fsdp", "expert")  # mesh axes that dense weights are sharded along to save memory


def devices_or_all(devices: Sequence[Any] | None) -> list[Any]:
    """Return the devices, or with None all that JAX sees. Raises UserError if there are none, or one is there twice."""
    if devices is None:
        return jax.devices()
    if not len(devices):
        raise UserError("devices: expected some of jax.devices(), or None for all; found none")
    if len(set(devices)) < len(devices):
        raise UserError(f"devices: expected each device once; found one more than once among {', '.join(map(str, devices))}")
    return list(devices)


def divided(config: MeshConfig, devices: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the devices that train, and those that only generate (`rollout_devices`): equally many of each process, its last
    ones, to which that process's other devices send weights.

    Raises UserError if the processes cannot have equally many, one would have none left to train, or XLA does not compile for
    those that are left.
    """
    count = config.rollout_devices
    if not count:
        return list(devices), []
    places: dict[int, list[int]] = {}  # in `devices`, by process
    for place, device in enumerate(devices):
        places.setdefault(device.process_index, []).append(place)
    processes, least = len(places), min(map(len, places.values()))
    most = processes * (least - 1)
    if processes == 1 and count > most:
        raise UserError(
            f"mesh.rollout_devices: {count} of {len(devices)} device(s) leave none to train on; choose at most {most}"
        )
    if count % processes or count > most:
        found = f"{count} of {len(devices)} devices on {processes} processes (hosts)"
        below = min(most, count - count % processes)
        near = [n for n in (below, below + processes) if 0 < n <= most]
        choose = f"choose {' or '.join(map(str, near))}, or leave it out" if near else "leave it out"
        raise UserError(
            f"mesh.rollout_devices: {found}: each process generates on equally many of its own devices and trains on the "
            f"others, and one has {least}; {choose}, so that all devices generate and train in turn"
        )
    if processes > 1 and (chip := chip_of(devices[0].device_kind)) is not None and chip.torus == 2:
        # libtpu 0.0.42: "On platforms with limited ICI routing device assignment should include all slice devices"
        raise UserError(
            f"mesh.rollout_devices: {count} of {len(devices)} devices on {processes} processes (hosts): for several hosts of "
            f"{chip.name}, whose chips route little past each other, XLA compiles an update only on all chips of a slice; "
            "leave it out, so that all devices generate and train in turn, or use one host"
        )
    last = {place for own in places.values() for place in own[-(count // processes) :]}
    train = [device for place, device in enumerate(devices) if place not in last]
    return train, [devices[place] for place in sorted(last)]


def of_process(devices: Iterable[Any], process: int) -> list[Any]:
    """Return those of the devices that a process has."""
    return [device for device in devices if device.process_index == process]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh of `AXES` over the devices, with slices along `data`, the axis with the least traffic.

    Args:
        devices: devices to use, of all processes; None uses all.

    Raises UserError, with the nearest possible sizes, if the sizes do not multiply to the number of devices, if the slices do
    not divide `data`, or if the TPUs are not in that many slices.
    """
    devices = devices_or_all(devices)
    slices = config.slices
    if config.auto and slices == 1:
        slices = tpu_slices(devices) or 1
    in_slices(devices, slices)  # check the number of slices first: it decides which sizes are possible
    asked = {axis: getattr(config, axis) for axis in AXES}
    if config.auto:  # without a batch to choose by, shard weights within slices
        asked["data"] = slices
    return Mesh(arrange(_sizes(asked, slices, len(devices)), devices, slices), AXES)


def _sizes(asked: Mapping[str, int], slices: int, devices: int) -> dict[str, int]:
    """Return the sizes of all axes, none of them -1."""
    open_axis = next((axis for axis, size in asked.items() if size == -1), None)
    fixed = math.prod(size for size in asked.values() if size != -1)
    sizes = {axis: devices // fixed if axis == open_axis else size for axis, size in asked.items()}
    if math.prod(sizes.values()) != devices:
        said = " x ".join(f"{axis}={size}" for axis, size in asked.items() if size != 1) or "data=1"
        why = (
            f"{open_axis} takes what the other axes leave, and their {fixed} places do not divide the devices"
            if open_axis
            else "set one axis to -1 to take what is left"
        )
        near = _nearest(asked, devices, slices)
        raise UserError(f"mesh: {said} does not use {devices} device(s) exactly: {why}. {near}")
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.slices: {slices} slices are placed along data, and data={sizes['data']} is not a multiple of that. "
            f"{_nearest(asked, devices, slices)}"
        )
    return sizes


def _nearest(asked: Mapping[str, int], devices: int, slices: int) -> str:
    """Name the possible meshes that change least of what was asked, `data` and `fsdp` sooner than the other axes."""
    weights = dict(zip(ORDER, range(len(ORDER), 0, -1), strict=True))

    def far(sizes: tuple[int, ...]) -> float:
        changed = [
            weights[axis] * (1 + abs(math.log2(size / asked[axis])))
            for axis, size in zip(AXES, sizes, strict=True)
            if asked[axis] not in (-1, size)
        ]
        return sum(changed)

    near = sorted((sizes for sizes in divisions(devices, len(AXES)) if sizes[0] % slices == 0), key=far)[:3]
    return "Nearest that can be made: " + ", or ".join(_words(dict(zip(AXES, sizes, strict=True))) for sizes in near)


def divisions(devices: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to divide the devices among so many axes."""
    if axes == 1:
        yield (devices,)
        return
    for size in (n for n in range(1, devices + 1) if devices % n == 0):
        for rest in divisions(devices // size, axes - 1):
            yield (size, *rest)


def _words(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def describe(mesh: Mesh) -> str:
    """Format the axes with more than one device: `fsdp=4 x tensor=2`."""
    return _words(mesh.shape)


class Crossing(NamedTuple):
    """Whether devices along an axis belong to different processes (one per host), and to different TPU slices."""

    hosts: bool
    slices: bool


def crossings(mesh: Mesh) -> dict[str, Crossing]:
    """Return what each axis crosses."""
    found = {}
    for number, axis in enumerate(mesh.axis_names):
        lines = np.moveaxis(mesh.devices, number, -1).reshape(-1, mesh.devices.shape[number])
        hosts = any(len({device.process_index for device in line}) > 1 for line in lines)
        found[axis] = Crossing(hosts, any((tpu_slices(line) or 1) > 1 for line in lines))
    return found


def nearness(mesh: Mesh) -> dict[str, Near] | None:
    """Return how near the devices along each axis are in the network of a TPU slice; None if that is not known."""
    slices = tpu_slices(list(mesh.devices.flat))
    if slices is None:
        return None
    block = mesh.devices[: mesh.shape["data"] // slices]
    devices = list(block.flat)
    torus = Torus.of(devices)
    return None if torus is None or torus.grid(devices) is None else near_along(block, mesh.axis_names, torus)


def notes(mesh: Mesh) -> list[str]:
    """Describe the costs of the mesh compared with one with all axes on rings of neighbours, a sentence each."""
    first = mesh.devices.flat[0]
    named = {axis: f"{axis}={size}" for axis, size in mesh.shape.items()}
    if first.platform == "gpu":
        over = [named[axis] for axis, crossing in crossings(mesh).items() if crossing.hosts and axis not in ("data", "fsdp")]
        return [f"{' and '.join(over)}: more than the devices of a process, so over the network of hosts"] if over else []
    near = nearness(mesh)
    if near is None:
        alone = first.platform != "tpu" or mesh.size == 1
        return [] if alone else ["these chips do not fill a box of a slice, so neighbours in the mesh need not be neighbours"]
    apart = {axis: found for axis, found in near.items() if found.hops > 1}
    lines = [named[axis] for axis, found in near.items() if found.hops == 1 and not found.ring]
    said = [
        f"{named[axis]}: the chips of a group are up to {found.hops} hops apart and share links with other groups: "
        f"{found.links:.2g} link(s) each, and neighbours in a ring have 2"
        for axis, found in apart.items()
    ]
    if lines:
        said.append(f"{' and '.join(lines)}: on a line of neighbours that does not close, with 1 link each, and a ring has 2")
    return said


def parts(sizes: Mapping[str, int], *axes: str) -> int:
    """Return the number of shards of dimensions with these logical axes on a mesh of these sizes (`mesh.shape`)."""
    return math.prod(sizes[name] for axis in axes for name in RULES[axis] or ())


def _rules(
    axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None, sizes: Mapping[str, int] | None = None
) -> list[tuple[str, ...]]:
    """Return the mesh axes of each dimension; none if it is replicated.

    Args:
        shape: of the array on a mesh of these `sizes`; a `wide` dimension that does not divide is not sharded to save memory.
    """
    used: set[str] = set()
    found = []
    for number, axis in enumerate(axes):
        rule = tuple(name for name in (RULES.get(axis) or () if axis else ()) if name not in used)
        if axis == "wide" and shape and shape[number] % math.prod(sizes[name] for name in rule):
            rule = tuple(name for name in rule if name not in WEIGHT_AXES)
        used.update(rule)
        found.append(rule)
    return found


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Return the PartitionSpec of an array whose dimensions have these logical axes."""
    return PartitionSpec(*(rule or None for rule in _rules(axes)))


def sharding(mesh: Mesh, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """Return the sharding of the array `name`.

    Raises UserError, with the nearest sizes that work, if a dimension does not divide by its mesh axes.
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
    """Return the mesh axes of a logical axis if a dimension of this size divides by them; otherwise None: replicated."""
    rule = RULES.get(axis)
    return rule if rule and size % parts(mesh.shape, axis) == 0 else None


def axis_of_samples(mesh: Mesh | jax.sharding.AbstractMesh, rows: int) -> str:
    """Return the logical axis of rows whose next token is chosen: over all devices if their number divides so."""
    return "samples" if not mesh.empty and fitting(mesh, "samples", rows) else "batch"


def dividing(
    mesh: Mesh | jax.sharding.AbstractMesh, shape: tuple[int, ...], axes: tuple[str | None, ...], without: tuple[str, ...] = ()
) -> PartitionSpec:
    """Return the PartitionSpec of an array, with the dimensions that do not divide replicated.

    Args:
        without: mesh axes that the array is not sharded along.
    """
    entries = []
    for size, rule in zip(shape, _rules(axes, shape, mesh.shape), strict=True):
        rule = tuple(name for name in rule if name not in without)
        entries.append(rule if rule and size % math.prod(mesh.shape[name] for name in rule) == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None, without: tuple[str, ...] = ()) -> jax.Array:
    """Constrain the sharding of an activation by its logical axes, under `jax.set_mesh`.

    A dimension that does not divide stays replicated. Without a mesh (or with one device, or inside `shard_map`, where each
    device has its shard) this is the identity.

    Args:
        without: mesh axes that the array is not sharded along.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, dividing(mesh, x.shape, axes, without))
