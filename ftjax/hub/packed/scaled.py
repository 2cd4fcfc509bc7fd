"""Weights of one byte (FP8 or int8) with a scale for the whole matrix, for each row, or for each block.

`<name>.weight` (N, I) and its scales, one number, (N, 1) or one a block:
- FP8 of DeepSeek, Qwen, Mistral and transformers (`quant_method: fp8`): `<name>.weight_scale_inv`, float32, by which the weight
  is multiplied in spite of its name (transformers: integrations/finegrained_fp8.py, `Fp8Dequantize`);
- FP8 of FBGEMM, and `float-quantized`, `int-quantized` and `naive-quantized` of compressed-tensors: `<name>.weight_scale`, and
  `<name>.weight_zero_point` where int8 is not symmetric (compressed_tensors: compressors/naive_quantized).
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from ftjax.errors import UserError
from ftjax.hub.packed.source import Weight
from ftjax.hub.source import TensorSource

SCALES = (".weight_scale_inv", ".weight_scale")
BYTES = (np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


def scaled_weights(source: TensorSource, block: Sequence[int] | None = None) -> dict[str, Weight]:
    """Return the weights of one byte that have scales, in the scales' dtype.

    Args:
        block: rows and columns of a block, where config.json says them.
    """
    have = set(source.keys())
    found = {}
    for name in have:
        end = next((end for end in SCALES if name.endswith(end)), None)
        if end is not None and (weight := name.removesuffix(end) + ".weight") in have and source.dtype(weight) in BYTES:
            zeros = f"{weight}_zero_point"
            found[weight] = _weight(source, weight, name, zeros if zeros in have else None, block)
    return found


def _weight(source: TensorSource, name: str, scales: str, zeros: str | None, block: Sequence[int] | None) -> Weight:
    shape, grid = source.shape(name), source.shape(scales)
    grid = (1,) * (len(shape) - len(grid)) + grid  # one number, or one a row
    if grid[:1] == (1,) and source.shape(scales) == shape[:1]:
        grid = (shape[0], *(1,) * (len(shape) - 1))
    blocks = tuple(
        count if parts == 1 else (given if given and -(-count // given) == parts else count // parts)
        for count, parts, given in zip(shape, grid, (*(0,) * (len(shape) - 2), *(block or (0, 0))), strict=True)
    )
    if any(-(-count // size) != parts for count, size, parts in zip(shape, blocks, grid, strict=True)):
        raise UserError(f"{name} {shape}: its scales {source.shape(scales)} are neither one number, one a row nor one a block")
    dtype = source.dtype(scales)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        where = [np.arange(part.start, part.stop) // size for part, size in zip(index, blocks, strict=True)]
        spread = np.ix_(*where)
        values = source.read(name, index).astype(dtype)
        if zeros is not None:
            values -= source.read(zeros).reshape(grid)[spread].astype(dtype)
        return values * source.read(scales).reshape(grid)[spread]

    return Weight(shape, dtype, read, frozenset({name, scales} | ({zeros} if zeros else set())))
