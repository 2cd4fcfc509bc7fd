"""Splitting of stacked layers by their trained parts, so that frozen parameters have neither gradient nor moments."""

from collections.abc import Iterator, Set

from flax import nnx

from ftjax.models.nn.param import Piece, Spec, specs
from ftjax.models.nn.stack import Stack


def part_stacks(root: nnx.Module, chosen: Set[str]) -> None:
    """Split each stack of an abstract model so that a parameter trains in all of its layers or in none; in place.

    Args:
        chosen: Hugging Face names of the parameters to train.
    """
    for path, stack in stacks(root):
        stack.part(_groups(root, path, len(stack.kinds), chosen))


def stacks(root: nnx.Module) -> Iterator[tuple[str, Stack]]:
    for path, node in list(nnx.iter_graph(root)):  # listed first: callers change the graph
        if isinstance(node, Stack):
            yield ".".join(map(str, path)), node


def layer_of(spec: Spec, piece: Piece) -> int:
    """Return the layer of the model that a tensor of a stacked parameter belongs to."""
    return spec.layers[piece.index[0]] if spec.layers else piece.index[0]


def _groups(root: nnx.Module, stack: str, depth: int, chosen: Set[str]) -> tuple[str, ...]:
    """Return a name per layer, the same for layers with the same trained parts."""
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
