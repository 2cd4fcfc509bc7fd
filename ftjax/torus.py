"""The network of a slice: positions of chips, dimensions that close to rings, and the distances within a group.

TPU chips form a grid of two or three dimensions and have a link to each neighbour. Devices that are one of a chip's two cores
(2 and 3, 7x) have one more dimension.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ftjax.chips import chip_of

# The connection of a 7x chip's two cores has the bandwidth of six links: docs.cloud.google.com/tpu/docs/tpu7x.
CORE_LINKS = 6.0
Place = tuple[int, ...]


class Near(NamedTuple):
    """Distances within a group of devices.

    Attributes:
        hops: links from each device to the next of the group; 1 if none of another group is between them.
        links: links over which each device receives at the same time; below 1 if groups share a link.
        ring: whether there is a ring through all of them.
    """

    hops: int
    links: float
    ring: bool


def closes(torus: int, shape: Sequence[int]) -> tuple[bool, ...]:
    """Return which dimensions close to rings: in a v5e or v6e pod those of 16 chips; in a v4, v5p or v7x slice of whole cubes
    of 4 x 4 x 4, all three.

    Args:
        torus: dimensions of the chip's torus (`Chip.torus`).
    """
    if torus == 2:
        return tuple(size == 16 for size in shape)
    return (torus == 3 and all(size % 4 == 0 for size in shape),) * len(shape)


@dataclass(frozen=True)
class Torus:
    """A box of chips; the last dimension of `shape` counts the devices of a chip."""

    shape: tuple[int, ...]
    closed: tuple[bool, ...]
    origin: Place

    @classmethod
    def of(cls, devices: Sequence[Any]) -> "Torus | None":
        """Return the smallest box around these devices of one slice; None if they do not have coordinates."""
        if getattr(devices[0], "coords", None) is None:
            return None
        places = np.array([_place(device) for device in devices])
        low, shape = places.min(0), np.ptp(places, 0) + 1
        chip = chip_of(devices[0].device_kind)
        torus = chip.torus if chip else 0
        closed = (*closes(torus, shape[:torus].tolist()), *(False,) * (len(shape) - torus))
        return cls(tuple(shape.tolist()), closed, tuple(low.tolist()))

    def place(self, device: Any) -> Place:
        return tuple(at - low for at, low in zip(_place(device), self.origin, strict=True))

    def grid(self, devices: Sequence[Any]) -> np.ndarray | None:
        """Return the devices by position; None if they do not fill the box, or two have the same position."""
        found = np.empty(self.shape, dtype=object)
        for device in devices:
            found[self.place(device)] = device
        return found if len(devices) == found.size and all(device is not None for device in found.flat) else None

    def links(self, counts: Sequence[int], steps: Sequence[int]) -> float:
        """Return the links over which each device of a group receives, for the worst device, up to those of the chip.

        A ring has two links, a line one, at its ends; a path over `steps` links at a time shares each with as many groups. Data
        that both cores of a chip need arrives once.

        Args:
            counts: devices of the group along each dimension.
            steps: distance from one to the next.
        """
        *chips, cores = zip(counts, steps, self.shape, strict=True)
        closed = zip(chips, self.closed, strict=False)
        total = sum((2 if ring and count * step == size else 1) / step for (count, step, size), ring in closed if count > 1)
        return float(total * cores[0] or (CORE_LINKS if cores[0] > 1 else 0))

    def near(self, places: Iterable[Place]) -> Near:
        """Return the distances within the group of devices at these positions."""
        points = np.array(sorted(set(places)))
        return _near(self, tuple(map(tuple, (points - points.min(0)).tolist())))


def _place(device: Any) -> Place:
    return (*device.coords, getattr(device, "core_on_chip", 0))


@lru_cache(maxsize=4096)
def _near(torus: Torus, places: tuple[Place, ...]) -> Near:
    if len(places) == 1:
        return Near(0, math.inf, True)
    points = np.array(places)
    along = [np.unique(column) for column in points.T]
    counts = [len(values) for values in along]
    gaps = [np.diff(values) if len(values) > 1 else np.ones(1, int) for values in along]
    if math.prod(counts) == len(places):  # a box, or some of its rows and columns
        hops = max(int(gap.max()) for gap in gaps)
        steps = [
            int(gap[0]) if np.ptp(gap) == 0 else -(-int(np.ptp(values) + 1) // count)  # uneven: as many groups as fit between
            for gap, values, count in zip(gaps, along, counts, strict=True)
        ]
        links = torus.links(counts, steps)
        several = sum(count > 1 for count in counts) > 1 and len(places) % 2 == 0
        return Near(hops, links, hops == 1 and (len(places) == 2 or several or links >= 2))
    away = np.abs(points[:, None] - points[None])
    size, closed = np.array(torus.shape), np.array(torus.closed)
    away = np.where(closed, np.minimum(away, size - away), away).sum(-1)
    hops = next(hops for hops in range(1, int(away.max()) + 1) if _joined(away <= hops))
    ring = hops == 1 and bool((away == 1).sum(1).min() >= 2)
    return Near(hops, (2.0 if ring else 1.0) / hops, ring)


def _joined(links: np.ndarray) -> bool:
    """Return whether each device can be reached from the first."""
    reached = links[0]
    while (more := links[reached].any(0)).sum() > reached.sum():
        reached = more
    return bool(reached.all())
