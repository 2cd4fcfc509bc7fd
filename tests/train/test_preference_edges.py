"""Losses of preferences where there is least to compare: rows of padding, answers of one token, answers that are certain."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trl_oracle import Known

from ftjax.config.preference import CpoConfig, DpoConfig, KtoConfig, OrpoConfig, SimpoConfig
from ftjax.objectives import objective_of

SECTIONS = {
    "dpo": DpoConfig(loss_type=["sigmoid", "sigmoid_norm", "sft"]),
    "aot": DpoConfig(loss_type=["aot", "aot_unpaired"], label_smoothing=0.1),
    "simpo": SimpoConfig(alpha=0.2),
    "cpo": CpoConfig(),
    "orpo": OrpoConfig(),
    "kto": KtoConfig(),
}


def loss(section, segments, weights, labels, logprobs):
    """Totals, and the gradient of the loss with respect to the log-probabilities; a reference gives each answer 0."""
    batch = {"segment_ids": np.array([segments], np.int32), "weights": np.array([weights], np.float32)}
    batch |= {"labels": np.array([labels], np.float32), "tokens": np.zeros((1, len(segments)), np.int32)}
    config = SimpleNamespace(objective=section)
    record = objective_of(config)

    def total(known):
        parts = None, {}, {}, batch, None, 0, config
        totals, _ = record.loss(Known(*parts, Known(*parts, known=0 * known), own_statistics=record.statistics, known=known))
        return totals.loss, totals

    gradient, totals = jax.jit(jax.grad(total, has_aux=True))(jnp.array([logprobs], jnp.float32))
    return totals, np.asarray(gradient)


@pytest.mark.parametrize("name", SECTIONS)
def test_padding_alone(name):
    """As a microbatch may have, or the last batch of an evaluation on several hosts."""
    totals, gradient = loss(SECTIONS[name], [0] * 8, [0] * 8, [0] * 8, [0] * 8)
    assert totals.loss == totals.weight == 0 and not gradient.any()
    assert all(value == count == 0 for value, count in totals.metrics.values())


def test_a_row_of_the_shortest_answers():
    """Of two tokens with the prompt: all of them count, whatever the length of the row."""
    section = KtoConfig(loss_type="apo_zero_unpaired")
    totals, gradient = loss(section, [1, 1, 2, 2, 3, 3], [1, 0, 1, 0, 1, 0], [1, 0, -1, 0, 1, 0], [-2] * 6)
    assert totals.weight == 3 and (gradient != 0).sum() == 3
    assert totals.metrics["logps/chosen"] == (-4, 2) and totals.metrics["logps/rejected"] == (-2, 1)


@pytest.mark.parametrize("chosen, rejected", [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-2e-8, -1.0)])
def test_certain_answers(chosen, rejected):
    """The odds of a probability that float32 rounds to 1 are bounded: an infinite one would lose the whole update."""
    logprobs = [-0.5, chosen, 0, -0.5, rejected, 0]
    totals, gradient = loss(OrpoConfig(), [1, 1, 1, 2, 2, 2], [0, 1, 0, 0, 1, 0], [0] * 6, logprobs)
    assert np.isfinite(totals.loss) and np.isfinite(gradient).all() and gradient.any()
