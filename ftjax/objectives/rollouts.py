"""What the objectives that learn from rewards share: values of tokens, sums over answers and statistics of an update.

Legend: B batch, T length, D answers of a row, A microbatches.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from ftjax.data.rollout import VALUES
from ftjax.objectives.logprobs import segment_sums
from ftjax.objectives.objective import LossInputs


class Answers(NamedTuple):
    """The answers of a batch, by token.

    Attributes:
        logprobs: log-probabilities for the model; the rest has no gradient.
        entropy: in nats, of the distribution that each token was drawn from.
        old: log-probabilities for the parameters before the first update with these answers.
        sampler: log-probabilities for the sampler that generated them.
        advantages: of the answer that a token belongs to.
        mask: whether a token is trained.
    """

    logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    old: Float[Array, "B T"]
    sampler: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    mask: Bool[Array, "B T"]


def answers_of(inputs: LossInputs) -> Answers:
    """Run the model on a batch of answers."""
    section, batch = inputs.config.objective, inputs.batch
    found = inputs.token_logprobs(entropy=True, temperature=section.temperature)
    values = dict(zip(VALUES, jnp.moveaxis(batch["labels"].reshape(*batch["weights"].shape, -1), -1, 0), strict=True))
    now = jax.lax.stop_gradient(found.logprobs)
    old = now if section.on_policy else values["logprob"]
    return Answers(found.logprobs, found.entropy, old, values["sampler_logprob"], values["advantage"], batch["weights"] != 0)


def reference_logprobs(inputs: LossInputs) -> Float[Array, "B T"]:
    """Compute the log-probabilities for the reference model, without a gradient."""
    found = inputs.reference.token_logprobs(temperature=inputs.config.objective.temperature)
    return jax.lax.stop_gradient(found.logprobs)


def answer_sums(values: Float[Array, "B T"], batch: Mapping[str, Shaped[Array, "B _"]]) -> Float[Array, "B D"]:
    """Sum over the tokens of each answer."""
    return segment_sums(values, batch["segment_ids"], _most(batch))


def spread(values: Float[Array, "B D"], batch: Mapping[str, Shaped[Array, "B _"]]) -> Float[Array, "B T"]:
    """Give each token the value of its answer; 0 for padding."""
    segments = batch["segment_ids"]
    return jnp.where(segments > 0, jnp.take_along_axis(values, jnp.maximum(segments - 1, 0), axis=1), 0)


def counts(inputs: LossInputs) -> dict[str, Float[Array, ""]]:
    """Count the answers of a batch, also those of which nothing is trained, and their trained tokens."""
    batch = inputs.batch
    return {
        "answers": jnp.sum(jnp.max(batch["segment_ids"], axis=1)).astype(jnp.float32),
        "tokens": jnp.sum(batch["weights"] != 0, dtype=jnp.float32),
    }


def count(statistics: Mapping[str, Any], name: str) -> Float[Array, ""]:
    """Return a count of the whole update, at least 1."""
    return jnp.maximum(jnp.sum(statistics[name]), 1)


def _most(batch: Mapping[str, jax.Array]) -> int:
    """Return the most answers that a row may have: each has a token of a prompt and one of its own."""
    return batch["segment_ids"].shape[1] // 2
