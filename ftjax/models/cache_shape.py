"""How large the KV cache of a model must be.

Legend: B batch, T query length, K kv heads, H head dim.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models.context import Context
from ftjax.models.model import Model
from ftjax.models.stack import Stack


class CacheShape(NamedTuple):
    layers: int
    kv_heads: int
    head_dim: int


class _Notes:
    """What the tracing of a model found; it stands for itself, as static data of a pytree must."""

    def __init__(self):
        self.shapes: set[tuple[int, int]] = set()
        self.layers = 0


@dataclass(frozen=True)
class _Probe:
    """Stands in for a cache while a model is traced, and notes what its layers write.

    Nothing is carried from layer to layer: what a layer reads is what it has just written.
    """

    notes: _Notes
    written: tuple[jax.Array, jax.Array] | None = None
    lengths: int = 0

    def write(self, layer: Any, k: jax.Array, v: jax.Array) -> "_Probe":
        assert k.shape == v.shape, "keys and values that differ in shape have no place in the cache"
        self.notes.shapes.add(k.shape[2:])
        return replace(self, written=(k, v))

    def read(self, layer: Any) -> tuple[jax.Array, jax.Array]:
        return self.written


jax.tree_util.register_pytree_node(_Probe, lambda probe: ((), probe.notes), lambda notes, _: _Probe(notes))


def cache_shape(model: Model) -> CacheShape:
    """Found by tracing the model, so that no family has to say it."""
    notes = _Notes()
    params = {path: spec.abstract for path, spec in model.specs.items()}

    def trace(params, tokens):
        module = model.bind(params)
        notes.layers = max(len(node.kinds) for _, node in nnx.iter_graph(module) if isinstance(node, Stack))
        return module.hidden(tokens, Context(tokens, tokens), _Probe(notes))[0]

    jax.eval_shape(trace, params, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    assert len(notes.shapes) == 1, f"layers whose keys differ in shape: {sorted(notes.shapes)}"
    return CacheShape(notes.layers, *notes.shapes.pop())
