"""Routers that choose groups of experts first: those of DeepSeek V2 and V3, which other families have taken over.

Sources: DeepSeek-AI 2024 (arXiv:2405.04434, section 2.2.2; arXiv:2412.19437, eq. 13 to 16).

Legend: B batch, T length, E embed, X experts, k experts per token.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from ftjax.models.nn.layers import project
from ftjax.models.nn.param import Init, param


@dataclass(frozen=True)
class Groups:
    """Experts in `count` equal groups, of which a token uses the `kept` strongest.

    Attributes:
        judges: number of a group's best experts whose scores add up to its strength.
    """

    count: int
    kept: int
    judges: int


class GroupRouter(nnx.Module):
    """Scores each token for each expert, in float32. Like `Router`, it is not a `Linear`."""

    def __init__(
        self,
        embed: int,
        experts: int,
        top_k: int,
        *,
        scores: Literal["sigmoid", "softmax"],
        groups: Groups | None,
        normalise: bool,
        scale: float,
        corrected: bool,
    ):
        """Create abstract weights.

        Args:
            normalise: the weights of the chosen experts sum to 1 before scaling.
            scale: factor on the weights.
            corrected: a bias, which no gradient trains, is added to the scores for the choice, and not to the weights.
        """
        self.top_k, self.groups, self.normalise, self.scale = top_k, groups, normalise, scale
        self.scores = scores
        self.weight = param((experts, embed), ("experts", "embed"), "weight")
        bias = param((experts,), ("experts",), "e_score_correction_bias", init=Init("zeros"), constant=True, float32=True)
        self.e_score_correction_bias = bias if corrected else None

    def __call__(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float32[Array, "B T X"], Int32[Array, "B T k"], Float32[Array, "B T k"]]:
        """Return the logits, the chosen experts of each token, and their weights."""
        logits = project(x.astype(jnp.float32), self.weight[...])
        scores = jax.nn.sigmoid(logits) if self.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        rank = jax.lax.stop_gradient(scores)
        if self.e_score_correction_bias is not None:
            rank = rank + self.e_score_correction_bias[...]
        if self.groups is not None:
            rank = self._of_strong_groups(rank, self.groups)
        _, chosen = jax.lax.top_k(rank, self.top_k)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalise:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return logits, chosen, weights * self.scale

    @staticmethod
    def _of_strong_groups(rank: Float[Array, "B T X"], groups: Groups) -> Float[Array, "B T X"]:
        """Return the scores with those outside the strongest groups replaced by -inf."""
        apart = rank.reshape(*rank.shape[:-1], groups.count, -1)
        strength = jnp.sum(jax.lax.top_k(apart, groups.judges)[0], axis=-1)
        _, strongest = jax.lax.top_k(strength, groups.kept)
        kept = jnp.any(strongest[..., None] == jnp.arange(groups.count), axis=-2)
        return jnp.where(kept[..., None], apart, -jnp.inf).reshape(rank.shape)
