"""Several LoRA adapters on one base model, each row of a batch with its own: `y = W x + scale_m * B_m A_m x` for adapter m.

Adapters stand in numbered places of stacked arrays; place 0 stays empty, for rows without an adapter. A place is filled and
emptied without another program.

Legend: B batch, M places, I in, O out, R rank (the largest).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ftjax.errors import UserError
from ftjax.methods.walk import Site, describe, linears
from ftjax.models.model import Model
from ftjax.models.nn.context import Context
from ftjax.models.nn.param import Init, param

MATRICES = ("stack_A", "stack_B")
PARTS = (*MATRICES, "stack_scale")


class LoraStack(nnx.Module):
    """A frozen Linear plus the update of each row's adapter (`Context.adapters`); without that, the Linear alone."""

    def __init__(self, site: Site, places: int, rank: int):
        self.base = base = site.layer
        # Rows of all devices read the arrays, so that they are only cut as the layer is along `tensor`.
        axis_in, axis_out = (axis if axis in ("heads", "kv_heads", "mlp", "vocab") else None for axis in base.axes)
        shapes = {
            "stack_A": ((places, rank, base.size_in), (None, "rank", axis_in)),
            "stack_B": ((places, base.size_out, rank), (None, axis_out, "rank")),
            "stack_scale": ((places, rank), (None, "rank")),
        }
        for name, (shape, axes) in shapes.items():
            row = {"init": Init("zeros"), "adapter": True}
            setattr(self, name, param((*site.stack, *shape), (*site.stack_axes, *axes), name, **row))

    def without_adapter(self) -> nnx.Module:
        """Return the module to put here when the adapters are removed."""
        return self.base

    def __call__(self, x: Float[Array, "B *of I"], ctx: Context) -> Float[Array, "B *of O"]:
        y = self.base(x, ctx)
        if ctx.adapters is None:
            return y
        return jax.lax.cond(jnp.any(ctx.adapters > 0), lambda: y + self._updates(x, ctx.adapters), lambda: y)

    def _updates(self, x: jax.Array, adapters: jax.Array) -> jax.Array:
        lora_A, lora_B, scale = (getattr(self, name)[...][adapters].astype(x.dtype) for name in PARTS)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        low = jnp.einsum("b...i,bri->b...r", x, lora_A, precision=precision)
        low = low * scale.reshape(scale.shape[0], *(1,) * (x.ndim - 2), -1)
        return jnp.einsum("b...r,bor->b...o", low, lora_B, precision=precision)


def attach_stack(root: nnx.Module, places: int, rank: int, wanted: Callable[[str], bool]) -> None:
    """Wrap the dense layers of an abstract model, in place, for adapters in places 1 to `places - 1`.

    Args:
        wanted: whether an adapter may update the layer with this Hugging Face name.
    """
    for site in linears(root):
        if any(map(wanted, site.names)):
            site.replace(LoraStack(site, places, rank))


def filling(model: Model, adapted: Model, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of one adapter as they stand in its place, by path of `model`; zeros where it updates nothing.

    Args:
        model: with the stack.
        adapted: the base model with this adapter alone, attached as LoRA.
        values: the adapter's parameters.

    Raises UserError for what a row of a batch cannot have for itself, and for a rank that is too large.
    """
    found = {
        path: np.zeros((*spec.stacked, *spec.shape[len(spec.stacked) + 1 :]), np.float32)
        for path, spec in model.specs.items()
        if path.rpartition(".")[2] in PARTS
    }
    problems = [path for path in adapted.trainable if path.rpartition(".")[2] not in ("lora_A", "lora_B")]
    if problems or adapted.sizes.vocab != model.sizes.vocab:
        what = describe(iter(sorted(problems))) if problems else f"an embedding of {adapted.sizes.vocab} rows"
        raise UserError(f"it trained {what}, and rows of one batch differ in LoRA on dense layers only; serve it by itself")
    for path in adapted.trainable:
        layer, _, side = path.rpartition(".")
        place = f"{layer}.stack_{side[-1]}"
        if place not in found:
            raise UserError(f"it updates {describe(iter([layer]))}, which the server has no room for")
        axis = -2 if side == "lora_A" else -1
        value, room = np.asarray(values[path], np.float32), found[place].shape[axis]
        rank = value.shape[axis]
        if rank > room:
            raise UserError(f"its rank is {rank}, and the server has room for {room}")
        index = (..., slice(rank), slice(None)) if side == "lora_A" else (..., slice(rank))
        found[place][index] = value
        found[f"{layer}.stack_scale"][..., :rank] = adapted.buffers[f"{layer}.scale"]
    return found
