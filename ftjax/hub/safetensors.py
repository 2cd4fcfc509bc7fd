"""Safetensors in and out, one tensor (or a part of one) at a time.

The format is an 8-byte length, a JSON header and the raw little-endian data (github.com/huggingface/safetensors). The
library's own reader maps the file into memory, and its writer wants all tensors at once; here nothing is held but the
part that is asked for, straight in the buffer where it is needed, so that loading and saving a model costs no second copy.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ftjax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class _Entry(NamedTuple):
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of all shards that `model.safetensors.index.json` names.

    Raises UserError for missing, truncated or damaged files, and where the index and the shards disagree.
    """

    def __init__(self, folder: Path, single: str = SINGLE):
        self._entries: dict[str, _Entry] = {}
        self._handles: dict[Path, int] = {}
        index = folder / INDEX
        if single == SINGLE and index.exists():
            try:
                listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
                raise UserError(f"{index}: not a safetensors index: {error}") from None
            for file in sorted(set(listed.values())):
                self._read_header(folder / file)
            if absent := sorted(set(listed) - set(self._entries)):
                raise UserError(f"{index}: it lists {absent[0]} (and {len(absent) - 1} more), which no shard holds")
        else:
            self._read_header(folder / single)

    def _read_header(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length)) if length <= size - 8 else None
        except FileNotFoundError:
            found = ", ".join(sorted(p.name for p in path.parent.glob("*"))[:12]) or "nothing"
            raise UserError(f"{path}: this file of the model is missing; the folder holds {found}") from None
        except (struct.error, json.JSONDecodeError, UnicodeDecodeError):
            header = None
        if header is None:
            raise UserError(f"{path}: not a safetensors file, or cut off inside its header ({size:,} bytes); download it again")
        header.pop("__metadata__", None)
        end = 8 + length
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{path}: tensor {name} has dtype {entry['dtype']}, which is not supported")
            start, stop = entry["data_offsets"]
            end = max(end, 8 + length + stop)
            if name in self._entries:
                raise UserError(f"{path}: tensor {name} is also in {self._entries[name].file.name}")
            dtype = DTYPES[entry["dtype"]]
            if math.prod(entry["shape"]) * dtype.itemsize != stop - start:
                raise UserError(f"{path}: tensor {name} has a shape that does not fit its data; the file is damaged")
            self._entries[name] = _Entry(path, 8 + length + start, tuple(entry["shape"]), dtype)
        if end > size:
            raise UserError(f"{path}: truncated: its header promises {end:,} bytes, the file has {size:,}; download it again")

    def add_prefix(self, prefix: str, but: tuple[str, ...]) -> None:
        """Name the tensors of a model without a head, `h.0.ln_1.bias`, as those of one with a head,
        `transformer.h.0.ln_1.bias`; transformers loads either.

        Args:
            but: the beginnings of names that stay as they are.
        """
        if not any(name.startswith(f"{prefix}.") for name in self._entries):
            self._entries = {n if n.startswith(but) else f"{prefix}.{n}": entry for n, entry in self._entries.items()}

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """A tensor, or the part of it that the slices (from the first dimension on) cut out, as a new array."""
        entry = self._entries[name]
        rows = index[0] if index else slice(None)
        start, stop, step = rows.indices(entry.shape[0]) if entry.shape else (0, 1, 1)
        assert step == 1, "slices are contiguous"
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        out = np.empty((stop - start, *entry.shape[1:]) if entry.shape else (), entry.dtype)
        self._fill(entry, out, entry.offset + start * row_bytes)
        return out[(slice(None), *index[1:])] if len(index) > 1 else out

    def read_into(self, name: str, out: np.ndarray) -> None:
        """A whole tensor into a contiguous array of its shape and dtype."""
        self._fill(self._entries[name], out, self._entries[name].offset)

    def _fill(self, entry: _Entry, out: np.ndarray, offset: int) -> None:
        handle = self._handles.get(entry.file)
        if handle is None:
            handle = self._handles[entry.file] = os.open(entry.file, os.O_RDONLY)
        buffer = memoryview(out.reshape(-1).view(np.uint8))
        done = 0
        while done < len(buffer):  # one call reads at most 2 GiB
            count = os.preadv(handle, [buffer[done : done + (1 << 30)]], offset + done)
            if not count:
                raise UserError(f"{entry.file}: ended early while it was read; was it changed?")
            done += count

    def __del__(self):
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)


class Tensor(NamedTuple):
    """A tensor to be written: `data()` is called once, when its turn comes, and gives exactly this shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    """One safetensors file; it appears under its name only when it is complete."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": CODES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors:
                data = np.asarray(tensor.data(), order="C")
                assert data.shape == tuple(tensor.shape) and data.dtype == tensor.dtype, (tensor.name, data.shape, data.dtype)
                file.write(memoryview(data.reshape(-1).view(np.uint8)))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written: {error.strerror or error}; nothing was left half-written") from None


def write_model(folder: Path, tensors: Iterable[Tensor], max_shard_bytes: int = 5_000_000_000) -> list[Path]:
    """`model.safetensors`, or numbered shards and their index where the tensors are larger than one shard."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return [folder / SINGLE]
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard)
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (folder / INDEX).write_text(text + "\n")
    return [folder / file for file in files]
