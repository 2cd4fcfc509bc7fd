"""Microscaling FP4 checkpoints (gpt-oss): blocks of 32 four-bit floats with a shared power-of-two scale, read as bfloat16.

A matrix `W` of each expert is stored as `<name>_blocks` uint8 (X, N, I / 32, 16), two values per byte with the lower half
first, and `<name>_scales` uint8 (X, N, I / 32), the exponent plus 127. It represents `W.T`: (X, I, N).

Source: OCP Microscaling Formats Specification 1.0 (2023), element type E2M1, scale type E8M0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from ftjax.hub.source import TensorSource

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], axis=1)  # the two values of each byte
BIAS = 127


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether config.json says that the checkpoint is in this format."""
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Dequantise uint8 blocks `[..., G, 16]` and scales `[..., G]` to bfloat16 `[..., 32 G]`.

    Exact: two significant bits and a power of two fit into bfloat16.
    """
    values = np.ldexp(PAIRS[blocks], scales.astype(np.int32)[..., None, None] - BIAS)
    return values.astype(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], -1)


class Mxfp4Source:
    """Presents blocks and scales as the tensor that they represent. See `TensorSource`.

    Only the requested experts and groups are read, and one expert is dequantised at a time.
    """

    def __init__(self, source: TensorSource):
        self._source = source
        stored = set(source.keys())
        packed = {name.removesuffix(BLOCKS) for name in stored if name.endswith(BLOCKS)}
        self._packed = {name for name in packed if name + SCALES in stored}
        hidden = {name + end for name in self._packed for end in (BLOCKS, SCALES)}
        self._names = [*(name for name in source.keys() if name not in hidden), *sorted(self._packed)]

    def keys(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._source.shape(name)
        experts, outputs, groups, size = self._source.shape(name + BLOCKS)
        return experts, groups * size * 2, outputs

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if name in self._packed else self._source.dtype(name)

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        if name not in self._packed:
            return self._source.read(name, index)
        shape = self.shape(name)
        index = (*index, *(slice(None),) * (3 - len(index)))
        experts, inputs, outputs = (range(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        width = shape[1] // self._source.shape(name + BLOCKS)[2]  # inputs per group
        groups = slice(inputs.start // width, -(-inputs.stop // width))
        columns = slice(inputs.start - groups.start * width, inputs.stop - groups.start * width)
        out = np.empty((len(experts), len(inputs), len(outputs)), ml_dtypes.bfloat16)
        for number, expert in enumerate(experts):
            where = (slice(expert, expert + 1), slice(outputs.start, outputs.stop), groups)
            blocks, scales = (self._source.read(name + end, where)[0] for end in (BLOCKS, SCALES))
            out[number] = dequantise(blocks, scales)[:, columns].T
        return out
