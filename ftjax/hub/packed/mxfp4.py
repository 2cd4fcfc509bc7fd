"""Microscaling FP4 checkpoints (gpt-oss): blocks of 32 four-bit floats with a shared power-of-two scale, read as bfloat16.

A matrix `W` of each expert is stored as `<name>_blocks` uint8 (X, N, I / 32, 16), two values per byte with the lower half
first, and `<name>_scales` uint8 (X, N, I / 32), the exponent plus 127. It represents `W.T`: (X, I, N).

Source: OCP Microscaling Formats Specification 1.0 (2023), element type E2M1, scale type E8M0.
"""

import ml_dtypes
import numpy as np

from ftjax.hub.packed.source import Weight
from ftjax.hub.source import TensorSource

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], axis=1)  # the two values of each byte
BIAS = 127


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Dequantise uint8 blocks `[..., G, 16]` and scales `[..., G]` to bfloat16 `[..., 32 G]`.

    Exact: two significant bits and a power of two fit into bfloat16.
    """
    values = np.ldexp(PAIRS[blocks], scales.astype(np.int32)[..., None, None] - BIAS)
    return values.astype(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], -1)


def mxfp4_weights(source: TensorSource) -> dict[str, Weight]:
    """Return the weights that blocks and scales stand for. One expert is dequantised at a time."""
    have = set(source.keys())
    packed = [name.removesuffix(BLOCKS) for name in have if name.endswith(BLOCKS)]
    return {name: _weight(source, name) for name in packed if name + SCALES in have}


def _weight(source: TensorSource, name: str) -> Weight:
    experts, outputs, groups, size = source.shape(name + BLOCKS)
    width = size * 2  # inputs of a group

    def read(index: tuple[slice, ...]) -> np.ndarray:
        chosen, inputs, rows = index
        needed = slice(inputs.start // width, -(-inputs.stop // width))
        columns = slice(inputs.start - needed.start * width, inputs.stop - needed.start * width)
        out = np.empty([part.stop - part.start for part in index], ml_dtypes.bfloat16)
        for number, expert in enumerate(range(chosen.start, chosen.stop)):
            where = (slice(expert, expert + 1), rows, needed)
            blocks, scales = (source.read(name + end, where)[0] for end in (BLOCKS, SCALES))
            out[number] = dequantise(blocks, scales)[:, columns].T
        return out

    parts = frozenset({name + BLOCKS, name + SCALES})
    return Weight((experts, groups * width, outputs), np.dtype(ml_dtypes.bfloat16), read, parts)
