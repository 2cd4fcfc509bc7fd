"""Reads and writes safetensors, one tensor (or a part of one) at a time.

The format is an 8-byte length, a JSON header and the raw little-endian data (github.com/huggingface/safetensors). The
library's reader maps the file into memory, and its writer needs all tensors at once. This module holds only the requested
part, directly in its target buffer, so that loading and saving a model needs no second copy.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ftjax.config.load import print_note
from ftjax.errors import UserError
from ftjax.long_steps import long_step

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
READERS, PART = 2, 1 << 26  # threads that read a parameter, and bytes that one reads at a time
SAMPLE = 1 << 16  # values compared at each of three places of a tensor


class _Entry(NamedTuple):
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


def _stop(entry: Any) -> int:
    """Return where an entry of a header ends, as far as that is known."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[1] if isinstance(offsets, list) and len(offsets) == 2 and isinstance(offsets[1], int) else 0


def _listed(index: Path) -> dict[str, str]:
    """Return an index's weight map: the file of each tensor. Raises UserError for files outside the index's folder."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = isinstance(listed, dict) and all(isinstance(file, str) for file in listed.values())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not a safetensors index: {error}") from None
    if not named or not listed:
        raise UserError(f"{index}: not a safetensors index: weight_map should name the file of each tensor")
    for file in listed.values():
        if file in ("", "..") or file != Path(file).name or "\\" in file:
            raise UserError(f"{index}: it names {file!r}, and shards have to be in the folder itself; correct the index")
    return listed


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of all shards that `model.safetensors.index.json` names.

    As in transformers, the single file takes precedence if both are present; an index whose shards are missing is ignored
    with a note.

    Raises UserError for missing, truncated or damaged files, for an index that points outside the folder or disagrees with
    its shards, and if the file and the shards are different models.
    """

    def __init__(self, folder: Path, single: str = SINGLE):
        self._entries: dict[str, _Entry] = {}
        self._handles: dict[Path, int] = {}
        index, whole = folder / INDEX, folder / single
        listed = _listed(index) if single == SINGLE and index.exists() else {}
        shards = sorted(set(listed.values()))
        if not shards or (whole.is_file() and single not in shards):
            self._read_header(whole)
            if lost := [file for file in shards if not (folder / file).exists()]:
                print_note(f"{index} is ignored: it names {lost[0]}, which is not there, and {single} is")
            elif shards:
                self._refuse_another(folder, listed)
        else:
            self._read_shards(index, listed)

    def _read_shards(self, index: Path, listed: Mapping[str, str]) -> None:
        for file in sorted(set(listed.values())):
            self._read_header(index.parent / file)
        if absent := sorted(set(listed) - set(self._entries)):
            raise UserError(f"{index}: it lists {absent[0]} (and {len(absent) - 1} more), which no shard holds")

    def _refuse_another(self, folder: Path, listed: Mapping[str, str]) -> None:
        """Raise UserError if the shards of an index differ from the file that was read."""
        shards = SafetensorsFolder.__new__(SafetensorsFolder)
        shards._entries, shards._handles = {}, {}
        shards._read_shards(folder / INDEX, listed)
        if name := first_difference(self, shards):
            raise UserError(
                f"{folder}: it holds two models: {SINGLE}, and the shards of {INDEX}, whose {name} is another; remove the one "
                "that is not meant"
            )

    def _read_header(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length)) if length <= size - 8 else None
        except FileNotFoundError:
            found = ", ".join(sorted(p.name for p in path.parent.glob("*"))[:12]) or "nothing"
            raise UserError(f"{path}: this file of the model is missing; the folder holds {found}") from None
        except OSError as error:
            raise UserError(f"{path}: could not be read: {error.strerror or error}") from None
        except (struct.error, ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise UserError(f"{path}: not a safetensors file, or cut off inside its header ({size:,} bytes); download it again")
        header.pop("__metadata__", None)
        end = 8 + length + max((_stop(entry) for entry in header.values()), default=0)
        if end > size:
            raise UserError(f"{path}: truncated: its header promises {end:,} bytes, the file has {size:,}; download it again")
        for name, entry in header.items():
            if isinstance(entry, dict) and str(entry.get("dtype", "F32")) not in DTYPES:
                raise UserError(f"{path}: tensor {name} has dtype {entry['dtype']!r}, which is not supported")
            if name in self._entries:
                raise UserError(f"{path}: tensor {name} is also in {self._entries[name].file.name}")
        try:  # the library checks headers: shapes that fit, and offsets without gaps and overlaps
            with safe_open(path, "numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path}: the file is damaged, or no safetensors file ({error}); download it again") from None
        for name, entry in header.items():
            start = 8 + length + entry["data_offsets"][0]
            self._entries[name] = _Entry(path, start, tuple(entry["shape"]), DTYPES[entry["dtype"]])

    def add_prefix(self, prefix: str, but: tuple[str, ...], but_with: tuple[str, ...] = ()) -> None:
        """Rename tensors of a model without a head, `h.0.ln_1.bias`, to those of one with a head,
        `transformer.h.0.ln_1.bias`; transformers loads either.

        Args:
            but: prefixes of names that stay unchanged.
            but_with: prefixes of names of which one says that this file needs no other.
        """
        if not any(name.startswith((f"{prefix}.", *but_with)) for name in self._entries):
            self._entries = {n if n.startswith(but) else f"{prefix}.{n}": entry for n, entry in self._entries.items()}

    def rename(self, to: Callable[[str], str]) -> None:
        """Give each tensor the name `to(name)`."""
        self._entries = {to(name): entry for name, entry in self._entries.items()}

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """Return a tensor, or the part that slices (from the first dimension on) select, as a new array."""
        entry = self._entries[name]
        rows = index[0] if index else slice(None)
        start, stop, step = rows.indices(entry.shape[0]) if entry.shape else (0, 1, 1)
        assert step == 1, "slices are contiguous"
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        out = np.empty((stop - start, *entry.shape[1:]) if entry.shape else (), entry.dtype)
        self._fill(entry.file, entry.offset + start * row_bytes, memoryview(out.reshape(-1).view(np.uint8)))
        return out[(slice(None), *index[1:])] if len(index) > 1 else out

    def read_all(self, names: Sequence[str], out: np.ndarray) -> None:
        """Read whole tensors of one shape and dtype, in this order, into a contiguous array.

        Several threads read: each copies or waits for the disk by itself.
        """
        buffer, parts = memoryview(out.reshape(-1).view(np.uint8)), []
        size = len(buffer) // len(names)
        for number, entry in enumerate(self._entries[name] for name in names):
            self._handle(entry.file)
            for start in range(0, size, PART):
                at = number * size
                parts.append((entry.file, entry.offset + start, buffer[at + start : at + min(size, start + PART)]))
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(lambda part: self._fill(*part), parts):
                pass  # raises what a thread has raised

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(file, os.O_RDONLY)
        return self._handles[file]

    def _fill(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Read the bytes of a file from an offset on, as many as fit."""
        handle, done = self._handle(file), 0
        while done < len(buffer):  # one call reads at most 2 GiB
            count = os.preadv(handle, [buffer[done : done + (1 << 30)]], offset + done)
            if not count:
                raise UserError(f"{file}: ended early while it was read; was it changed?")
            done += count

    def __del__(self):
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)


def first_difference(one: SafetensorsFolder, other: SafetensorsFolder) -> str | None:
    """Return the first tensor that two checkpoints do not share or whose first, middle or last rows differ, compared in the
    coarser dtype."""
    if odd := sorted(set(one.keys()) ^ set(other.keys())):
        return odd[0]
    for name in sorted(one.keys()):
        if one.shape(name) != other.shape(name):
            return name
        shape = one.shape(name)
        rows, many = (shape[0], max(1, SAMPLE // max(1, math.prod(shape[1:])))) if shape else (1, 1)
        for start in sorted({0, max(0, rows // 2 - many // 2), max(0, rows - many)}):
            a, b = (part.read(name, (slice(start, min(rows, start + many)),) if shape else ()) for part in (one, other))
            coarse = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
            if a.astype(coarse).tobytes() != b.astype(coarse).tobytes():
                return name
    return None


class Tensor(NamedTuple):
    """A tensor to write: `data()` is called once, in its turn, and returns exactly this shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write one safetensors file, which appears under its name only when complete."""
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
        with partial.open("wb") as file, long_step(f"writing {path.name}", offset, "bytes") as step:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors:
                data = np.asarray(tensor.data(), order="C")
                assert data.shape == tuple(tensor.shape) and data.dtype == tensor.dtype, (tensor.name, data.shape, data.dtype)
                file.write(memoryview(data.reshape(-1).view(np.uint8)))
                step.advance(data.nbytes)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):  # where it could not be made
            partial.unlink()
        raise UserError(f"{path}: could not be written: {error.strerror or error}; nothing was left half-written") from None


def write_model(folder: Path, tensors: Iterable[Tensor], max_shard_bytes: int = 5_000_000_000) -> list[Path]:
    """Write `model.safetensors`, or numbered shards and their index if the tensors exceed one shard."""
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
