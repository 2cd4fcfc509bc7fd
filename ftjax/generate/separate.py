"""Weights for decoding on a CPU: one array per layer, in the memory of the stacks that they are part of."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ftjax.generate.engine import on_one_cpu
from ftjax.methods.lora_stack import MATRICES
from ftjax.models.model import Model
from ftjax.models.nn.stack import Separate

WORTH = 1 << 26  # bytes of all stacks: copying fewer takes less time than compiling each layer by itself


class Layers:
    """The stacked weights of the base model, and the adapters of `LoraStack`, as `Separate` arrays.

    None, unless the stacks of the base model are large and on one CPU. The arrays share the memory of the stacks, which no
    program can take over as long as they exist.
    """

    def __init__(self, model: Model, params: Mapping[str, Any], mesh: Mesh):
        base = [path for path, spec in model.specs.items() if spec.stacked and not spec.row.adapter]
        size = sum(leaf.size * leaf.dtype.itemsize for path in base for leaf in jax.tree.leaves(params[path]))
        worth = on_one_cpu(mesh) and size >= WORTH
        several = [path for path, spec in model.specs.items() if spec.stacked and path.rpartition(".")[2] in MATRICES]
        self._paths, self._mesh = [*base, *several] if worth else [], mesh
        self._stacks: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}

    def of(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the `Separate` arrays of these parameters, by path; made again where a stack has been replaced.

        Of the abstract arrays of a plan they are abstract too.
        """
        for path in self._paths:
            if self._stacks.get(path) is not params[path]:
                self._layers[path] = jax.tree.map(self._separate, params[path])
                self._stacks[path] = params[path]
        return self._layers

    def _separate(self, stack: jax.Array | jax.ShapeDtypeStruct) -> Separate:
        where = NamedSharding(self._mesh, PartitionSpec())
        if isinstance(stack, jax.ShapeDtypeStruct):
            return Separate([jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=where)] * stack.shape[0])
        host = np.asarray(stack.addressable_data(0))  # a view, which the array itself does not keep
        return Separate(jax.device_put(layer, where, may_alias=True) for layer in host)
