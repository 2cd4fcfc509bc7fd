"""Reads a GGUF file: metadata as plain values, and tensors, dequantised a few rows at a time.

The format is that of github.com/ggml-org/ggml/blob/master/docs/gguf.md; the `gguf` package parses the header and
dequantises the blocks. This module knows nothing about model architectures.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFReader
from gguf.quants import dequantize

from ftjax.errors import UserError

# Read as stored; all other types become float32 when dequantised.
PLAIN = {
    GGMLType.F32: np.dtype(np.float32),
    GGMLType.F16: np.dtype(np.float16),
    GGMLType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# The block formats that `gguf.quants` can dequantise.
QUANTISED = {
    getattr(GGMLType, name)
    for name in (
        "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4",
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    )
}  # fmt: skip

# Rows are dequantised in groups of about this many numbers, so that temporaries stay small beside the result.
GROUP = 1 << 21


class _Reader(GGUFReader):
    """The package's reader on a plain array: slicing a memmap for every string takes three times as long."""

    def _get(self, *args, **kwargs):
        self.data = np.asarray(self.data)
        return super()._get(*args, **kwargs)


class Tensor(NamedTuple):
    """One tensor of the file.

    Attributes:
        type: its storage type.
        shape: in row-major order, as in numpy (ggml writes it reversed).
        rows: the memory-mapped data, `[..., stored width]`: numbers, or uint8 blocks.
    """

    type: GGMLType
    shape: tuple[int, ...]
    rows: np.ndarray


class GGUFFile(NamedTuple):
    """A parsed file: `metadata` by GGUF keys, as Python values; `tensors` by GGUF names."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def dtype(self, name: str) -> np.dtype:
        return PLAIN.get(self.tensors[name].type, np.dtype(np.float32))

    def read_rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        """Return these rows (indices into the first dimension) as a new array; only they are read from disk."""
        tensor = self.tensors[name]
        stored = tensor.rows[rows]
        if tensor.type in PLAIN:
            return np.array(stored).view(PLAIN[tensor.type])
        out = np.empty((len(stored), *tensor.shape[1:]), np.float32)
        step = max(1, GROUP // max(1, int(np.prod(tensor.shape[1:]))))
        for start in range(0, len(stored), step):
            out[start : start + step] = dequantize(stored[start : start + step], tensor.type)
        return out


def open_gguf(path: Path) -> GGUFFile:
    """Parse a file's header. Raises UserError if it is missing, truncated, damaged, split or of an unknown type."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return _open(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # configuration, tokenizer and weights each ask for the same file
def _open(path: Path, size: int, modified: int) -> GGUFFile:
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        swapped = reader.byte_order == "S"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    # The parser has no error type of its own: truncated or damaged files raise numpy's errors.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        if "GGUF magic" in str(error):
            raise UserError(f"{path}: not a GGUF file (it does not begin with the letters GGUF)") from None
        if "GGMLQuantizationType" in str(error):
            number = re.search(r"\d+(?=\D*is not)", str(error))
            raise UserError(f"{path}: {_unsupported(f'type number {number.group() if number else error}')}") from None
        raise UserError(
            f"{path}: truncated or damaged GGUF file of {size:,} bytes ({error}); download it again and compare its size"
        ) from None
    if swapped:
        raise UserError(f"{path}: a big-endian GGUF file; convert it with gguf-convert-endian from the gguf package")
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{path}: one of {metadata['split.count']} parts of a split GGUF file; merge them with llama.cpp's "
            "`llama-gguf-split --merge FIRST_PART OUT.gguf` and give the merged file"
        )
    tensors = {}
    for tensor in reader.tensors:
        if tensor.tensor_type not in PLAIN and tensor.tensor_type not in QUANTISED:
            raise UserError(f"{path}: tensor {tensor.name}: {_unsupported(tensor.tensor_type.name)}")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = Tensor(tensor.tensor_type, shape, tensor.data)
    return GGUFFile(path, metadata, tensors)


def _unsupported(kind: str) -> str:
    names = ", ".join(sorted(t.name for t in {*PLAIN, *QUANTISED}))
    return f"stored as {kind}, which is not supported; those that are: {names}"


def shortest(value: float) -> float:
    """Return the shortest decimal that gives the same float32: GGUF's 9.999999747378752e-06 is config.json's 1e-05."""
    return float(str(np.float32(value)))
