"""Device groups of a collective, from any of the notations that XLA uses."""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

Groups = tuple[tuple[int, ...], ...]  # indices in the flattened mesh


def groups_of(text: str, devices: int) -> Groups:
    """Parse the device groups of a collective within slices.

    Args:
        devices: number of devices, which form one group if the text names none.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0] + "}"))
    at = text.find("replica_groups=")
    rest = text[at + len("replica_groups=") :] if at >= 0 else ""
    if rest.startswith("mesh["):
        return _mesh_groups(rest, devices)
    if rest.startswith("["):  # [groups, size]<=[dims]T(permutation)
        match = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
        shape, dims = ([int(n) for n in part.split(",")] for part in match.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            ids = ids.transpose([int(n) for n in match[3].split(",")])
        return tuple(map(tuple, ids.reshape(shape).tolist()))
    if rest.startswith("{{"):
        listed = re.findall(r"\{([\d, ]+)\}", rest[: rest.find("}}") + 1])
        return tuple(tuple(map(int, re.findall(r"\d+", group))) for group in listed)
    return (tuple(range(devices)),)


def slice_groups(text: str, places: Mapping[int, int]) -> Groups:
    """Parse the device groups of a transfer between slices: `{1,2}x{0:15}` joins each of devices 0 to 15 of slices 1 and 2 with
    the device of the same number, with ids of slice s starting at 100000 s; `{{200000->100008},{200004->100012}}` are pairs of
    ids.
    """
    target = re.search(r'_xla_megascale_target="?([^"]*?)(?:"|,_xla)', text)[1]
    if pairs := re.findall(r"(\d+)->(\d+)", target):
        return tuple((places[int(a)], places[int(b)]) for a, b in pairs)
    slices, devices = (re.findall(r"(\d+)(?::(\d+))?", part) for part in target.split("x"))
    numbers = [[n for a, b in found for n in range(int(a), int(b or a) + 1)] for found in (slices, devices)]
    return tuple(tuple(places[100000 * s + device] for s in numbers[0]) for device in numbers[1])


def _mesh_groups(text: str, devices: int) -> Groups:
    """Parse `mesh['a'=4,'b'=4] {'a'}`, with sub-axes: `'a':(2)2` is the sub-axis of size 2 after a sub-axis of size 2."""
    end = balanced(text, 4)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text[:end])}
    rest = text[end:]
    ids = np.arange(devices)
    # `[2,4]T(1,0)`: the numbers from 0, in these dimensions and then transposed; or the ids themselves, one of which is 0.
    written = re.match(r",?\s*device_ids=\(?(?:\[[\d,]+\]<=)?\[?([\d,]+)\]?(?:T\(([\d,]+)\))?\)?", rest)
    if written:
        numbers = [int(n) for n in written[1].split(",")]
        if math.prod(numbers) == devices:
            ids = ids.reshape(numbers)
            ids = ids.transpose([int(n) for n in written[2].split(",")]) if written[2] else ids
        else:
            ids = np.array(numbers)
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", rest[rest.find("{") : rest.find("}") + 1])
    axes, dims = [], []
    for name, size in sizes.items():
        parts = [(int(before or 1), int(part or size)) for other, before, part in chosen if other == name]
        cuts = sorted({1, size, *itertools.chain.from_iterable((before, before * part) for before, part in parts)})
        for low, high in itertools.pairwise(cuts):
            axes.append(any(before <= low and high <= before * part for before, part in parts))
            dims.append(high // low)
    ids = ids.reshape(dims or [devices])
    last = [i for i, inside in enumerate(axes) if inside]
    first = [i for i, inside in enumerate(axes) if not inside]
    size = math.prod(dims[i] for i in last)
    return tuple(map(tuple, ids.transpose(first + last).reshape(-1, size).tolist()))


def balanced(text: str, start: int) -> int:
    """Return the index after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
            if not depth:
                return place + 1
    return len(text)
