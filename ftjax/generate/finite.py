"""Logits that are not finite: an error, and never an empty answer or a loss of nothing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError
from ftjax.models.model import Model


class NotFinite(UserError):
    """The model gave NaN or infinite logits."""


def not_finite(where: str, model: Model, params: Mapping[str, Any]) -> NotFinite:
    """The error, with its cause: a weight that is not finite itself, or activations that overflow.

    Args:
        where: what the model was given, for the message.
        params: all of them; every process asks for the same.
    """
    name = _broken_weight(model, params)
    cause = (
        f"{name} holds NaN or infinite values, so that the checkpoint (or the adapter) is broken; take an earlier one"
        if name
        else "its weights are finite, so that its activations overflow; take a dtype with more range (bfloat16 or float32)"
    )
    return NotFinite(f"{where}: the model gives NaN instead of probabilities: {cause}")


def require_finite(values: np.ndarray, where: str, model: Model, params: Mapping[str, Any]) -> None:
    """Raises NotFinite where log-probabilities or scores are none."""
    if not np.isfinite(values).all():
        raise not_finite(where, model, params)


def _broken_weight(model: Model, params: Mapping[str, Any]) -> str | None:
    """The Hugging Face name of the first parameter that is not finite."""
    finite = jax.jit(lambda values: jnp.isfinite(values).all())
    for path, value in params.items():
        leaves = [leaf for leaf in jax.tree.leaves(value) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not all(bool(finite(leaf)) for leaf in leaves):
            return next((piece.name for piece in model.specs[path].pieces() if _is_broken(value, piece.index)), path)
    return None


def _is_broken(value: Any, index: tuple) -> bool:
    return isinstance(value, jax.Array) and not bool(jnp.isfinite(value[index]).all())
