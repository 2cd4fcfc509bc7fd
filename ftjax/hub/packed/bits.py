"""Unpacks integers of a few bits from 32-bit words."""

import numpy as np


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the unsigned integers of `bits` bits in int32 words `[..., W]`: uint8 `[..., W * 32 // bits]`.

    The words are one stream of bits, lowest first; a number may lie across two words (3, 5, 6 or 7 bits).
    """
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return (stream[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(*stream.shape[:-1], -1)
    each = np.unpackbits(stream, axis=-1, bitorder="little")
    each = each[..., : each.shape[-1] // bits * bits].reshape(*stream.shape[:-1], -1, bits)
    return np.packbits(each, axis=-1, bitorder="little")[..., 0]
