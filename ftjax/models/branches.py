"""Which models may have rows whose documents share their start (`ftjax.models.nn.context.Branching`)."""

from flax import nnx

from ftjax.models.nn.experts import ExpertMatrices
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.memory import LATENT, KeysValues
from ftjax.models.nn.rope import Rope
from ftjax.models.nn.stack import Stack


def branches(root: nnx.Module, ropes: tuple[Rope, ...]) -> bool:
    """Return whether each token takes nothing from others of its row but keys and values of all before it in its document.

    Windows and chunks count slots of a row, states follow its order, experts are balanced over its tokens, some position
    embeddings read how long a document is, and virtual tokens come before each: none of these knows a shared start.
    """
    nodes = [node for _, node in nnx.iter_graph(root)]
    [stack] = (node for node in nodes if isinstance(node, Stack))
    kinds = [getattr(kind, "pattern", kind) for kind in stack.kinds]
    return (
        all(isinstance(kind, Pattern) and kind.window is None and kind.chunk is None for kind in kinds)
        and all(len(own) == 1 and isinstance(own[0], KeysValues) and own[0].name != LATENT for own in stack.memories)
        and not any(isinstance(node, ExpertMatrices) for node in nodes)
        and not any(rope.by_length for rope in ropes)
        and getattr(root, "virtual", None) is None
    )
