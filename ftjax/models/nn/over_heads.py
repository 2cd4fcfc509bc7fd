"""Run a recurrent mixer under a mesh: each device has all tokens of its rows for some of the heads.

So neither convolution nor state crosses devices. Along `sequence`, that exchanges "all heads of some tokens" for "some heads of
all tokens", as attention does in `ftjax.models.nn.attention_sharded`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ftjax.errors import UserError
from ftjax.mesh import RULES, fitting


def head_axes(heads: int, fits: Callable[[int], bool], what: str) -> tuple[str, ...]:
    """Return the axes of the current mesh over which the heads are split; none if they do not fit.

    Args:
        fits: whether the heads can be split over so many devices.
        what: the heads in words, for the error.

    Raises UserError if they do not fit and `mesh.sequence` is more than 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    over = (*RULES["heads"], *RULES["length"])
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return ()
    if fits(math.prod(mesh.shape[axis] for axis in over)):
        return over
    if mesh.shape["sequence"] > 1:
        here = math.prod(mesh.shape[axis] for axis in RULES["heads"])
        works = [size for size in range(1, heads + 1) if fits(here * size)]
        raise UserError(
            f"mesh.sequence: {mesh.shape['sequence']} does not divide {what} with mesh.tensor = {here}; "
            + (f"choose one of {', '.join(map(str, works))}" if works else "set both to 1")
        )
    return ()


def on_each_device(mix: Callable, values: Any, places: Any, out: Any, axes: dict[str, tuple[str, ...]], rows: int) -> Any:
    """Run `mix(*values)` on each device's rows and heads under the current mesh; call it directly without a mesh.

    Args:
        places: for each of the values, a PartitionSpec of "rows", names in `axes`, and None.
        out: the same for each result.
        axes: mesh axes by name.
        rows: B.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return mix(*values)
    names = {"rows": fitting(mesh, "batch", rows), None: None, **axes}

    def specs(places: Any) -> Any:
        named = lambda place: PartitionSpec(*(names[name] for name in place))  # noqa: E731
        return jax.tree.map(named, places, is_leaf=lambda node: isinstance(node, PartitionSpec))

    return jax.shard_map(mix, mesh=mesh, in_specs=specs(places), out_specs=specs(out), check_vma=False)(*values)
