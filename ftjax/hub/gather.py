"""Device arrays back on the host, a part at a time, on one process or many."""

from collections.abc import Callable

import jax
import numpy as np


def host_piece(array: jax.Array, index: tuple[int | slice, ...]) -> Callable[[], np.ndarray]:
    """A function that fetches `array[index]`; with several processes each of them must call it."""

    def fetch() -> np.ndarray:
        piece = array[index]
        if piece.is_fully_addressable:
            return np.asarray(piece)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(piece, tiled=True))

    return fetch
