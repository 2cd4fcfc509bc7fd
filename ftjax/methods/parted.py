"""Layers of which other parts train are stacked apart, so that what is frozen has neither gradient nor moments."""

from collections.abc import Iterator, Set

from flax import nnx

from ftjax.models.param import Piece, Spec, specs
from ftjax.models.stack import Stack


def part_stacks(root: nnx.Module, chosen: Set[str]) -> None:
    """Cut each stack of an abstract model so that a parameter trains in all of its layers or in none; in place.

    Args:
        chosen: the Hugging Face names of what is going to train.
    """
    for path, stack in stacks(root):
        stack.part(_groups(root, path, len(stack.kinds), chosen))


def stacks(root: nnx.Module) -> Iterator[tuple[str, Stack]]:
    for path, node in list(nnx.iter_graph(root)):  # listed first: what is done to a stack changes the graph
        if isinstance(node, Stack):
            yield ".".join(map(str, path)), node


def layer_of(spec: Spec, piece: Piece) -> int:
    """Which layer of the model a tensor of a stacked parameter belongs to."""
    return spec.layers[piece.index[0]] if spec.layers else piece.index[0]


def _groups(root: nnx.Module, stack: str, depth: int, chosen: Set[str]) -> tuple[str, ...]:
    """A name for each layer, the same for layers of which the same parts train."""
    parts: list[set[str]] = [set() for _ in range(depth)]
    for path, spec in specs(root).items():
        if path.startswith(f"{stack}."):
            for piece in spec.pieces():
                if piece.name in chosen:
                    parts[layer_of(spec, piece)].add(spec.hf_template)
    names: dict[frozenset[str], str] = {frozenset(): "frozen"}
    for part in map(frozenset, parts):
        names.setdefault(part, "trained" if len(names) == 1 else f"trained{len(names)}")
    return tuple(names[frozenset(part)] for part in parts)
