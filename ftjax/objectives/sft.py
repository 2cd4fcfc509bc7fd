"""Supervised fine-tuning: next-token cross-entropy on the tokens with weight.

One row of a batch, for the text "Hi there" (ids 12, 57) in a row of 4 after BOS (1), trained on "there" and EOS (2):

    tokens       1  12  57   2        targets     12  57   2   0
    weights      0   1   1   0        (weights[t] tells whether targets[t], the token after tokens[t], is trained)
    positions    0   1   2   3        segment_ids  1   1   1   1
"""

import math

from jaxtyping import Array, Float

from ftjax.config import SftConfig
from ftjax.data.encoding import Answers
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import LossInputs, Objective


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the cross-entropy of a batch."""
    return inputs.token_totals(), inputs.auxiliary


def perplexity(mean_loss: float) -> dict[str, float]:
    """Return the exponential of a loss in nats; at most e^700, which a float can represent."""
    return {"perplexity": math.exp(min(mean_loss, 700.0))}


# The most likely word of each token is not needed for the loss: an argmax over the vocabulary, and traffic where it is sharded.
OBJECTIVE = Objective(
    SftConfig, lambda section: Answers(), loss, lambda section, means: perplexity(means["loss"]), train_metrics=False
)
