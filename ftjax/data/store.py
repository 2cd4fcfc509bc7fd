"""The cache of tokenised documents: one memory-mapped Arrow file for each combination of inputs.

The folder is `FTJAX_CACHE`, or `~/.cache/ftjax`. Its `tokens/KEY/` holds `documents.arrow` (one record batch: `tokens`,
`weights` and, per document, `trained`, `truncated`, `row`, `digest`, `source`, `where`, and `labels` for several labels or
numbers) and `report.json`, with the report and a digest of all tokens, weights and labels. KEY is a digest of the data's
bytes, the tokenizer with its chat template, and every option that determines the tokens.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash
from filelock import FileLock

from ftjax.data.encoder import Encoded
from ftjax.errors import UserError

FILE, REPORT = "documents.arrow", "report.json"


def cache_folder() -> Path:
    """Return the folder of ftjax's caches, which can be rebuilt."""
    return Path(os.environ.get("FTJAX_CACHE") or Path.home() / ".cache" / "ftjax").expanduser()


@dataclass(frozen=True)
class Documents:
    """Document `d` is `tokens[starts[d] : starts[d + 1]]`, and `weights` likewise; all arrays are views of one file."""

    tokens: np.ndarray  # int32 [all]
    weights: np.ndarray  # float32 or, where each is 0 or 1, uint8 [all]
    starts: np.ndarray  # int64 [D + 1]
    trained: np.ndarray  # int32 [D], tokens that are trained as targets
    truncated: np.ndarray  # uint8 [D], 1 where the row was truncated
    row: np.ndarray  # row number; documents split from one long row share it
    digest: np.ndarray  # hash of the row's content
    source: np.ndarray  # int32 [D]
    where: Any  # pyarrow string array [D]
    report: dict[str, Any]
    content: str  # digest of all tokens, weights, labels and document boundaries
    highest: int = -1  # highest token id; -1 without any
    labels: np.ndarray | None = None  # float32 [D, labels], for several labels or numbers

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, number: int) -> Encoded:
        part = slice(int(self.starts[number]), int(self.starts[number + 1]))
        where = self.where[int(number)].as_py()
        labels = None if self.labels is None else self.labels[number]
        return Encoded(self.tokens[part], self.weights[part].astype(np.float32), where, int(self.source[number]), labels)


