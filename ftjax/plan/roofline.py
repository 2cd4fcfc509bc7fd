"""Lower bound on the time of a step: the work for each unit of a chip, divided by the unit's speed.

    matrix units    FLOPs of the program / chips / peak
    HBM             bytes read and written / bandwidth
    ICI             bytes received over the links of a slice / bandwidth of the links along those mesh axes
    DCN             bytes received from other slices / a chip's share of its host's network

The four units work at the same time, so the largest is the bound, which no schedule can beat; a real step takes longer. Along a
dimension of the torus a chip has two links; if the dimension does not close to a ring, the chips at its ends have one, and the
whole collective waits for them. Between slices, a gather or reduction transfers only what a slice does not already have: its
parts are first combined within the slices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from ftjax.plan.hlo import Transfer
from ftjax.plan.topology import Topology
from ftjax.torus import Torus


class Traffic(NamedTuple):
    """Data that one kind of collective moves along some mesh axes in a step; bytes are those that one device receives."""

    kind: str
    axes: tuple[str, ...]
    runs: float
    ici_bytes: float
    dcn_bytes: float
    ici_seconds: float
    dcn_seconds: float


def traffic(transfers: Sequence[Transfer], mesh: Mesh, topology: Topology) -> list[Traffic]:
    """Return the transfers of a program by kind and mesh axes, the largest first."""
    found: dict[tuple, np.ndarray] = {}
    for transfer in transfers:
        axes = mesh_axes(transfer.groups, mesh)
        ici, dcn = _split(transfer, mesh)
        seconds = (ici / _ici(transfer, mesh, topology), dcn / _dcn(mesh, topology)) if topology.chip else (0.0, 0.0)
        key = transfer.kind, axes
        found[key] = found.get(key, np.zeros(5)) + np.array([transfer.runs, ici, dcn, *seconds])
    rows = [Traffic(*key, *map(float, sums)) for key, sums in found.items()]
    return sorted(rows, key=lambda row: -(row.ici_bytes + row.dcn_bytes))


def mesh_axes(groups: Sequence[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes along which devices of a group differ."""
    shape = mesh.devices.shape
    places = [np.array(np.unravel_index(group, shape)) for group in groups]
    return tuple(axis for i, axis in enumerate(mesh.axis_names) if any(np.ptp(place[i]) for place in places))


def _split(transfer: Transfer, mesh: Mesh) -> tuple[float, float]:
    """Return the bytes that a device receives from its own slice, and from others."""
    devices = mesh.devices.flat
    slices = [{_slice(devices[i]) for i in group} for group in transfer.groups]
    s, n = max(map(len, slices)), max(map(len, transfer.groups))
    if s == 1:
        return transfer.bytes, 0.0
    if transfer.kind == "collective-permute":
        share = sum(len(found) > 1 for found in slices) / len(slices)
        return transfer.bytes * (1 - share), transfer.bytes * share
    m = n // s
    whole = transfer.bytes * n / (n - 1)
    across = whole * (s - 1) / s / (1 if transfer.kind == "all-to-all" else m)
    return whole * (m - 1) / m, across


def _ici(transfer: Transfer, mesh: Mesh, topology: Topology) -> float:
    """Return the bytes/s that a device can receive from its group over the slice's links."""
    chip, devices = topology.chip, list(mesh.devices.flat)
    link = chip.link_bandwidth * chip.share(devices[0])
    if transfer.kind == "collective-permute":  # sends to one neighbour; two run at a time, one in each direction
        return 2 * link
    torus = Torus.of([device for device in devices if _slice(device) == _slice(devices[0])])
    group = [devices[i] for i in transfer.groups[0] if _slice(devices[i]) == _slice(devices[transfer.groups[0][0]])]
    return link * torus.near(map(torus.place, group)).links


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def _dcn(mesh: Mesh, topology: Topology) -> float:
    return topology.chip.dcn_per_chip * topology.chip.share(mesh.devices.flat[0])


def bound_of(
    flops: float, hbm_bytes: float, rows: Sequence[Traffic], mesh: Mesh, topology: Topology
) -> tuple[dict[str, float], str, float]:
    """Return the least time of each unit (`seconds`), the unit that is the bound, and its time."""
    found = seconds(flops, hbm_bytes, rows, mesh, topology)
    bound = max(found, key=found.get)
    return found, bound, found[bound]


def seconds(flops: float, hbm_bytes: float, rows: Sequence[Traffic], mesh: Mesh, topology: Topology) -> dict[str, float]:
    """Return the least time of each unit, from `flops` on all devices and `hbm_bytes` on one."""
    chip, device = topology.chip, mesh.devices.flat[0]
    share = chip.share(device)
    return {
        "matrix units": flops / mesh.size / (chip.peak * share),
        "HBM": hbm_bytes / (chip.hbm_bandwidth * share),
        "ICI": sum(row.ici_seconds for row in rows),
        "DCN": sum(row.dcn_seconds for row in rows),
    }
