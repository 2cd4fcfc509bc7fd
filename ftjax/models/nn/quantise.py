"""Replaces the frozen matrices of an abstract model by quantised ones."""

import dataclasses

from flax import nnx

from ftjax.errors import UserError
from ftjax.models.nn.experts import ExpertMatrices
from ftjax.models.nn.layers import Linear
from ftjax.models.nn.quantized import Quantization
from ftjax.models.nn.quantized_linear import QuantizedLinear


def quantise(root: nnx.Module, kind: str) -> None:
    """Quantise every frozen dense layer of an abstract model, except the output projection, and every frozen matrix of routed
    experts, in place.

    Embeddings, norms, biases and routers are not quantised. Raises UserError if there is nothing to quantise.
    """
    nodes = {path: node for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Module)}
    found = False
    for path, node in nodes.items():
        output = ".".join(map(str, path)).removesuffix(".base") == root.output  # may be wrapped by a method
        if isinstance(node, Linear) and not output and not node.weight.row.trainable:
            setattr(nodes[path[:-1]], str(path[-1]), QuantizedLinear(node, kind))
            found = True
        elif isinstance(node, ExpertMatrices):
            for name, inputs in node.INPUT_AXES.items():
                found |= _quantise_experts(getattr(node, name), Quantization(kind, inputs))
    if not found:
        raise UserError(
            f"model.quantization: {kind} supports frozen weights only, and this method trains all weights; leave it out"
        )


def _quantise_experts(weight: nnx.Param, how: Quantization) -> bool:
    """Quantise the matrices of all experts, if they are frozen; return whether they are."""
    if weight.row.trainable:
        return False
    weight.set_value(how.abstract(tuple(weight.get_value().shape)))
    weight.set_metadata("row", dataclasses.replace(weight.row, quantization=how))
    return True
