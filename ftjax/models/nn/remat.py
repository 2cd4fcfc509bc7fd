"""What a layer saves for its backward pass (`model.remat`): the names of values, and the policies that save them."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ftjax.models.nn.context import Context
from ftjax.models.nn.gathered import fully_sharded

ATTENTION = "attention"  # output of attention, and its log-sum-exp
PRODUCT = "product"  # output of a linear layer, including its adapter's
BLOCK_INPUT = "block_input"
WHOLE = "whole"  # gathered weight

# A layer saves for its backward pass only its input (full), in host memory (offload); or also the output of attention
# (attention); or also the outputs of all linear layers (dots), so that only elementwise operations are recomputed.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(ATTENTION, PRODUCT),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


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
