"""`pack-quantized` checkpoints of compressed-tensors (llm-compressor): integers of 1 to 8 bits in 32-bit words.

A matrix `<name>.weight` (N, I) is stored as `<name>.weight_packed` int32 (N, ceil(I bits / 32)), the integers plus half their
range; `<name>.weight_scale` (N, groups) or one number; `<name>.weight_shape`; for asymmetric ones `<name>.weight_zero_point`
int32 (ceil(N bits / 32), groups), packed along the rows; and `<name>.weight_g_idx` int (I,), the group of each column, where
columns were sorted before they were grouped.

Source: compressed_tensors, compressors/pack_quantized and quantization/lifecycle/forward.py.
"""

from collections.abc import Set

import numpy as np

from ftjax.hub.packed.bits import unpack
from ftjax.hub.packed.source import Weight
from ftjax.hub.source import TensorSource

PACKED = ".weight_packed"


def packed_weights(source: TensorSource) -> dict[str, Weight]:
    """Return the packed weights of a checkpoint."""
    have = set(source.keys())
    names = [name.removesuffix(PACKED) for name in have if name.endswith(PACKED)]
    return {f"{name}.weight": _weight(source, name, have) for name in names}


def _weight(source: TensorSource, name: str, have: Set[str]) -> Weight:
    packed, scales, zeros, order = (f"{name}.weight_{end}" for end in ("packed", "scale", "zero_point", "g_idx"))
    rows, columns = (int(size) for size in source.read(f"{name}.weight_shape"))
    # The words of a row hold its columns with less than a word left over, and groups are of equal size.
    words = source.shape(packed)[-1]
    bits = next(bits for bits in range(1, 9) if -(-columns * bits // 32) >= words)
    dtype = source.dtype(scales)
    groups = source.shape(scales)[-1] if len(source.shape(scales)) == 2 else 1
    half = 1 << (bits - 1)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        chosen, part = index
        values = unpack(source.read(packed, (chosen,)), bits)[:, part].astype(np.int16) - half
        group = source.read(order)[part] if order in have else np.arange(part.start, part.stop) // -(-columns // groups)
        scale = np.broadcast_to(source.read(scales).reshape(-1, groups), (rows, groups))[chosen][:, group]
        if zeros in have:
            zero = unpack(source.read(zeros).T, bits).T[chosen].astype(np.int16) - half
            values = values - zero[:, group]
        return values.astype(dtype) * scale

    return Weight((rows, columns), dtype, read, frozenset({packed, f"{name}.weight_shape", scales, zeros, order} & have))