class Writer:
    """Writes documents one by one: values go to disk as they come and do not stay in memory."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._tokens: BinaryIO = (folder / "tokens.bin").open("w+b")
        self._weights: BinaryIO = (folder / "weights.bin").open("w+b")
        self._binary, self._highest = True, -1
        self._digests = [xxhash.xxh3_128() for _ in range(3)]  # of tokens, weights, lengths, and labels if present
        self._labels: list[np.ndarray] = []
        self._values: dict[str, list[Any]] = {
            name: [] for name in ("length", "trained", "truncated", "row", "digest", "source", "where")
        }

    def add(self, documents: Sequence[Encoded], truncated: Sequence[bool], rows: Sequence[int], digests: Sequence[int]) -> None:
        """Add documents.

        Args:
            truncated: whether each document was truncated.
            rows: the row number of each document.
            digests: the hash of the content of each document's row.
        """
        if not documents:
            return
        weights = np.concatenate([document.weights for document in documents])
        self._binary = self._binary and bool(((weights == 0) | (weights == 1)).all())
        tokens = np.concatenate([document.tokens for document in documents])
        self._highest = max(self._highest, int(tokens.max(initial=-1)))
        parts = (
            tokens.tobytes(),
            weights.tobytes(),
            np.array([len(document.tokens) for document in documents], np.int64).tobytes(),
        )
        if documents[0].labels is not None:
            self._labels += [document.labels for document in documents]
            parts = (*parts, np.stack([document.labels for document in documents]).tobytes())
            self._digests += [xxhash.xxh3_128()] * (len(self._digests) < len(parts))
        for digest, part in zip(self._digests, parts, strict=True):
            digest.update(part)
        self._tokens.write(parts[0])
        self._weights.write(parts[1])
        values = self._values
        values["length"] += [len(document.tokens) for document in documents]
        values["trained"] += [int(np.count_nonzero(document.weights[1:])) for document in documents]
        values["source"] += [document.source for document in documents]
        values["where"] += [document.where for document in documents]
        values["truncated"] += truncated
        values["row"] += rows
        values["digest"] += digests

    def finish(self, report: dict[str, Any]) -> None:
        """Write the Arrow file and the report."""
        self.close()
        values = self._values
        starts = np.concatenate([[0], np.cumsum(values["length"], dtype=np.int64)])
        tokens = _mapped(self._folder / "tokens.bin", np.int32)
        weights = _mapped(self._folder / "weights.bin", np.float32)
        if self._binary and len(weights):
            small = np.memmap(self._folder / "weights8.bin", np.uint8, "w+", shape=weights.shape)
            for start in range(0, len(weights), 1 << 24):
                small[start : start + (1 << 24)] = weights[start : start + (1 << 24)]
            weights = small
        columns = {
            "tokens": _lists(starts, tokens),
            "weights": _lists(starts, weights),
            "trained": pa.array(np.array(values["trained"], np.int32)),
            "truncated": pa.array(np.array(values["truncated"], np.uint8)),
            "row": pa.array(np.array(values["row"], np.int64)),
            "digest": pa.array(np.array(values["digest"], np.uint64)),
            "source": pa.array(np.array(values["source"], np.int32)),
            "where": pa.array(values["where"], pa.large_string()),
        }
        if self._labels:
            flat = np.concatenate(self._labels).astype(np.float32)
            columns["labels"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), len(self._labels[0]))
        batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
        with pa.OSFile(str(self._folder / FILE), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        for part in self._folder.glob("*.bin"):
            part.unlink()
        size = (self._folder / FILE).stat().st_size
        content = xxhash.xxh3_128_hexdigest(b"".join(digest.digest() for digest in self._digests))
        saved = {"size": size, "content": content, "highest": self._highest, "report": report}
        (self._folder / REPORT).write_text(json.dumps(saved), encoding="utf-8")

    def close(self) -> None:
        self._tokens.close()
        self._weights.close()


def _lists(starts: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(starts), pa.array(values))


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def open_documents(folder: Path) -> Documents | None:
    """Open the documents in a folder of the cache; None if they are incomplete."""
    try:
        saved = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if (folder / FILE).stat().st_size != saved["size"]:
            return None
        batch = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).get_batch(0)
        values = {name: batch.column(name).flatten().to_numpy() for name in ("tokens", "weights")}
        starts = batch.column("tokens").offsets.to_numpy()
        fields = [batch.column(name).to_numpy() for name in ("trained", "truncated", "row", "digest", "source")]
        labels = None
        if "labels" in batch.schema.names:
            labels = batch.column("labels").flatten().to_numpy().reshape(batch.num_rows, -1)
        fields += [batch.column("where"), saved["report"], saved["content"], saved["highest"], labels]
        return Documents(values["tokens"], values["weights"], starts, *fields)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None


def cached(key: str, build: Callable[[Writer], dict[str, Any]]) -> tuple[Documents, bool]:
    """Return the documents of `key`, and whether they were cached; `build` writes missing ones and returns their report.

    Processes that need the same documents at the same time wait for the first of them.

    Raises UserError if the folder cannot be written or the disk is full.
    """
    root = cache_folder() / "tokens"
    folder = root / key
    found = open_documents(folder)
    if found is not None:
        return found, True
    with _disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            found = open_documents(folder)
            if found is not None:
                return found, True
            temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{key}."))
            writer = None
            try:
                writer = Writer(temporary)
                writer.finish(build(writer))
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(temporary, folder)
            finally:
                if writer is not None:
                    writer.close()
                shutil.rmtree(temporary, ignore_errors=True)
        found = open_documents(folder)
    if found is None:
        raise UserError(f"{folder}: the tokenised data that was just written cannot be read back; is the disk sound?")
    return found, False


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(root if root.exists() else root.parent).free / 2**30
            what = f"the disk is full ({free:.1f} GiB free)"
        else:
            what = f"cannot be written: {error.strerror or error}"
        raise UserError(
            f"{root}: {what}, and tokenised data is kept there; set FTJAX_CACHE to a folder with room, or data.streaming: true"
        ) from None
