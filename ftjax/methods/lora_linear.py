"""LoRA: `y = W x + scale * B A x` with A (r, in) and B (out, r) (Hu et al. 2021, arXiv:2106.09685, eq. 3).

Scale is `alpha / r`, or `alpha / sqrt(r)` with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). With DoRA (Liu et al. 2024,
arXiv:2402.09353, eq. 5 and section 4.3) the weight is `m (W + scale * B A) / ||W + scale * B A||`, with one norm per output,
detached from the gradient. Names, matching rules, initialisation and scaling are PEFT's, so that an adapter means the same in
both.

Legend: L layers, I in, O out, R rank (the largest of the stacked layers).
"""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from ftjax.methods.walk import Site
from ftjax.models.model import Model
from ftjax.models.nn.context import Context
from ftjax.models.nn.layers import project, project_sharded, widen
from ftjax.models.nn.param import Buffer, Init, Row, param
from ftjax.models.nn.quantized import Quantized
from ftjax.models.nn.remat import saved_product


def _adapter_axis(axis: str | None) -> str | None:
    """Return the logical axis of an adapter's matrix along a dimension of its layer."""
    return "wide" if axis in ("heads", "kv_heads", "mlp") else axis


class LoraLinear(nnx.Module):
    """A frozen Linear plus its low-rank update; layers may differ in rank and scale, zero for layers without an adapter."""

    def __init__(
        self, site: Site, ranks: np.ndarray, scales: np.ndarray, dropout: float, *, dora: bool = False, pissa: bool = False
    ):
        """`ranks` and `scales`: one per stacked index. `pissa`: the initial product is subtracted (see `pissa`)."""
        self.base = base = site.layer
        self.dropout = dropout
        self.salt = zlib.crc32(site.path.encode())  # layers of one block draw different dropout masks
        rank = int(ranks.max())
        row = {"trainable": True, "adapter": True, "ranks": tuple(map(int, ranks))}
        axes_in, axes_out = (_adapter_axis(axis) for axis in base.axes)
        self.axes_A, self.axes_B = ("rank", axes_in), (axes_out, "rank")
        shape_A, axes_A = (*site.stack, rank, base.size_in), (*site.stack_axes, *self.axes_A)
        shape_B, axes_B = (*site.stack, base.size_out, rank), (*site.stack_axes, *self.axes_B)
        self.lora_A = param(shape_A, axes_A, "lora_A.weight", init=Init("uniform", 1 / math.sqrt(base.size_in)), **row)
        self.lora_B = param(shape_B, axes_B, "lora_B.weight", init=Init("zeros"), **row)
        held = {**row, "trainable": False, "init": Init("zeros")}
        self.start_A = param(shape_A, axes_A, "start_A.weight", **held) if pissa else None
        self.start_B = param(shape_B, axes_B, "start_B.weight", **held) if pissa else None
        shape, axes = (*site.stack, base.size_out), (*site.stack_axes, base.axes[1])
        magnitude = {"init": Init("ones"), **row}  # `start` sets it to the base weight's norms
        self.lora_magnitude_vector = param(shape, axes, "lora_magnitude_vector", **magnitude) if dora else None
        scale = np.where(np.arange(rank) < ranks[:, None], scales[:, None], 0).astype(np.float32)
        self.scale = Buffer(scale.reshape(*site.stack, rank), row=Row((*site.stack_axes, "rank"), "scale"))

    def without_adapter(self) -> nnx.Module:
        """Return the module to put here when the method is removed."""
        return self.base

    def __call__(self, x: Float[Array, "*of I"], ctx: Context) -> Float[Array, "*of O"]:
        dropped = self._drop(x, ctx)
        update = self._product(dropped, self.lora_A[...], self.lora_B[...], ctx)
        if self.start_A is not None:  # without dropout, like the rest of the base weight
            update = update - self._product(x, self.start_A[...], self.start_B[...], ctx)
        if self.lora_magnitude_vector is None:
            return saved_product(self.base(x, ctx) + update)
        y = self.base(x, ctx)
        direct = y if dropped is x else self.base(dropped, ctx)  # the scaled output has the same dropout as the update
        if self.base.bias is not None:
            direct = direct - self.base.bias[...].astype(x.dtype)
        adapted = jnp.any(self.scale[...] != 0)
        factor = jnp.where(adapted, self.lora_magnitude_vector[...] / jax.lax.stop_gradient(self._norm()), 1)
        return saved_product(
            y + ((factor - 1) * direct.astype(factor.dtype) + factor * update.astype(factor.dtype)).astype(x.dtype)
        )

    def _product(
        self, x: Float[Array, "*of I"], lora_A: Float[Array, "R I"], lora_B: Float[Array, "O R"], ctx: Context
    ) -> Float[Array, "*of O"]:
        """Compute `scale * B A x`."""
        low = saved_product(project_sharded(x, lora_A, self.axes_A, ctx) * self.scale[...].astype(x.dtype))
        return project_sharded(low, lora_B, self.axes_B, ctx, widen)

    def _drop(self, x: jax.Array, ctx: Context) -> jax.Array:
        if not self.dropout or ctx.dropout is None:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(ctx.dropout, self.salt), 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)

    def _norm(self) -> Float32[Array, " O"]:
        """Return `||W + B diag(scale) A||` per output, without a matrix of W's size:"""
        weight = self.base.weight.get_value()
        weight = weight.dequantise(jnp.float32) if isinstance(weight, Quantized) else weight.astype(jnp.float32)
        lora_A, scaled_B = self.lora_A[...], self.lora_B[...] * self.scale[...]
        own = jnp.sum(jnp.square(weight), axis=0 if self.base.conv1d else 1)
        cross = project(lora_A, weight, conv1d=self.base.conv1d).T
        both = project(scaled_B, project(lora_A, lora_A))
        return jnp.sqrt(jnp.maximum(own + jnp.sum((2 * cross + both) * scaled_B, axis=1), 1e-30))


def is_conv1d(model: Model, layer: str) -> bool:
    """Return whether the weight that a LoRA layer wraps is stored (in, out), as in GPT-2."""
    axis_in = model.specs[f"{layer}.lora_A"].row.axes[-1]
    axis_out = model.specs[f"{layer}.lora_B"].row.axes[-2]
    return tuple(map(_adapter_axis, model.specs[f"{layer}.base.weight"].row.axes[-2:])) == (axis_in, axis_out)
