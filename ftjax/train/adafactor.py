"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) as transformers' Trainer sets it up.

There is no first moment and no relative step: the update is the gradient divided by the root of its second moment, scaled down
where its root mean square is above 1. A matrix keeps its second moment factored, as the mean of each row and of each column.
Both steps work on one tensor of transformers' modules at a time, as if the layers were not stacked here: rows and columns are
its last two axes, and all experts of a layer are one tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax.models.nn.param import Spec

DECAY = 0.8  # the past has weight 1 - t^-0.8 in the second moment
TINY = 1e-30  # added to squares
CLIP = 1.0  # the largest root mean square of an update


class FactoredMoments(NamedTuple):
    """Trees like the parameters, with as many axes; reduced axes have size 1.

    Vectors keep their whole second moment in `row`, and an empty array in `col`.
    """

    count: jax.Array  # [] int32: updates so far
    row: Any
    col: Any


@dataclass(frozen=True)
class _Tensor:
    """Axes of one stacked parameter that belong to each of its tensors.

    Attributes:
        rows: axes that are a matrix's rows, counted from the end; None for vectors. Columns are the last axis.
        own: axes of one tensor, counted from the end.
        size: weights of each tensor, without padding; it broadcasts against the parameter.
    """

    rows: tuple[int, ...] | None
    own: tuple[int, ...]
    size: np.ndarray

    @staticmethod
    def of(spec: Spec) -> "_Tensor":
        depth = len(spec.stacked)
        own = len(spec.shape) - depth
        sizes = np.ones(spec.stacked, np.float32)  # a layer without an adapter has an all-zero tensor
        for piece in spec.pieces():
            sizes[piece.index[:depth]] = math.prod(piece.shape)
        split = own - len(spec.row.hf_shape or spec.shape[depth:])  # axes in memory only: of the rows
        rows = None if own < 2 else tuple(range(-2 - split, -1))
        return _Tensor(rows, tuple(range(-own, 0)), sizes.reshape(*spec.stacked, *(1,) * own))


def scale_by_adafactor(specs: Mapping[str, Spec]) -> optax.GradientTransformation:
    """Build Adafactor for the parameters `specs`; gradients and moments are float32."""
    tensors = {path: _Tensor.of(spec) for path, spec in specs.items()}

    def init(params):
        def mean(axes, param):
            return jnp.zeros_like(param if axes is None else jnp.mean(param, axes, keepdims=True))

        def row(path, param):
            return mean(None if tensors[path[-1].key].rows is None else -1, param)

        def col(path, param):
            rows = tensors[path[-1].key].rows
            return jnp.zeros(0) if rows is None else mean(rows, param)

        return FactoredMoments(jnp.int32(0), *(jax.tree.map_with_path(one, params) for one in (row, col)))

    def update(updates, state, params=None):
        count = state.count + 1
        past = 1 - count.astype(jnp.float32) ** -DECAY
        found = {
            path: _update(tensors[path], gradient, state.row[path], state.col[path], past) for path, gradient in updates.items()
        }
        step, row, col = ({path: one[i] for path, one in found.items()} for i in range(3))
        return step, FactoredMoments(count, row, col)

    return optax.GradientTransformation(init, update)


def _update(tensor: _Tensor, gradient: jax.Array, row: jax.Array, col: jax.Array, past: jax.Array) -> tuple[jax.Array, ...]:
    """Return `(update, row, col)`."""
    square = jnp.square(gradient) + TINY
    if tensor.rows is None:
        row = past * row + (1 - past) * square
        step = gradient * jax.lax.rsqrt(row)
    else:
        row = past * row + (1 - past) * jnp.mean(square, -1, keepdims=True)
        col = past * col + (1 - past) * jnp.mean(square, tensor.rows, keepdims=True)
        step = gradient * jax.lax.rsqrt(row / jnp.mean(row, tensor.rows, keepdims=True)) * jax.lax.rsqrt(col)
    rms = jnp.sqrt(jnp.sum(jnp.square(step), tensor.own, keepdims=True) / tensor.size)
    return step / jnp.maximum(rms / CLIP, 1), row, col
