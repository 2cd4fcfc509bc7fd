"""The names under which remat policies keep values of a layer for its backward pass (`model.remat`)."""

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"  # what attention gave, and its log-sum-exp
PRODUCT = "product"  # what a layer's weights gave, its adapter's included
BLOCK_INPUT = "block_input"


def product(y: jax.Array) -> jax.Array:
    """`y` itself, which `remat: dots` keeps. Of a value made of others that have the name, they need not be kept."""
    return checkpoint_name(y, PRODUCT)
