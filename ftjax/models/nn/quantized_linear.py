"""Dense layer with a quantised frozen weight (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, eq. 5).

Legend: I in, O out.
"""

import dataclasses
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from ftjax.models.nn.context import Context
from ftjax.models.nn.layers import Linear, project
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
        quantization = Quantization(kind, -2 if linear.conv1d else -1)
        row = dataclasses.replace(linear.weight.row, quantization=quantization)
        self.weight = nnx.Param(quantization.abstract(tuple(linear.weight.get_value().shape)), row=row)
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "*of I"], ctx: Context) -> Float[Array, "*of O"]:
        y = project_quantized(x, self.weight.get_value(), self.conv1d)
        return saved_product(y if self.bias is None else y + self.bias[...].astype(x.dtype))
