"""`data.streaming`: tokenises and packs sets that are larger than the disk, window by window, while reading them.

A window is a fixed number of data rows. Its documents are shuffled and packed together, and its rows follow those of the
window before. Batches take them in order, so only the last batch of an epoch holds rows of padding. Every process reads and
tokenises all of the data and builds its own rows of each batch, so a position is the same for any number of processes:
epoch, window, row in the window. To resume there, the rows before the window are read but not tokenised.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from ftjax.config.data import DataConfig, SourceConfig
from ftjax.data.batch import Batch, batch_arrays, fill, own_rows
from ftjax.data.build import Build
from ftjax.data.encoder import Encoded, Unit
from ftjax.data.encoding import ANSWERS, RowEncoding
from ftjax.data.find import Files, Found, HubSet, find
from ftjax.data.memory import Memory
from ftjax.data.pack import Plan, in_order, pack
from ftjax.data.report import DataReport
from ftjax.data.unknown import refuse_unknown
from ftjax.errors import UserError

WINDOW = 8192  # rows that are shuffled and packed together
UNKNOWN = 10**9  # rows per epoch if its end is unknown


@dataclass(frozen=True)
class Window:
    """The packed documents of one window."""

    number: int
    documents: list[Encoded]
    tokens: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    plan: Plan
    last: bool
    labels: np.ndarray | None = None  # float32 [D, labels], if documents have them

    @classmethod
    def of(
        cls, number: int, documents: list[Encoded], length: int, rng: np.random.Generator | None, last: bool,
        keep: bool = False, sequences: int = 1,
    ) -> "Window":  # fmt: skip
        """Pack documents.

        Args:
            keep: keep their order.
            sequences: this many consecutive documents stay in one row.
        """
        starts = np.concatenate([[0], np.cumsum([len(d.tokens) for d in documents], dtype=np.int64)])
        tokens, weights = (
            np.concatenate([np.zeros(0, dtype), *(getattr(d, name) for d in documents)]).astype(dtype)
            for name, dtype in (("tokens", np.int32), ("weights", np.float32))
        )
        units = np.arange(len(documents)).reshape(-1, sequences)
        lengths = np.diff(starts)[units].sum(axis=1)
        plan = Plan(np.arange(len(units)), in_order(lengths, length)) if keep else pack(lengths, length, rng)
        plan = Plan(units[plan.documents].ravel(), plan.starts * sequences)
        labels = None if not documents or documents[0].labels is None else np.stack([d.labels for d in documents])
        return cls(number, documents, tokens, weights, starts, plan, last, labels)

    def rows(self, numbers: np.ndarray, width: int) -> Batch:
        """Build rows by their numbers, as `[len(numbers), width]`."""
        documents, count = self.plan.take(numbers)
        labels = None if self.labels is None else self.labels[documents]
        return fill(self, self.starts[documents], self.starts[documents + 1] - self.starts[documents], count, width, labels)


@dataclass
class StreamSplit:
    """One data set that is read from its beginning in each epoch."""

    sources: list[SourceConfig]
    found: list[Found]
    config: DataConfig
    tokenizer: Any
    seed: int
    report: DataReport
    encoding: RowEncoding = ANSWERS
    window_rows: int = field(default_factory=lambda: WINDOW)
    known: int | None = None  # number of the model's embeddings

    @classmethod
    def load(cls, config: DataConfig, tokenizer: Any, seed: int, encoding: RowEncoding = ANSWERS) -> "StreamSplit":
        """Read the first window, so that mistakes show at once.

        Raises UserError, with file and line, for anything that is wrong with it.
        """
        sources = config.sources("train")
        found = [find(source) for source in sources]
        split = cls(sources, found, config, tokenizer, seed, DataReport(""), encoding)
        split._states = [where.state() if isinstance(where, Files) else None for where in found]
        build = split.build()
        first = next(split.windows(build, 0, 0, shuffle=False))
        if not build.report.rows:
            raise UserError("data.train: with these weights an epoch sees none of its rows; raise a weight")
        split.report = build.summary()
        if split.report.joined and (parts := [source.path for source in sources if source.weight % 1]):
            raise UserError(
                f"{', '.join(parts)}: a fractional weight of a streamed set takes a part of its rows, which would separate the "
                "two answers of a pair; give it a whole weight, or set data.streaming: false"
            )
        split._first = first.documents
        split._measure(first)
        return split

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @property
    def lengths(self) -> np.ndarray:
        """`[D]`, tokens per document of the first window."""
        return np.array([len(document.tokens) for document in self._first])

    def fingerprint(self) -> dict[str, Any]:
        """See `Split.fingerprint`; it covers the documents of the first window and the sizes of all files."""
        digest = xxhash.xxh3_128()
        for document in self._first:
            digest.update(document.tokens.astype(np.int32).tobytes() + document.weights.astype(np.float32).tobytes())
            digest.update(b"" if document.labels is None else document.labels.astype(np.float32).tobytes())
        sizes = [[size for size, _ in state] for state in self._states if state is not None]
        digest.update(repr((sizes, [source.weight for source in self.sources])).encode())
        return {"documents": len(self._first), "tokens": int(self.lengths.sum()), "digest": digest.hexdigest()}

    def refuse_unknown(self, rows: int, tokenizer: Any) -> None:
        """See `Split.refuse_unknown`; checks the first window now, and later windows when they are read."""
        self.known = rows
        for document in self._first:
            refuse_unknown(document.tokens, rows, document.where, tokenizer)

    def _measure(self, first: Window) -> None:
        report, lengths = self.report, self.lengths
        # some rows of the next window are read already
        report.rows = report.kept + sum(report.dropped.values()) + report.joined - report.divided
        report.tokens, report.documents = int(lengths.sum()), len(lengths)
        report.trained_tokens = int(sum(np.count_nonzero(document.weights[1:]) for document in self._first))
        report.packed_rows = len(first.plan)
        report.efficiency = report.tokens / (max(1, len(first.plan)) * self.max_length)
        report.weights = {source.path: source.weight for source in self.sources}
        report.measure(lengths)
        self._rows, report.exact = len(first.plan), first.last
        if not first.last:
            self._rows = self._estimate(len(first.plan))
            number = "is not known" if self._rows == UNKNOWN else f"is estimated as {self._rows:,}"
            report.warnings.append(
                f"streaming: the number of rows in an epoch {number}; set training.max_steps to say how long"
            )

    def _estimate(self, rows: int) -> int:
        """Estimate the rows per epoch from the number of rows that the Hub states, or from the bytes of the files."""
        count = 0.0
        for source, found in zip(self.sources, self.found, strict=True):
            if isinstance(found, HubSet):
                splits = getattr(found.load(streaming=True).info, "splits", None) or {}
                known = splits[source.split].num_examples if source.split in splits else 0
            elif isinstance(found, Memory):
                known = len(found)
            else:
                mean = np.mean([len(self.tokenizer.decode(document.tokens)) for document in self._first[:64]])
                known = sum(size for size, _ in found.state()) / max(float(mean), 1.0)
            if not known:
                return UNKNOWN
            count += known * source.weight
        return max(1, round(rows * count / self.report.rows))

    def rows_per_epoch(self, epoch: int) -> int:
        """Return an estimate, or the exact number if one window holds all of the data."""
        return self._rows

    def first(self, count: int) -> list[tuple[Unit, tuple[int | None, int | None]]]:
        """See `Split.first`; rows in the shuffled window are unknown before it is read."""
        size = self.encoding.sequences
        starts = range(0, min(count * size, len(self._first)), size)
        return [(tuple(self._first[start : start + size]), (None, None)) for start in starts]

    def build(self) -> Build:
        """Start a new pass over the data. Raises UserError if a file changed since the first pass."""
        for found, before in zip(self.found, self._states, strict=True):
            for path, one, other in zip(found.paths, before, found.state(), strict=True) if before is not None else ():
                if one != other:
                    raise UserError(f"{path}: the file was changed while the run goes on; start again with data that stays")
        return Build(self.sources, self.found, self.config, self.tokenizer, self.encoding)

    def windows(self, build: Build, epoch: int, start: int, *, shuffle: bool, seed: int | None = None) -> Iterator[Window]:
        """Yield the windows of an epoch, from number `start` on."""
        build.epoch = epoch
        examples = build.arranged()
        for _ in islice(examples, start * self.window_rows):
            pass
        number, waiting = start, list(islice(examples, self.window_rows))
        while True:
            coming = list(islice(examples, self.window_rows))
            documents = []
            for chunk, encoded in build.encoded(iter(waiting)):
                del chunk
                documents += [piece for unit in encoded if unit is not None for piece in build.fit(unit)]
            for document in documents if self.known is not None else ():
                refuse_unknown(document.tokens, self.known, document.where, self.tokenizer)
            rng = np.random.default_rng((self.seed if seed is None else seed, epoch, number)) if shuffle else None
            keep = not self.config.shuffle
            yield Window.of(number, documents, self.max_length, rng, not coming, keep, self.encoding.sequences)
            if not coming:
                return
            number, waiting = number + 1, coming

    def batches(
        self, batch_size: int, *, seed: int, shuffle: bool, epochs: int | None, rows: Sequence[int] | None = None,
        width_multiple: int = 1,
    ) -> "StreamBatches":  # fmt: skip
        """See `Split.batches`; rows are packed, and `max_length` tokens long."""
        return StreamBatches(self, batch_size, seed, shuffle, epochs, own_rows(rows, batch_size))


class StreamBatches(Iterator[Batch]):
    """The batches of a `StreamSplit`; the next window is prepared during training on the current one."""

    def __init__(
        self,
        split: StreamSplit,
        batch_size: int,
        seed: int,
        shuffle: bool,
        epochs: int | None,
        rows: np.ndarray,
    ):
        self._split, self._batch_size, self._seed, self._shuffle, self._epochs = split, batch_size, seed, shuffle, epochs
        self._rows = rows
        self._pool = ThreadPoolExecutor(1, "windows")
        self.set_state({"epoch": 0, "window": 0, "row": 0})

    def _open(self) -> None:
        split = self._split
        build = split.build()
        windows = split.windows(build, self._epoch, self._number, shuffle=self._shuffle, seed=self._seed)
        self._ask = lambda: self._pool.submit(next, windows)
        self._coming: Future | None = self._ask()
        self._advance()

    def _advance(self) -> None:
        self._window = self._coming.result()
        self._number = self._window.number
        self._coming = None if self._window.last else self._ask()

    def __next__(self) -> Batch:
        while self._epochs is None or self._epoch < self._epochs:
            if self._window is None:
                self._open()
            while self._row >= len(self._window.plan) and not self._window.last:
                self._advance()
                self._row = 0
            if self._row >= len(self._window.plan):
                self.set_state({"epoch": self._epoch + 1, "window": 0, "row": 0})
                continue
            return self._batch()
        raise StopIteration

    def _batch(self) -> Batch:
        """Build this process's part of the next global batch, which may extend past the end of a window."""
        own, width = self._rows, self._split.max_length
        parts, at = [], 0
        while at < self._batch_size:
            held = len(self._window.plan) - self._row
            if not held:
                if self._window.last:
                    break
                self._advance()
                self._row = 0
                continue
            taken = min(held, self._batch_size - at)
            wanted = own[(own >= at) & (own < at + taken)]
            if len(wanted):
                parts.append(self._window.rows(self._row + wanted - at, width))
            at, self._row = at + taken, self._row + taken
        got = sum(len(part["tokens"]) for part in parts)
        arrays = batch_arrays(self._split.encoding.values)
        parts.append({name: np.zeros((len(own) - got, width * one.width), one.dtype) for name, one in arrays.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in arrays}

    def get_state(self) -> dict[str, int]:
        """Return the position of the next batch: epoch, window, and row in the window."""
        return {"epoch": self._epoch, "window": self._number, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        """Move to the position `state`."""
        self._epoch, self._number, self._row = state["epoch"], state["window"], state["row"]
        self._window: Window | None = None
