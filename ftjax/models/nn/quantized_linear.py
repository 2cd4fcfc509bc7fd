"""Dense layer with a quantised frozen weight (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, eq. 5).

Legend: I in, O out.
"""

import dataclasses
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from ftjax.errors import UserError
from ftjax.models.nn.context import Context
from ftjax.models.nn.layers import Linear, project
from ftjax.models.nn.param import specs
from ftjax.models.nn.quantized import Quantization, Quantized
from ftjax.models.nn.remat import saved_product


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project_quantized(x: Float[Array, "*of I"], weight: Quantized, conv1d: bool) -> Float[Array, "*of O"]:
    """Run `project` with a quantised weight, dequantised to the dtype of x only for this product.

    The backward pass saves the quantised weight, not the dequantised one, and computes a gradient only for x.
    """
    return project(x, weight.dequantise(x.dtype), conv1d=conv1d)


def _forward(x, weight, conv1d):
    return project_quantized(x, weight, conv1d), weight


def _backward(conv1d, weight, gradient):
    # The barrier keeps XLA from reusing the forward pass's dequantised weight in the backward pass, if both are in the same
    # computation (a layer outside a scan).
    weight, gradient = jax.lax.optimization_barrier((weight, gradient))
    return project(gradient, weight.dequantise(gradient.dtype), conv1d=not conv1d), None


project_quantized.defvjp(_forward, _backward)


class QuantizedLinear(Linear):
    """`y[..., O] = x[..., I] @ dequantised(weight)[O, I].T + bias[O]`."""

    def __init__(self, linear: Linear, kind: str):
        """Replace `linear`, whose weight must be abstract and frozen."""
        for name in ("adaptable", "size_in", "size_out", "axes", "conv1d"):
            setattr(self, name, getattr(linear, name))
        quantization = Quantization(kind, linear.conv1d)
        row = dataclasses.replace(linear.weight.row, quantization=quantization)
        self.weight = nnx.Param(quantization.abstract(tuple(linear.weight.get_value().shape)), row=row)
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "*of I"], ctx: Context) -> Float[Array, "*of O"]:
        y = project_quantized(x, self.weight.get_value(), self.conv1d)
        return saved_product(y if self.bias is None else y + self.bias[...].astype(x.dtype))


def quantise(root: nnx.Module, kind: str) -> None:
    """Quantise every frozen dense layer of an abstract model, except the output projection, in place.

    Embeddings, norms, biases and routers are not quantised. Raises UserError for a mixture of experts, whose expert weights are
    not in dense layers, and if there is nothing to quantise.
    """
    experts = [spec.hf_template.format(*"*" * 9) for spec in specs(root).values() if "experts" in spec.row.axes[:-2]]
    if experts:
        raise UserError(
            f"model.quantization: {kind} supports dense layers only, and most of this model is in its experts ({experts[0]}); "
            "leave model.quantization out"
        )
    nodes = {path: node for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Module)}
    found = False
    for path, node in nodes.items():
        output = ".".join(map(str, path)).removesuffix(".base") == root.output  # may be wrapped by a method
        if isinstance(node, Linear) and not output and not node.weight.row.trainable:
            setattr(nodes[path[:-1]], str(path[-1]), QuantizedLinear(node, kind))
            found = True
    if not found:
        raise UserError(
            f"model.quantization: {kind} supports frozen weights only, and this method trains all weights; leave it out"
        )
