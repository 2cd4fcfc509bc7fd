"""Copies device arrays to the host part by part, on one process or many."""

from collections.abc import Callable

import jax
import numpy as np


def host_piece(
    array: jax.Array, index: tuple[int | slice, ...], shape: tuple[int, ...] | None = None
) -> Callable[[], np.ndarray]:
    """Return a function that fetches `array[index]`, reshaped to `shape` if given. All processes must call it."""

    def fetch() -> np.ndarray:
        piece = array[index]
        piece = piece if shape is None else piece.reshape(shape)
        if piece.is_fully_addressable:
            return np.asarray(piece)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(piece, tiled=True))

    return fetch
