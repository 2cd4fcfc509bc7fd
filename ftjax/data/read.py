"""Reads rows from files, Hub data sets and memory, each with its location.

`{"prompt": "Hi", "completion": "Hello"}` on line 7 of a.jsonl becomes `Row({"prompt": ..., "completion": ...}, "a.jsonl:7")`.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ftjax.config.data import SourceConfig
from ftjax.data.faults import Faults
from ftjax.data.find import PLAIN, TABLES, Found, HubSet, find, kind
from ftjax.data.json_files import read_json, read_jsonl
from ftjax.data.memory import Memory
from ftjax.data.row import Row
from ftjax.data.text_encoding import LOOKED_AT, as_utf8, found_encoding
from ftjax.data.text_files import read_csv, read_plain
from ftjax.data.values import plain
from ftjax.errors import UserError

__all__ = ["Row", "read_rows"]


def read_rows(
    source: SourceConfig | str, faults: Faults | None = None, *, found: Found | None = None, streaming: bool = False
) -> Iterator[Row]:
    """Yield every row of a source in order, or the first `source.limit` of them.

    Args:
        faults: handles broken rows; None raises.
        found: the result of `find(source)`, if known.
        streaming: read a Hub data set as it arrives, without downloading all of it.

    Raises UserError, with file and line, for data that is missing, broken or empty, or that changes while it is read.
    """
    source = SourceConfig(path=source, split="train") if isinstance(source, str) else source
    faults = faults or Faults()
    found = find(source) if found is None else found
    count = 0
    for row in islice(_rows(source, found, faults, streaming), source.limit):
        count += 1
        yield row
    if not count:
        skipped = f"; all {faults.count} rows were broken, the first: {faults.messages[0]}" if faults.count else ""
        raise UserError(f"{source.path}: the data is empty: no rows; expected at least one example{skipped}")


def _rows(source: SourceConfig, found: Found, faults: Faults, streaming: bool) -> Iterator[Row]:
    if isinstance(found, Memory):
        yield from found.rows()
        return
    if isinstance(found, HubSet):
        number = 0
        try:
            for values in found.load(streaming):
                yield Row({name: plain(value) for name, value in values.items()}, f"{source.path}[{number}]")
                number += 1
        except (OSError, ValueError, RuntimeError) as error:  # the network failed, or a shard is broken
            raise UserError(f"{source.path}[{number}]: cannot be read: {(str(error).splitlines() or ['?'])[0]}") from None
        return
    if found.left_out:
        faults.note(found.left_out)
    before = found.state()
    for path in found.paths:
        yield from read_file(path, faults, source)
    for path, one, other in zip(found.paths, before, found.state(), strict=True):
        if one != other:
            raise UserError(f"{path}: the file was changed while it was read; start again when it is complete")


def read_file(path: Path, faults: Faults, source: SourceConfig) -> Iterator[Row]:
    """Yield the rows of one file, read as `source` says."""
    suffix, encoding = kind(path), source.encoding
    if suffix in TABLES and path.suffix.lower() == suffix:
        yield from _table(path, suffix)
        return
    try:
        with _open(path) as file:
            if suffix in TABLES:
                yield from _table(io.BytesIO(file.read()), suffix, str(path))
                return
            if encoding is None:
                with _open(path) as look:
                    start = look.read(LOOKED_AT)
                encoding = found_encoding(path, start, faults, suffix in (".csv", ".tsv", *PLAIN))
            file = as_utf8(file, encoding)
            if suffix == ".json":
                yield from read_json(path, file, faults)
            elif suffix in (".csv", ".tsv"):
                yield from read_csv(path, file, source.delimiter, "\t" if suffix == ".tsv" else ",", faults)
            elif suffix in PLAIN:
                yield from read_plain(path, file, source.sample_by or ("line" if suffix == ".txt" else "document"), faults)
            else:
                yield from read_jsonl(path, file, faults)
    except UnicodeError as error:
        raise UserError(f"{path}: not {encoding or 'UTF-8'}, as its first bytes or data.encoding say: {error}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _open(path: Path) -> Any:
    """Open the uncompressed bytes as a binary file."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        return io.BufferedReader(_Zst(path), 1 << 20)
    return path.open("rb")


class _Zst(io.RawIOBase):
    """The uncompressed bytes of a .zst file; raises OSError if the file is truncated."""

    def __init__(self, path: Path):
        import zstandard

        self._error = zstandard.ZstdError
        self._file = path.open("rb")
        self._make = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._object, self._input, self._output, self._inside = self._make(), b"", b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            if not self._input:
                self._input = self._file.read(1 << 18)
                if not self._input:
                    if self._inside:
                        raise OSError("the compressed file ends too early")
                    return 0
            try:
                self._inside = True
                self._output = self._object.decompress(self._input)
            except self._error as error:
                raise OSError(str(error)) from None
            self._input = b""
            if self._object.eof:  # a .zst file may hold several frames in sequence
                self._input, self._object, self._inside = self._object.unused_data, self._make(), False
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _table(file: Path | io.BytesIO, suffix: str, name: str | None = None) -> Iterator[Row]:
    """Yield the rows of a Parquet file, or of an Arrow file by `datasets.save_to_disk` (a stream) or pyarrow (a file)."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path, number = name or str(file), 0
    try:
        batches = parquet.ParquetFile(file).iter_batches(batch_size=1024) if suffix == ".parquet" else _arrow_batches(file, pa)
        for batch in batches:
            if len(set(batch.schema.names)) != len(batch.schema.names):
                raise UserError(f"{path}: a column name occurs twice: {', '.join(batch.schema.names)}")
            # A map becomes a struct; of duplicate names in it the last one counts.
            mixed = [name for name, kind in zip(batch.schema.names, batch.schema.types, strict=True) if not _is_plain(kind, pa)]
            for values in batch.to_pylist(maps_as_pydicts="lossy"):
                for name in mixed:
                    values[name] = plain(values[name])
                yield Row(values, f"{path}[{number}]")
                number += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError, UnicodeDecodeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}[{number}]: not a readable {suffix} file: {reason}") from None


def _is_plain(kind: Any, pa: Any) -> bool:
    """Return whether values of this Arrow type are numbers, text, or lists of them."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_string(kind) or pa.types.is_boolean(kind)


def _arrow_batches(file: Path | io.BytesIO, pa: Any) -> Iterator[Any]:
    source = pa.OSFile(str(file), "rb") if isinstance(file, Path) else pa.BufferReader(file.getvalue())
    with source:
        if source.read(6) == b"ARROW1":
            source.seek(0)
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
