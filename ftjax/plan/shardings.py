"""Shardings of parameters, optimizer state, and the activations that the program constrains."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params
from jax.sharding import NamedSharding

from ftjax.plan.shards import shard_bytes
from ftjax.train.setup import Design


class Placed(NamedTuple):
    """One array: its logical axes, the mesh axes that shard each dimension, and the bytes on each device."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: str
    partition: str
    bytes: float


def shardings(made: Design, traced: Any, inputs: tuple) -> list[Placed]:
    """Return parameters, optimizer state, input and activations, in this order."""
    state, frozen, batch = inputs[:3]
    specs = made.model.specs
    rows = []
    for kind, params in (("trained", state.params), ("frozen", frozen)):
        for path, value in sorted(params.items()):
            for part, leaf in _leaves(value):
                same = len(leaf.shape) == len(specs[path].row.axes)
                axes = ", ".join(axis or "-" for axis in specs[path].row.axes) if same else ""
                rows.append(_placed(kind, path + part, leaf, axes))
    rows += [_placed("optimizer", name.removeprefix("."), leaf, "") for name, leaf in _leaves(state.opt_state)]
    rows += [_placed("input", name, leaf, "-, batch, length") for name, leaf in sorted(batch.items())]
    return rows + list(_activations(traced.jaxpr, made))


def _leaves(value: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(value)]


def _placed(kind: str, name: str, leaf: Any, axes: str) -> Placed:
    return Placed(kind, name, tuple(leaf.shape), leaf.dtype.name, axes, _text(leaf.sharding), shard_bytes(leaf))


def _text(where: NamedSharding) -> str:
    """Return the mesh axes of each dimension that have more than one device."""

    def names(entry: Any) -> str:
        axes = entry if isinstance(entry, tuple) else (entry,)
        return "+".join(axis for axis in axes if axis and where.mesh.shape[axis] > 1) or "-"

    return ", ".join(map(names, where.spec)) or "-"


def _activations(closed: ClosedJaxpr, made: Design) -> Iterator[Placed]:
    """Yield arrays with a sharding constraint (`ftjax.mesh.constrain`), each shape and sharding once, with its count."""
    found: Counter = Counter()

    def visit(jaxpr: Jaxpr) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "sharding_constraint":
                aval = eqn.outvars[0].aval
                found[aval.shape, aval.dtype.name, eqn.params["sharding"].spec] += 1
            for inner in jaxprs_in_params(eqn.params):
                visit(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)

    visit(closed.jaxpr)
    for (shape, dtype, spec), count in sorted(found.items(), key=str):
        leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(made.mesh, spec))
        yield _placed("activation", f"{count} place(s) in the program", leaf, "")
