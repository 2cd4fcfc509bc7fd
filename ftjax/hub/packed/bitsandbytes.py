"""Checkpoints that bitsandbytes quantised: 4 bits (nf4 or fp4) in blocks, or int8 with a scale a row.

4 bits: `<name>.weight` uint8 (N I / 2, 1), two numbers a byte with the upper half first, and beside it `.quant_map` float32
(16,), the values; `.absmax`, the scale of each block; `.quant_state.bitsandbytes__nf4` (or fp4), JSON as bytes. If scales are
quantised in their turn, `.absmax` is uint8 and `.nested_absmax` and `.nested_quant_map` hold what they stand for.
int8: `<name>.weight` int8 (N, I) and `<name>.SCB` float32 (N,), the largest value of each row.

Source: bitsandbytes/functional.py (`QuantState.from_dict`, `dequantize_4bit`, `int8_vectorwise_dequant`).
"""

import json
from collections.abc import Set

import numpy as np

from ftjax.errors import UserError
from ftjax.hub.packed.source import Weight
from ftjax.hub.source import TensorSource

STATE = ".quant_state.bitsandbytes__"
FLOAT = np.dtype(np.float32)
ONE_127TH = np.float32(7.874015718698502e-3)  # bitsandbytes multiplies by this number


def bitsandbytes_weights(source: TensorSource) -> dict[str, Weight]:
    """Return the weights of 4 bits and of int8 in float32, so that quantising them again finds the same codes."""
    have = set(source.keys())
    states = {name.split(STATE)[0]: name for name in have if STATE in name}
    int8 = [name.removesuffix("SCB") for name in have if name.endswith(".SCB")]
    return {name: _four_bits(source, name, state, have) for name, state in states.items()} | {
        f"{name}weight": _int8(source, name) for name in int8
    }


def _four_bits(source: TensorSource, name: str, state: str, have: Set[str]) -> Weight:
    try:
        said = json.loads(source.read(state).tobytes())
        shape, block = tuple(said["shape"]), int(said["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state}: not a quantisation state of bitsandbytes ({error!r}); download the checkpoint again"
        ) from None

    def scales() -> np.ndarray:
        found = source.read(f"{name}.absmax")
        if "nested_offset" not in said:
            return found.astype(np.float32)
        nested = source.read(f"{name}.nested_absmax").astype(np.float32)
        spread = np.repeat(nested, int(said["nested_blocksize"]))[: found.size].reshape(found.shape)
        return source.read(f"{name}.nested_quant_map").astype(np.float32)[found] * spread + np.float32(said["nested_offset"])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        first, last = rows.start * shape[1], rows.stop * shape[1]
        packed = source.read(name, (slice(first // 2, -(-last // 2)),)).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
        values = source.read(f"{name}.quant_map").astype(np.float32)[codes] * scales()[np.arange(first, last) // block]
        return values.reshape(-1, shape[1])[:, columns]

    ends = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    return Weight(shape, FLOAT, read, frozenset({name, state} | {name + end for end in ends} & have))


def _int8(source: TensorSource, name: str) -> Weight:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        largest = source.read(f"{name}SCB")[index[0]].astype(np.float32)
        return source.read(f"{name}weight", index).astype(np.float32) * largest[:, None] * ONE_127TH

    return Weight(source.shape(f"{name}weight"), FLOAT, read, frozenset({f"{name}weight", f"{name}SCB"}))
