"""Data that a compiled program moves through HBM and over links, from its HLO text, with the trip counts of loops.

The text is the program of one device. XLA's own analysis counts the body of a loop once; here it counts as often as it runs.

Bytes of a collective are those that one device receives, with a ring or an equally good algorithm:

    all-gather, reduce-scatter, all-to-all    B (n - 1) / n        B: bytes of the whole, n: devices of a group
    all-reduce                                2 B (n - 1) / n
    collective-permute                        B

Transfers between slices are not among the collectives of a compiled program: XLA has split each into a collective within
slices, and a send and a receive through the host, which name the whole collective.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jax.sharding import Mesh

from ftjax.models.nn.loops import named_runs
from ftjax.plan.groups import balanced, groups_of, slice_groups

_HEAD = re.compile(r"^(?:ENTRY )?%([\w.$-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_KINDS = {kind.upper().replace("-", "_"): kind for kind in COLLECTIVES} | {"ONE_TO_ONE": "collective-permute"}
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
_OVERWRITES = {"dynamic-update-slice": 1, "scatter": 2}  # a part of their first operand, by the operand of this number
_RENAMED = ("bitcast", "reshape", "copy", "convert", "transpose")


class Array(NamedTuple):
    bytes: float
    in_hbm: bool  # a TPU's VMEM and SMEM are marked in the layout
    dims: tuple[int, ...] = ()


class Instruction(NamedTuple):
    name: str
    arrays: tuple[Array, ...]  # results
    opcode: str
    operands: tuple[str, ...]
    text: str  # the text after the operands
    root: bool

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    def called(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.$-]+)", self.text)
        return found and found[1]


class Transfer(NamedTuple):
    """A collective of one step, over all its runs."""

    kind: str
    bytes: float  # received by one device in a step
    runs: float
    groups: tuple[tuple[int, ...], ...]  # indices in the flattened mesh


@dataclass(frozen=True)
class Program:
    """An optimised HLO module as text (`jax.stages.Compiled.as_text()`) of `devices` devices.

    Attributes:
        ids: their `jax.Device.id`, in the order of the flattened mesh; needed with several slices.
    """

    text: str
    devices: int
    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, compiled: Any, mesh: Mesh) -> "Program":
        return cls(compiled.as_text(), mesh.size, tuple(device.id for device in mesh.devices.flat))

    @cached_property
    def computations(self) -> dict[str, dict[str, Instruction]]:
        found: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in self.text.splitlines():
            if line.startswith((" ", "\t")):
                instruction = _instruction(line)
                if instruction:
                    current[instruction.name] = instruction
            elif head := _HEAD.match(line):
                current = found.setdefault(head[1], {})
        return found

    @cached_property
    def entry(self) -> str:
        return re.search(r"^ENTRY %?([\w.$-]+)", self.text, re.MULTILINE)[1]

    @cached_property
    def runs(self) -> dict[str, float]:
        """Runs of each computation in one step, without fused ones."""
        counts: dict[str, float] = {}

        def visit(name: str, times: float) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                for called, more in self._calls(instruction):
                    visit(called, times * more)

        visit(self.entry, 1.0)
        return counts

    def _calls(self, instruction: Instruction) -> list[tuple[str, float]]:
        """Return the computations that an instruction runs, and how often; each branch of a conditional once."""
        if instruction.opcode == "while":
            return [(instruction.called("body"), self.trip_count(instruction))]
        if instruction.opcode == "call" or instruction.opcode.startswith("async-start"):
            return [(instruction.called("to_apply") or instruction.called("calls"), 1)]
        return [(branch, 1) for branch in _branches(instruction.text)] if instruction.opcode == "conditional" else []

    def trip_count(self, loop: Instruction) -> int:
        """Return XLA's annotation if there is one, else the runs that the program names, else the bound that the condition
        compares the counter with."""
        noted = re.search(r'"?known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.text)
        if noted:
            return int(noted[1])
        name = re.search(r'op_name="([^"]*)', loop.text)
        if name and (runs := named_runs(name[1])) is not None:
            return runs
        bounds = [
            int(instruction.text[1:].split(")")[0])
            for instruction in self._with_fused(loop.called("condition"))
            if instruction.opcode == "constant" and re.match(r"\(\d+\)", instruction.text)
        ]
        return -(-max(bounds, default=1) // self._stride(loop))

    def _stride(self, loop: Instruction) -> int:
        """Return a loop counter's step per run of the body: two in loops of permutes, which the partitioner unrolls."""
        compared = next((i for i in self.computations[loop.called("condition")].values() if i.root), None)
        condition, body = (self.computations[loop.called(key)] for key in ("condition", "body"))
        places = [
            int(found[1])
            for name in (compared.operands if compared else ())
            if name in condition and (found := re.search(r"index=(\d+)", condition[name].text))
        ]
        root = next((i for i in body.values() if i.root), None)
        if len(places) != 1 or root is None or places[0] >= len(root.operands):
            return 1
        stride, at = 0, body.get(root.operands[places[0]])
        while at is not None and at.opcode in ("add", *_RENAMED):
            steps = [body[name] for name in at.operands if name in body]
            added = [i for i in steps if i.opcode == "constant" and re.match(r"\(\d+\)", i.text)]
            stride += sum(int(i.text[1:].split(")")[0]) for i in added)
            at = next((i for i in steps if i not in added), None)
        return stride or 1

    def _with_fused(self, name: str) -> Iterator[Instruction]:
        """Yield the instructions of a computation, and of what it has fused."""
        for instruction in self.computations[name].values():
            yield instruction
            if instruction.opcode == "fusion":
                yield from self._with_fused(instruction.called("calls"))

    # ---- links ----

    def transfers(self) -> list[Transfer]:
        """Return every collective of a step."""
        found = []
        for name, times in self.runs.items():
            for instruction, inside in self._started(name):
                kind = instruction.opcode.removesuffix("-start")
                if inside.startswith("all-reduce-scatter"):  # a TPU's reduce-scatter is a fusion
                    kind = "reduce-scatter"
                groups = groups_of(instruction.text, self.devices)
                size = _payload(instruction, self.computations[inside], kind)
                n = max(map(len, groups), default=self.devices)
                if n > 1:
                    found.append(Transfer(kind, times * size * _factor(kind, n), times, groups))
            found += self._between_slices(name, times)
        return found

    def _between_slices(self, name: str, times: float) -> Iterator[Transfer]:
        """Yield what a computation receives from other slices."""
        for instruction in self.computations[name].values():
            type_ = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
            if instruction.opcode == "recv" and type_:
                kind = _KINDS[type_[1]]
                groups = slice_groups(instruction.text, {device: place for place, device in enumerate(self.ids)})
                n = max(map(len, groups))
                whole = instruction.arrays[0].bytes * (n if kind == "reduce-scatter" else 1)
                yield Transfer(kind, times * whole * _factor(kind, n), times, groups)

    def _started(self, name: str) -> list[tuple[Instruction, str]]:
        """Return a computation's collectives, and the computation of each. A TPU splits a collective over several fusions,
        between its start and its end, and repeats it in each of them: there the same channel means the same collective. Outside
        of fusions it need not: on a CPU, all calls in a `shard_map` share one channel."""
        found = {}
        for instruction, inside in self._collectives(name):
            channel = re.search(r"channel_id=\d+", instruction.text)
            same = (channel[0], instruction.opcode, instruction.bytes) if channel and inside != name else instruction.name
            found.setdefault(same, (instruction, inside))
        return list(found.values())

    def _collectives(self, name: str) -> Iterator[tuple[Instruction, str]]:
        for instruction in self.computations[name].values():
            if instruction.opcode.removesuffix("-start") in COLLECTIVES:
                yield instruction, name
            elif instruction.opcode == "fusion":
                yield from self._collectives(instruction.called("calls"))

    # ---- HBM ----

    def hbm_bytes(self, branches: Callable[[list[float]], float] = sum) -> float:
        """Return the bytes read and written in a device's HBM in a step; values within a fusion are free.

        Args:
            branches: what those of a conditional come to: `sum`, or `min` if each takes the one that moves least.
        """
        return self._moved(self.entry, branches)

    def _moved(self, name: str, branches: Callable[[list[float]], float]) -> float:
        own = self.computations[name]
        total = sum(self._traffic(instruction, own) for instruction in own.values())
        for instruction, inside in self._started(name):
            operands = [self.computations[inside].get(operand) for operand in instruction.operands]
            arrays = [*instruction.arrays, *(array for operand in operands if operand for array in operand.arrays)]
            halves = 2 if instruction.opcode.endswith("-start") else 1  # the results of a start contain its operands
            total += sum(array.bytes for array in arrays if array.in_hbm) / halves
        for instruction in own.values():
            inner = [(times, self._moved(called, branches)) for called, times in self._calls(instruction)]
            moved = [times * one for times, one in inner]
            total += branches(moved) if instruction.opcode == "conditional" else sum(moved)
        return total

    def _traffic(self, instruction: Instruction, others: Mapping[str, Instruction]) -> float:
        opcode = instruction.opcode
        if opcode in _NO_TRAFFIC or opcode.endswith("-done") or "ConcatBitcast" in instruction.text[:200]:
            return 0
        if opcode.removesuffix("-start") in COLLECTIVES or instruction.name.startswith("async-collective-"):
            return 0  # counted with the collectives
        out = sum(array.bytes for array in instruction.arrays if array.in_hbm)
        operands = [others.get(name) for name in instruction.operands]
        if opcode == "fusion":
            return self._fusion_traffic(instruction, operands)
        if opcode == "custom-call" and "ragged_paged_attention" in instruction.text:
            return out + _pages_read(*(one.arrays[0] for one in operands if one))
        if opcode in ("dynamic-slice", "slice", "gather"):
            return out + (instruction.bytes if operands[0] and _in_hbm(operands[0]) else 0)
        if opcode in ("copy-start", "slice-start"):  # results: source and destination (the source may be part of a tuple)
            moved = instruction.arrays[0 if opcode == "copy-start" else 1].bytes
            return moved * sum(array.in_hbm for array in instruction.arrays[:2])
        if opcode in _OVERWRITES:
            update = operands[_OVERWRITES[opcode]]
            return (update.bytes if update else 0) * ((1 if update and _in_hbm(update) else 0) + (1 if out else 0))
        return out + sum(o.bytes for o in operands if o is not None and _in_hbm(o))

    def _fusion_traffic(self, fusion: Instruction, operands: list[Instruction | None]) -> float:
        inner = self.computations[fusion.called("calls")]
        parameters, users = _parameters(inner), _users(inner)
        total, in_place = 0.0, self._in_place(inner)
        passed: dict[int, int] = {}  # results that are operands of a collective to be finished
        if any(instruction.opcode in COLLECTIVES for instruction in inner.values()):
            passed = {int(a): int(b) for a, b in re.findall(r"\{(\d+)\}: \((\d+),", fusion.text.partition("calls=")[0])}
        for number, operand in enumerate(operands):
            if operand is None or not _in_hbm(operand) or number not in parameters or number in passed.values():
                continue
            total += self._read(parameters[number], users, operand.bytes)
        roots = [i for i in inner.values() if i.root]
        results = [inner[name] for name in roots[0].operands] if roots and roots[0].opcode == "tuple" else roots
        for number, (array, result) in enumerate(zip(fusion.arrays, results, strict=False)):
            if array.in_hbm and number not in passed:
                total += in_place.get(result.name, array.bytes)
        return total

    def _read(self, parameter: Instruction, users: Mapping[str, list[Instruction]], whole: float) -> float:
        """Return the bytes that a fusion reads of a parameter: all, or its slices; nothing of what it only overwrites."""
        total = 0.0
        for user in users.get(parameter.name, ()):
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.bytes
            elif user.opcode == "bitcast" and not user.root:
                total += self._read(user, users, whole)
            elif user.opcode == "fusion":  # a nested fusion
                inner = self.computations[user.called("calls")]
                own = _parameters(inner)[user.operands.index(parameter.name)]
                total += self._read(own, _users(inner), whole)
            elif user.opcode in _OVERWRITES and user.operands[0] == parameter.name:
                continue
            else:
                return whole
        return min(total, whole)

    @staticmethod
    def _in_place(inner: Mapping[str, Instruction]) -> dict[str, float]:
        """Return results that are an operand with a part overwritten, and the bytes of that part."""
        found = {}
        for instruction in inner.values():
            at = instruction
            while at.opcode in _RENAMED and at.operands and at.operands[0] in inner:
                at = inner[at.operands[0]]
            if at.opcode in _OVERWRITES:
                found[instruction.name] = inner[at.operands[_OVERWRITES[at.opcode]]].bytes
        return found


