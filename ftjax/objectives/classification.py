"""Sequence classification with a head: cross-entropy of the class at the last token of each text.

One row of a batch, for the text "Hi there" (ids 12, 57) of the class 2, after BOS (1); the class stands behind the text as one
more token, which a causal model cannot see from there (`ftjax.data.classes`):

    tokens       1  12  57   2        targets     12  57   2   0
    weights      0   0   1   0        positions    0   1   2   3

Without a head the words of the labels are trained, which is `ftjax.objectives.sft`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ftjax.models.context import Context
from ftjax.models.model import Model
from ftjax.objectives import sft
from ftjax.objectives.loss import Sums


def sums(
    model: Model,
    trainable: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    ctx: Context,
    loss_chunk: int,
) -> tuple[Sums, jax.Array]:
    """`(Sums, auxiliary loss)` of a batch `[B, T]`; `correct` counts texts whose class has the highest score."""
    # Targets without weight are tokens, of which there are more than classes.
    targets = jnp.where(batch["weights"] > 0, batch["targets"], 0)
    return sft.sums(model, trainable, frozen, {**batch, "targets": targets}, ctx, loss_chunk)
