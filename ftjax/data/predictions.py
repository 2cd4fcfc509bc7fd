"""A teacher's predictions on disk: the likeliest tokens at each trained token, with their log-probabilities.

One Arrow IPC file (Feather version 2, https://arrow.apache.org/docs/format/Columnar.html) for each data set, with a row for
each trained token:

    document   int32                       number of the document in the data set
    position   int32                       place of the token in its document
    token      int32                       the token itself
    ids        fixed_size_list<int32>[K]   what the teacher finds likeliest in its place, the likeliest first
    logprobs   fixed_size_list<float>[K]   their log-probabilities, natural logarithm
    rest       float                       that of all other ids together

`ftjax` in the metadata of the schema is JSON: `version`, `documents` (digest of the data), `teacher` (digests of its files),
`top_k` (K), `temperature` and `vocabulary`, the number of ids that the probabilities are over. The rows of a document follow
each other; documents are in any order. Any library for Arrow reads it: `polars.read_ipc(FILE)`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64

from ftjax.data.store import Documents
from ftjax.errors import UserError

VERSION = 1
KEY = b"ftjax"
MOST = 1 << 24  # ids below are exact in float32


class Writer:
    """Writes the rows of documents."""

    def __init__(self, writer: Any, schema: pa.Schema):
        self._writer, self._schema = writer, schema

    def add(
        self, document: Int32[np.ndarray, " N"], position: Int32[np.ndarray, " N"], token: Int32[np.ndarray, " N"],
        ids: Int32[np.ndarray, "N k"], logprobs: Float32[np.ndarray, "N k"], rest: Float32[np.ndarray, " N"],
    ) -> None:  # fmt: skip
        """Add rows: whole documents."""
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]) for x in (ids, logprobs)]
        columns = [pa.array(x) for x in (document, position, token)] + [*lists, pa.array(rest)]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))


@contextmanager
def new_predictions(path: Path, facts: Mapping[str, Any]) -> Iterator[Writer]:
    """Write a file, which replaces the one at `path` when it is complete.

    Args:
        facts: of the metadata; `version` is added.

    Raises UserError if it cannot be written.
    """
    size = facts["top_k"]
    lists = {"ids": pa.list_(pa.int32(), size), "logprobs": pa.list_(pa.float32(), size)}
    fields = {**dict.fromkeys(("document", "position", "token"), pa.int32()), **lists, "rest": pa.float32()}
    schema = pa.schema(list(fields.items()), {KEY: json.dumps({"version": VERSION, **facts})})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            yield Writer(writer, schema)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # where it could not be made
            temporary.unlink()


def facts_of(path: Path) -> dict[str, Any] | None:
    """Return the metadata of a file; None if there is no such file. Raises UserError if it is damaged or of another kind."""
    if not path.is_file():
        return None
    try:
        with pa.memory_map(str(path)) as file:
            facts = json.loads((pa.ipc.open_file(file).schema.metadata or {})[KEY])
    except (pa.ArrowException, KeyError, ValueError):
        raise UserError(f"{path}: no predictions of a teacher, or damaged; run ftjax teach again") from None
    if facts["version"] != VERSION:
        raise UserError(f"{path}: its version is {facts['version']}, expected {VERSION}; run ftjax teach again")
    return facts


class Predictions:
    """The predictions for the documents of a data set, read where they are needed from a mapped file.

    Attributes:
        top_k: likely tokens that are used; further ones in the file count as the rest.
        facts: the metadata.
    """

    def __init__(self, path: Path, documents: Documents, chosen: Int64[np.ndarray, " N"], top_k: int):
        """Open a file. Raises UserError unless it has all trained tokens of the chosen documents."""
        found = facts_of(path)
        assert found is not None
        self.facts, self.top_k = found, top_k
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        names = ("ids", "logprobs")
        self._lists = {name: [_table(batch.column(name), found["top_k"]) for batch in batches] for name in names}
        self._rest = [batch.column("rest").to_numpy() for batch in batches]
        self._first = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)])
        of = np.concatenate([batch.column("document").to_numpy() for batch in batches]) if batches else np.zeros(0, np.int32)
        starts = np.flatnonzero(np.diff(of, prepend=-1))
        self._starts, self._counts = np.full(len(documents), -1), np.zeros(len(documents), np.int64)
        self._starts[of[starts]], self._counts[of[starts]] = starts, np.diff(np.append(starts, len(of)))
        if len(lost := np.flatnonzero(self._counts[chosen] != documents.trained[chosen])):
            where = documents.where[int(chosen[lost[0]])].as_py()
            raise UserError(f"{path}: it lacks predictions, first those of {where}; run ftjax teach again")

    @property
    def width(self) -> int:
        """Values of a token (`labels`)."""
        return width_of(self.top_k)

    def of(self, documents: Int64[np.ndarray, " D"]) -> Float32[np.ndarray, "N width"]:
        """Return the predictions for the trained tokens of these documents, in order: ids, log-probabilities, rest."""
        starts, counts = self._starts[documents], self._counts[documents]
        before = np.cumsum(counts) - counts
        rows = np.repeat(starts - before, counts) + np.arange(counts.sum())
        found = np.empty((len(rows), self.width), np.float32)
        batch = np.searchsorted(self._first, rows, side="right") - 1
        for number in np.unique(batch):
            here = batch == number
            inside, k = rows[here] - self._first[number], self.top_k
            logprobs, rest = self._lists["logprobs"][number][inside], self._rest[number][inside]
            found[here, :k] = self._lists["ids"][number][inside, :k]
            found[here, k:-1] = logprobs[:, :k]
            found[here, -1] = np.logaddexp.reduce([rest, *logprobs[:, k:].T])
        return found


def width_of(top_k: int) -> int:
    """Return the number of values of a token: ids, log-probabilities, and the rest."""
    return 2 * top_k + 1


def _table(column: pa.Array, width: int) -> np.ndarray:
    return column.flatten().to_numpy().reshape(-1, width)
