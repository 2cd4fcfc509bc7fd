"""Names of the values that remat policies save for a layer's backward pass (`model.remat`)."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ftjax.models.context import Context
from ftjax.models.gathered import fully_sharded

ATTENTION = "attention"  # output of attention, and its log-sum-exp
PRODUCT = "product"  # output of a linear layer, including its adapter's
BLOCK_INPUT = "block_input"
WHOLE = "whole"  # gathered weight


def saved_product(y: jax.Array) -> jax.Array:
    """Name `y` so that `remat: dots` saves it, and return it; named values used only to compute `y` need not be saved."""
    return checkpoint_name(y, PRODUCT)


def memory_is_short(ctx: Context) -> bool:
    """Return whether layers are recomputed and their weights sharded, so that a layer has to use little memory at a time."""
    return ctx.remat in ("full", "offload") and fully_sharded()


def is_trained(module: nnx.Module) -> bool:
    """Return whether the module has trained weights other than adapters."""
    rows = [variable.row for _, variable in nnx.iter_graph(module) if isinstance(variable, nnx.Param)]
    return any(row.trainable and not row.adapter for row in rows)


def projected(norm: nnx.Module, attention: nnx.Module, x: jax.Array, ctx: Context):
    """Return `attention.project(norm(x), ctx)`, recomputing `norm(x)` in the backward pass if memory is short.

    The gradients of trained weights need the result of `norm`, and come last in the layer's backward pass. Until then only the
    gathered weights, the results of the products and x, which the layer needs anyway, are kept.
    """

    def project(x: jax.Array):
        return attention.project(norm(x), ctx)

    if memory_is_short(ctx) and is_trained(attention):
        project = jax.checkpoint(project, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT, WHOLE))
    return project(x)
