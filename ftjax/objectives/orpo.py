"""ORPO (Hong et al. 2024, arXiv:2403.07691): next-token training on the chosen conversation plus an odds ratio, without a
reference model, as in TRL's `ORPOTrainer`.

Legend: B batch, T length, P pairs of a row.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ftjax.config.preference import OrpoConfig
from ftjax.data.pairs import Pairs
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import LossInputs, Objective
from ftjax.objectives.preference import answer_lengths, answer_sums, mean_over_tokens, pair_totals, total


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the loss of a batch of pairs: that of all chosen tokens, prompts too, minus `beta` times the log odds ratio."""
    section, batch = inputs.config.objective, inputs.batch
    trained, lengths = batch["weights"] != 0, answer_lengths(batch)
    everything = _chosen_targets(batch)
    logprobs = inputs.token_logprobs(jnp.maximum(everything, trained.astype(jnp.float32))).logprobs
    logps = answer_sums(logprobs * batch["weights"], batch).divided_by(lengths)
    there = lengths.chosen > 0
    log_odds = logps.chosen - logps.rejected - (_log1mexp(logps.chosen) - _log1mexp(logps.rejected))
    ratio = jax.nn.log_sigmoid(log_odds)
    losses, count = -answer_sums(logprobs * everything, batch).chosen, jnp.sum(there, dtype=jnp.float32)
    more = {
        "nll_loss": (jnp.sum(losses), jnp.sum(everything)),
        "log_odds_ratio": (total(ratio, there), count),
        "log_odds_chosen": (total(log_odds, there), count),
    }
    each = mean_over_tokens(losses, inputs.statistics) - section.beta * ratio
    return pair_totals(each, lengths, logps.scaled(section.beta), logps, **jax.lax.stop_gradient(more)), inputs.auxiliary


def statistics(inputs: LossInputs) -> dict[str, Float[Array, ""]]:
    """Count the pairs and the tokens of chosen conversations."""
    chosen = answer_lengths(inputs.batch).chosen
    return {"pairs": jnp.sum(chosen > 0, dtype=jnp.float32), "tokens": jnp.sum(_chosen_targets(inputs.batch))}


def _chosen_targets(batch: Mapping[str, Shaped[Array, "B _"]]) -> Float[Array, "B T"]:
    """Return 1 at tokens of chosen documents that are followed by another token of theirs, else 0."""
    segments = batch["segment_ids"]
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return ((segments == following) & (segments % 2 == 1)).astype(jnp.float32)


CERTAIN = -1e-6  # float32 can hardly tell a mean log-probability above it from 0, whose odds are infinite


def _log1mexp(x: jax.Array) -> jax.Array:
    """Return log(1 - e^x) for x <= 0, accurately (Maechler 2012); x above `CERTAIN` counts as that."""
    x = jnp.minimum(x, CERTAIN)
    return jnp.where(x > -0.6931472, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def _derived(section: OrpoConfig, means: Mapping[str, float]) -> dict[str, float]:
    """Return the loss of an evaluation with the mean over all tokens, instead of means by batch."""
    if "nll_loss" not in means:
        return {}
    return {"loss": means["nll_loss"] - section.beta * means["log_odds_ratio"]}


OBJECTIVE = Objective(OrpoConfig, lambda section: Pairs(), loss, _derived, statistics=statistics)
