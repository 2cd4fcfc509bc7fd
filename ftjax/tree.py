"""Paths of parameters: split trees by path, count bytes, and find patterns that match nothing.

A *tree* here is a flat dict `{path: leaf}`; a path is the dotted name of a parameter in the module tree, such as
`model.layers.block.self_attn.q_proj.kernel`.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any


def split(tree: Mapping[str, Any], keep: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(leaves whose path is kept, the others)`, both in the tree's order."""
    kept = {path: leaf for path, leaf in tree.items() if keep(path)}
    return kept, {path: leaf for path, leaf in tree.items() if path not in kept}


def nbytes(tree: Mapping[str, Any]) -> int:
    """Return the bytes of all leaves; leaves need `.shape` and `.dtype`."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tree.values())


def unmatched(patterns: list[str], names: list[str]) -> list[str]:
    """Return the regexes that match none of the names. A pattern that matches nothing is nearly always a mistake."""
    return [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]
