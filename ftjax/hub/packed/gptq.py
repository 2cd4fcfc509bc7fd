"""GPTQ and AWQ checkpoints: integers of 2, 3, 4 or 8 bits with a scale and a zero for each group of inputs.

GPTQ (arXiv:2210.17323) stores a matrix `<name>.weight` (N, I) as `<name>.qweight` int32 (I bits / 32, N), packed along the
inputs, `<name>.scales` (G, N), `<name>.qzeros` int32 (G, N bits / 32) and `<name>.g_idx` int32 (I,), the group of each input.
The first version of the format (`checkpoint_format: gptq`, or none) stores zeros minus 1. Source: gptqmodel,
nn_modules/qlinear.

AWQ (arXiv:2306.00978, version `gemm`) stores it as `<name>.qweight` int32 (I, N bits / 32), packed along the outputs, eight of
them in the order 0, 2, 4, 6, 1, 3, 5, 7. Source: AutoAWQ, utils/packing_utils.py.
"""

from collections.abc import Callable, Set

import numpy as np

from ftjax.hub.packed.bits import unpack
from ftjax.hub.packed.source import Weight
from ftjax.hub.source import TensorSource

AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where each of eight outputs is in its word


def gptq_weights(source: TensorSource, bits: int, first_version: bool) -> dict[str, Weight]:
    """Return the GPTQ weights of a checkpoint; `first_version`: zeros are stored minus 1."""

    def made(name: str, have: Set[str]) -> Weight:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            rows, columns = index
            codes = unpack(source.read(f"{name}.qweight").T[rows], bits)[:, columns]
            scales, zeros = source.read(f"{name}.scales"), unpack(source.read(f"{name}.qzeros"), bits)
            if first_version:
                zeros = zeros + np.uint8(1) & np.uint8((1 << bits) - 1)
            order = f"{name}.g_idx"
            groups = source.read(order) if order in have else np.arange(inputs) // -(-inputs // len(scales))
            return _values(codes, zeros[groups[columns]][:, rows].T, scales[groups[columns]][:, rows].T)

        inputs, outputs = source.shape(f"{name}.qweight")[0] * 32 // bits, source.shape(f"{name}.scales")[1]
        return Weight((outputs, inputs), source.dtype(f"{name}.scales"), read, _parts(name, have))

    return _each(source, made)


def awq_weights(source: TensorSource, bits: int) -> dict[str, Weight]:
    """Return the AWQ weights of a checkpoint."""

    def in_order(words: np.ndarray) -> np.ndarray:
        codes = unpack(words, bits)
        return codes.reshape(*codes.shape[:-1], -1, len(AWQ_PLACES))[..., AWQ_PLACES].reshape(codes.shape)

    def made(name: str, have: Set[str]) -> Weight:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            rows, columns = index
            codes = in_order(source.read(f"{name}.qweight", (columns,)))[:, rows]
            scales, zeros = source.read(f"{name}.scales"), in_order(source.read(f"{name}.qzeros"))
            groups = np.arange(columns.start, columns.stop) // (inputs // len(scales))
            return _values(codes, zeros[groups][:, rows], scales[groups][:, rows]).T

        inputs, outputs = source.shape(f"{name}.qweight")[0], source.shape(f"{name}.scales")[1]
        return Weight((outputs, inputs), source.dtype(f"{name}.scales"), read, _parts(name, have))

    return _each(source, made)


def _each(source: TensorSource, made: Callable[[str, Set[str]], Weight]) -> dict[str, Weight]:
    have = set(source.keys())
    names = [name.removesuffix(".qweight") for name in have if name.endswith(".qweight")]
    return {f"{name}.weight": made(name, have) for name in names}


def _parts(name: str, have: Set[str]) -> frozenset[str]:
    return frozenset({f"{name}.{end}" for end in ("qweight", "qzeros", "scales", "g_idx")} & have)


def _values(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return (codes - zeros) x scales in the scales' dtype, as the kernels of both formats compute it."""
    return (codes.astype(np.int16) - zeros).astype(scales.dtype) * scales
