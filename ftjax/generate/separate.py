"""Weights for decoding on a CPU: one array per layer, in the memory of the stacks that they are part of."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ftjax.generate.engine import on_one_cpu
from ftjax.models.model import Model
from ftjax.models.nn.stack import Separate

WORTH = 1 << 26  # bytes of all stacks: copying fewer takes less time than compiling each layer by itself


def separate(model: Model, params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return the stacked weights of the base model as `Separate` arrays; nothing unless they are large and on one CPU.

    They share the memory of `params`, which no program can take over as long as they exist. Of the abstract arrays of a plan
    they are abstract too.
    """
    if not on_one_cpu(mesh):
        return {}
    stacked = {path: params[path] for path, spec in model.specs.items() if spec.stacked and not spec.row.adapter}
    if sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stacked)) < WORTH:
        return {}
    where = NamedSharding(mesh, PartitionSpec())

    def layers(stack: jax.Array | jax.ShapeDtypeStruct) -> Separate:
        if isinstance(stack, jax.ShapeDtypeStruct):
            return Separate([jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=where)] * stack.shape[0])
        host = np.asarray(stack.addressable_data(0))  # a view, which the array itself does not keep
        return Separate(jax.device_put(layer, where, may_alias=True) for layer in host)

    return jax.tree.map(layers, stacked)
