"""Find the dense layers of a model, match them as PEFT does, and replace them by wrapping modules."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from ftjax.errors import UserError
from ftjax.models.model import Model
from ftjax.models.nn.layers import Embedding, Linear
from ftjax.models.nn.param import INDEXED, Spec, specs
from ftjax.models.registry import FAMILIES


@dataclass(frozen=True)
class Site:
    """A dense layer (of all stacked layers at once), or an embedding, and its parent in the module tree.

    Attributes:
        path: its path, such as `model.layers.block.self_attn.q_proj`.
        names: Hugging Face's module name for each stacked index.
        stack: sizes of the stacked dimensions, `()` for a layer that is not stacked.
    """

    path: str
    parent: Any
    attribute: str
    layer: Linear | Embedding
    names: tuple[str, ...]
    stack: tuple[int, ...]
    stack_axes: tuple[str, ...]

    def replace(self, module: nnx.Module) -> None:
        setattr(self.parent, self.attribute, module)


def linears(root: nnx.Module) -> list[Site]:
    """Return every dense layer that can have an adapter, with the output embedding, in the order of the module tree."""
    return _sites(root, lambda node: isinstance(node, Linear) and node.adaptable)


def embeddings(root: nnx.Module) -> list[Site]:
    """Return every embedding, including that of positions, in the order of the module tree."""
    return _sites(root, lambda node: isinstance(node, Embedding))


def _sites(root: nnx.Module, wanted: Callable[[nnx.Module], bool]) -> list[Site]:
    nodes = {path: node for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Module)}
    rows = specs(root)
    chosen = [item for item in nodes.items() if wanted(item[1])]
    return [_site(path, node, nodes, rows) for path, node in sorted(chosen, key=_by_name)]


def _by_name(item: tuple) -> list[str]:
    return [str(part) for part in item[0]]


def _site(path: tuple, layer: Linear | Embedding, nodes: dict, rows: Mapping[str, Spec]) -> Site:
    name = ".".join(map(str, path))
    spec = rows[f"{name}.weight"]
    stack_axes = tuple(axis for axis in spec.row.axes if axis in INDEXED)
    names = tuple(piece.name.removesuffix(".weight") for piece in spec.pieces())
    return Site(name, nodes[path[:-1]], str(path[-1]), layer, names, spec.stacked, stack_axes)


def remove_adapters(root: nnx.Module) -> None:
    """Remove what a method added to an abstract model, in place: wrapped layers, bottlenecks and virtual tokens."""
    if hasattr(root, "virtual"):
        root.virtual = None
    found = True
    while found:  # a layer may be wrapped twice
        nodes = {path: node for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Module)}
        found = [path for path, node in nodes.items() if hasattr(node, "without_adapter")]
        for path in found:
            setattr(nodes[path[:-1]], str(path[-1]), nodes[path].without_adapter())


def matches(name: str, wanted: str | list[str]) -> bool:
    """Match by PEFT's rule: a string is a regex over the whole name; a list has whole names or their last parts."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def excluded_modules(chosen: str | list[str] | None, model: Model) -> str | list[str] | None:
    """Return `exclude_modules` for PEFT: those that were chosen, and parts of a composite model that PEFT would adapt too."""
    composite = FAMILIES[model.config["model_type"]].composite
    parts = composite.carried if composite is not None and composite.clashing else ()
    parts = [part for part in parts if not (chosen and matches(f"{part}x", chosen))]
    if not parts:
        return chosen
    before = [] if not chosen else [chosen] if isinstance(chosen, str) else [rf"(.*\.)?{re.escape(one)}" for one in chosen]
    return "|".join(f"({one})" for one in (*before, *(f"{re.escape(part)}.*" for part in parts)))


def layer_index(name: str, patterns: str | list[str] | None = None) -> int | None:
    """Return the first number after a module name: 3 in `model.layers.3.mlp.up_proj`.

    Args:
        patterns: names of lists of layers that count (PEFT's `layers_pattern`); all of them otherwise.
    """
    own = [patterns] if isinstance(patterns, str) and patterns else patterns or []
    tried = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in own] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for one in tried if (match := re.match(one, name))), None)
    return int(found[1]) if found else None


def describe(names: Iterator[str]) -> str:
    """Return module names for an error message, each kind once: `self_attn.q_proj, ..., lm_head`."""
    kinds = dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in names)
    return ", ".join(kinds)


def refuse_unmatched(option: str, wanted: list[str], names: list[str]) -> None:
    """Raise UserError for entries of a list that match no module: a silent miss would train less than was asked."""
    missing = [one for one in wanted if not any(matches(name, [one]) for name in names)]
    if missing:
        raise UserError(f"{option}: no module is named {', '.join(map(repr, missing))}; the model has {describe(iter(names))}")
