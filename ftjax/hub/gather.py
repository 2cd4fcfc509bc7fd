"""Device arrays back on the host, a part at a time, on one process or many."""

from collections.abc import Callable

import jax
import numpy as np


def host_piece(
    array: jax.Array, index: tuple[int | slice, ...], shape: tuple[int, ...] | None = None
) -> Callable[[], np.ndarray]:
    """A function that fetches `array[index]`, in `shape` where it is given; with several processes each of them must
    call it."""

    def fetch() -> np.ndarray:
        piece = array[index]
        piece = piece if shape is None else piece.reshape(shape)
        if piece.is_fully_addressable:
            return np.asarray(piece)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(piece, tiled=True))

    return fetch