def _parameters(inner: Mapping[str, Instruction]) -> dict[int, Instruction]:
    """Return a fused computation's parameters by index."""
    return {int(i.text[1:].split(")")[0]): i for i in inner.values() if i.opcode == "parameter"}


def _users(inner: Mapping[str, Instruction]) -> dict[str, list[Instruction]]:
    """Return the users of each instruction's result."""
    found: dict[str, list[Instruction]] = {}
    for instruction in inner.values():
        for name in instruction.operands:
            found.setdefault(name, []).append(instruction)
    return found


def _pages_read(lengths: Array, table: Array, *others: Array) -> float:
    """Return the bytes that the kernel for attention in pages reads if all tables are full and each row's queries in one block,
    as in a decode step. Its last operand has the pages of all layers."""
    *_, q, pages = others
    return q.bytes * q.in_hbm + math.prod(table.dims) * pages.bytes / pages.dims[0]


def _in_hbm(instruction: Instruction) -> bool:
    return any(array.in_hbm for array in instruction.arrays)


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals or not right:
        return None
    end = balanced(right, 0) if right[0] == "(" else right.find(" ")
    shape, rest = right[:end], right[end:].lstrip()
    at = rest.find("(")
    if at < 0:
        return None
    close = balanced(rest, at)
    opcode, inside = rest[:at], rest[at:close]
    operands = tuple(re.findall(r"%([\w.$-]+)", inside))
    text = inside if opcode in ("constant", "parameter") else rest[close:]
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, _arrays(shape), opcode, operands, text, left.startswith("ROOT "))


def _arrays(shape: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        number = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(number[0]) if number else 8)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        found.append(Array(math.prod(sizes) * bits / 8, not re.search(r"S\([1-9]\d*\)", layout), sizes))
    return tuple(found)


def _branches(text: str) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", text)
    if several:
        return re.findall(r"%?([\w.$-]+)", several[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.$-]+)", text)


def _payload(instruction: Instruction, others: Mapping[str, Instruction], kind: str) -> float:
    """Return the bytes of the whole array: the result of a gather, the operand of a reduction or an exchange."""
    operands = sum(others[name].bytes for name in instruction.operands if name in others)
    if kind == "all-gather":
        return instruction.bytes - (operands if instruction.opcode.endswith("-start") else 0)
    return operands


def _factor(kind: str, n: int) -> float:
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n
