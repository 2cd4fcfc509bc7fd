"""Supervised fine-tuning: next-token cross-entropy on the tokens that carry weight.

One row of a batch, for the text "Hi there" (ids 12, 57) in a row of 4 after BOS (1), trained on "there" and EOS (2):

    tokens       1  12  57   2        targets     12  57   2   0
    weights      0   1   1   0        (weights[t] says whether targets[t], the token after tokens[t], is trained)
    positions    0   1   2   3        segment_ids  1   1   1   1
"""

from collections.abc import Mapping

import jax

from ftjax.models.context import Context
from ftjax.models.model import Model
from ftjax.objectives.loss import Sums, chunked_cross_entropy


def sums(
    model: Model,
    trainable: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    ctx: Context,
    loss_chunk: int,
) -> tuple[Sums, jax.Array]:
    """`(Sums, auxiliary loss)` of a batch `[B, T]`.

    Args:
        loss_chunk: tokens of the batch whose logits exist at one time.
    """
    module = model.bind({**frozen, **trainable})
    hidden, _, aux = module.hidden(batch["tokens"], ctx)
    inside = {path: leaf for path, leaf in trainable.items() if path.startswith(f"{model.output}.")}
    outside = {path: jax.lax.stop_gradient(leaf) for path, leaf in trainable.items() if path not in inside}

    def unembed(inside, h):
        return model.bind({**frozen, **outside, **inside}).unembed(h, ctx)

    b, t = batch["tokens"].shape
    length = min(t, max(1, loss_chunk // b))
    return chunked_cross_entropy(unembed, length, inside, hidden, batch["targets"], batch["weights"]), aux
