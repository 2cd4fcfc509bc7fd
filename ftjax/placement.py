"""Assignment of devices to positions in a mesh.

Axes are placed in the order of their traffic: `tensor` in every product, `sequence` around attention, `expert` in every layer,
`fsdp` once per weight, `data` once per update. On TPUs JAX's own assignment of axes to dimensions of the torus is used if it
keeps each axis on neighbours. If there is none, because an axis would have to take part of a dimension, all ways to split the
dimensions are compared by the links that each axis gets, in the order of the axes. On GPUs an axis stays inside a process,
whose devices have the fast links, as far as it divides by them. CPUs are ordered by process and id, so that a configuration
means the same positions on any number of processes.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from ftjax.errors import UserError
from ftjax.torus import Near, Torus

ORDER = ("tensor", "sequence", "expert", "fsdp", "data")  # by traffic, the highest first
Parts = tuple[int, ...]  # parts of each dimension
# (parts of each dimension that an axis takes, the step from each to the next) -> a value to maximise
Value = Callable[[Parts, Parts], Any]


def arrange(sizes: Mapping[str, int], devices: Sequence[Any], slices: int = 1) -> np.ndarray:
    """Arrange the devices in an array whose dimensions are the axes of `sizes`, in its order, with slices along `data`.

    Args:
        sizes: sizes of all axes; their product is the number of devices, and `slices` divides `data`.

    Raises UserError if the devices are not in that many slices.
    """
    inside = {**sizes, "data": sizes["data"] // slices}
    blocks = [_one_slice(inside, group) for group in in_slices(devices, slices)]
    return np.concatenate(blocks, axis=list(sizes).index("data"))


def tpu_slices(devices: Sequence[Any]) -> int | None:
    """Return the number of slices of these TPUs; None for other devices, which may be in any number of slices."""
    if devices[0].platform != "tpu":
        return None
    return len({getattr(device, "slice_index", 0) for device in devices})


def in_slices(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """Return the devices of each slice; without real slices, a slice is a range of consecutive processes."""
    real = tpu_slices(devices)
    if real is not None and real != slices:
        also = f" and mesh.data to a multiple of {real}" if real > 1 else ""
        raise UserError(
            f"mesh.slices: {slices} asked for, and these {len(devices)} devices are in {real} slice(s); "
            f"set mesh.slices: {real}{also}"
        )
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if devices[0].platform == "cpu" or len(found) != slices:
        inline = by_process(devices)
        if len(inline) % slices:
            raise UserError(f"mesh.slices: {len(inline)} devices do not divide into {slices} slices")
        return [list(part) for part in np.array(inline, dtype=object).reshape(slices, -1)]
    if len(counts := {len(group) for group in found.values()}) > 1:
        have = ", ".join(map(str, sorted(counts)))
        raise UserError(f"mesh.slices: the slices of a run have equally many devices, and these have {have}")
    return [found[number] for number in sorted(found)]


def by_process(devices: Sequence[Any]) -> list[Any]:
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def near_along(grid: np.ndarray, axes: Sequence[str], torus: Torus) -> dict[str, Near]:
    """Return how near the devices along each axis of an array of one slice are, for the worst of its groups."""
    places = np.empty((*grid.shape, len(torus.shape)), dtype=int)
    for at in np.ndindex(grid.shape):
        places[at] = torus.place(grid[at])
    found = {}
    for number, axis in enumerate(axes):
        groups = np.moveaxis(places, number, -2).reshape(-1, grid.shape[number], len(torus.shape))
        near = {torus.near(map(tuple, group.tolist())) for group in groups}
        found[axis] = Near(max(n.hops for n in near), min(n.links for n in near), all(n.ring for n in near))
    return found


def _one_slice(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    platform = devices[0].platform
    if platform == "cpu":
        return np.array(by_process(devices), dtype=object).reshape(tuple(sizes.values()))
    torus = Torus.of(devices) if platform == "tpu" else None
    grid = torus.grid(devices) if torus else None
    if grid is None:
        return _on_hosts(sizes, devices)
    best = _of_jax(sizes, devices)
    if best is not None and all(near.hops <= 1 for near in near_along(best, tuple(sizes), torus).values()):
        return best

    def value(counts: Parts, steps: Parts) -> tuple:
        whole = math.prod(count for count, size in zip(counts, grid.shape, strict=True) if count == size)
        return torus.links(counts, steps), whole

    return _filled(grid, _splits(sizes, grid.shape, value), sizes)


def _of_jax(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray | None:
    """Return JAX's assignment, which takes whole dimensions of the torus; None if it has none."""
    from jax.experimental import mesh_utils

    axes = ORDER[::-1]
    try:
        found = mesh_utils.create_device_mesh([sizes[axis] for axis in axes], list(devices))
    except Exception:  # errors of several types, by the kind of chip
        return None
    return found.transpose([axes.index(axis) for axis in sizes])


def _on_hosts(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices that differ only in their process."""
    inline = by_process(devices)
    counts = {len(list(group)) for _, group in itertools.groupby(inline, lambda device: device.process_index)}
    local = counts.pop() if len(counts) == 1 else 1
    grid = np.array(inline, dtype=object).reshape(-1, local)
    return _filled(grid, _splits(sizes, grid.shape, lambda counts, _: -counts[0]), sizes)


def _splits(sizes: Mapping[str, int], shape: Parts, value: Value) -> dict[str, Parts]:
    """Return the parts of each dimension that each axis takes, maximising the values of the first axes first.

    Axes that come first are innermost, so that their devices are adjacent.
    """

    @cache
    def best(axes: tuple[str, ...], used: Parts) -> tuple[tuple, tuple[Parts, ...]]:
        if not axes:
            return (), ()
        free = tuple(size // taken for size, taken in zip(shape, used, strict=True))
        options = [(value(split, used), split) for split in _parts(sizes[axes[0]], free)]
        most = max(worth for worth, _ in options)
        found = []
        for worth, split in options:
            if worth == most:
                rest = best(axes[1:], tuple(taken * more for taken, more in zip(used, split, strict=True)))
                found.append(((worth, *rest[0]), (split, *rest[1])))
        return max(found)

    return dict(zip(ORDER, best(ORDER, (1,) * len(shape))[1], strict=True))


def _parts(size: int, free: Parts) -> Iterator[Parts]:
    """Yield the ways to take `size` positions from dimensions with so many left, split evenly."""
    if not free:
        if size == 1:
            yield ()
        return
    for count in range(1, math.gcd(size, free[0]) + 1):
        if size % count == 0 and free[0] % count == 0:
            for rest in _parts(size // count, free[1:]):
                yield (count, *rest)


def _filled(grid: np.ndarray, splits: Mapping[str, Parts], sizes: Mapping[str, int]) -> np.ndarray:
    """Split the dimensions of the grid, and join the parts of each axis."""
    outer = ORDER[::-1]
    split = grid.reshape([splits[axis][number] for number in range(grid.ndim) for axis in outer])
    order = [number * len(outer) + outer.index(axis) for axis in sizes for number in range(grid.ndim)]
    return split.transpose(order).reshape(tuple(sizes.values()))
