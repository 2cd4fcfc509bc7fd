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


def reference_logprobs(inputs: LossInputs, own: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Compute the log-probabilities for the reference model, after the model's own, without a gradient."""
    found = inputs.reference.after(own).token_logprobs(temperature=inputs.config.objective.temperature)
    return jax.lax.stop_gradient(found.logprobs)


def logprob_gap(found: Answers) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return the metric of how far the sampler's log-probabilities are from the trainer's for the same parameters."""
    gap = jnp.where(found.mask, jnp.abs(jax.lax.stop_gradient(found.old) - found.sampler), 0.0)
    return {"rollout/logprob_gap": (jnp.sum(gap), jnp.sum(found.mask, dtype=jnp.float32))}


def warning(section: Any, means: Mapping[str, float]) -> str | None:
    """Return what keeps a model from learning from its rewards, or None."""
    if means.get("frac_reward_zero_std") == 1:
        return (
            f"the {section.num_generations} answers to each prompt all have the same reward, so that nothing is learned from "
            "them: is the task too hard or too easy for the model, or does the reward not tell answers apart? More "
            "objective.num_generations, a higher temperature, a reward for a part of the task, or training on examples first "
            "(objective.name: sft) may help"
        )
    if means.get("completions/clipped_ratio") == 1:
        return (
            f"every answer is cut off at objective.max_completion_length, {section.max_completion_length} tokens: raise it, or "
            "reward shorter answers (length); does the model end its answers at all?"
        )
    return None


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
