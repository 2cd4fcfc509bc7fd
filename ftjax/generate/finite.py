"""Report non-finite logits as an error, rather than as an empty answer or a missing loss."""

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
    """Return the error and its cause: a weight that is not finite, or activations that overflow.

    Args:
        where: the input of the model, for the message.
        params: all parameters. Every process must make this call.
    """
    name = _broken_weight(model, params)
    cause = (
        f"{name} holds NaN or infinite values, so the checkpoint (or the adapter) is broken; use an earlier one"
        if name
        else "its weights are finite, so its activations overflow; use a dtype with more range (bfloat16 or float32)"
    )
    return NotFinite(f"{where}: the model gives NaN instead of probabilities: {cause}")


def require_finite(values: np.ndarray, where: str, model: Model, params: Mapping[str, Any]) -> None:
    """Raise NotFinite if any log-probability or score is not finite."""
    if not np.isfinite(values).all():
        raise not_finite(where, model, params)


def _broken_weight(model: Model, params: Mapping[str, Any]) -> str | None:
    """Return the Hugging Face name of the first parameter that is not finite, or None."""
    finite = jax.jit(lambda values: jnp.isfinite(values).all())
    for path, value in params.items():
        leaves = [leaf for leaf in jax.tree.leaves(value) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not all(bool(finite(leaf)) for leaf in leaves):
            return next((piece.name for piece in model.specs[path].pieces() if _is_broken(value, piece.index)), path)
    return None


def _is_broken(value: Any, index: tuple) -> bool:
    return isinstance(value, jax.Array) and not bool(jnp.isfinite(value[index]).all())
