"""Copies device arrays to the host part by part, on one process or many."""

from collections.abc import Callable

import jax
import numpy as np


def host_piece(
    array: jax.Array, index: tuple[int | slice, ...], shape: tuple[int, ...] | None = None
) -> Callable[[], np.ndarray]:
    """Return a function that fetches `array[index]`, reshaped to `shape` if given. All processes must call it."""

    def fetch() -> np.ndarray:
        if _in_host_memory(array):
            piece = np.asarray(np.asarray(array)[index])
            return piece if shape is None else piece.reshape(shape)
        piece = array[index]
        piece = piece if shape is None else piece.reshape(shape)
        if piece.is_fully_addressable:
            return np.asarray(piece)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(piece, tiled=True))

    return fetch


def _in_host_memory(array: jax.Array) -> bool:
    """Return whether NumPy can index the array in place, for which JAX would compile a program for each shape."""
    return len(array.sharding.device_set) == 1 and array.is_fully_addressable and array.device.platform == "cpu"
