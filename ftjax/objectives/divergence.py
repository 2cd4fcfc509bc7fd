"""Divergences between two distributions over the same outcomes, from log-probabilities.

Legend: V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NOTHING = -1e30  # a log-probability in place of minus infinity, whose products with 0 are 0


def log_probabilities(logits: Float[Array, "*of V"], temperature: float) -> Float[Array, "*of V"]:
    """Return finite log-probabilities at a temperature."""
    return jnp.maximum(jax.nn.log_softmax(logits / temperature, axis=-1), NOTHING)


def divergence(student: Float[Array, "*of V"], teacher: Float[Array, "*of V"], beta: float) -> Float[Array, "*of"]:
    """Return the divergence of two distributions from their finite log-probabilities."""
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = jnp.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: Float[Array, "*of V"], q: Float[Array, "*of V"]) -> Float[Array, "*of"]:
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
