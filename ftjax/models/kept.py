"""The names under which remat policies keep values of a layer for its backward pass (`model.remat`)."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ftjax.models.context import Context
from ftjax.models.gathered import fully_sharded

ATTENTION = "attention"  # what attention gave, and its log-sum-exp
PRODUCT = "product"  # what a layer's weights gave, its adapter's included
BLOCK_INPUT = "block_input"
WHOLE = "whole"  # a weight gathered from all devices


def product(y: jax.Array) -> jax.Array:
    """`y` itself, which `remat: dots` keeps. Of a value made of others that have the name, they need not be kept."""
    return checkpoint_name(y, PRODUCT)


def memory_is_short(ctx: Context) -> bool:
    """Whether layers are recomputed and their weights cut over the devices: a layer then is to need little at one time."""
    return ctx.remat in ("full", "offload") and fully_sharded()


def is_trained(module: nnx.Module) -> bool:
    """Whether the module has trained weights of its own, not only adapters."""
    rows = [variable.row for _, variable in nnx.iter_graph(module) if isinstance(variable, nnx.Param)]
    return any(row.trainable and not row.adapter for row in rows)


def projected(norm: nnx.Module, attention: nnx.Module, x: jax.Array, ctx: Context):
    """`attention.project(norm(x), ctx)`.

    The gradients of trained weights are made of what `norm` gave. Where memory is short that is made again from x when it is
    their turn, which is the last of the layer's: until then the gathered weights and the results of the products are kept, and
    x, which the layer needs as well.
    """

    def project(x: jax.Array):
        return attention.project(norm(x), ctx)

    if memory_is_short(ctx) and is_trained(attention):
        project = jax.checkpoint(project, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT, WHOLE))
    return project(x)
