"""Batches of packed rows: planned once for an epoch, built by Grain, the same for any number of processes.

The plan of an epoch depends on the lengths, the seed and the epoch alone, so every process makes the same plan, reads only
its own rows of each global batch, and a position is one global batch number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grain
import numpy as np

from ftjax.config import DataConfig
from ftjax.data.formats import to_examples
from ftjax.data.pack import pack
from ftjax.data.read import read_rows
from ftjax.data.report import DataReport
from ftjax.data.template import Encoded, encode
from ftjax.errors import UserError

KEYS = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "positions": np.int32, "segment_ids": np.int32}


def load_splits(config: DataConfig, tokenizer: Any, *, seed: int) -> tuple["Split", "Split | None"]:
    """Training data, and validation data where the configuration names some.

    Raises UserError, with file and line, for anything that is wrong with them.
    """
    train = _load(config.train, config, tokenizer, seed, "train")
    validation = _load(config.validation, config, tokenizer, seed, "validation") if config.validation else None
    return train, validation


def _load(path: str, config: DataConfig, tokenizer: Any, seed: int, name: str) -> "Split":
    examples = to_examples(read_rows(path, name), config.format, config.columns)
    report = DataReport(path, rows=len(examples))
    documents = []
    for example in examples:
        encoded = encode(example, tokenizer)
        document = fit(encoded, config, report)
        if document is not None:
            documents.append(document)
    if not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise UserError(f"{path}: none of {report.rows} examples is left ({reasons}); raise data.max_length or change the data")
    report.kept = len(documents)
    report.tokens = sum(len(d.tokens) for d in documents)
    report.trained_tokens = int(sum(sum(d.weights[1:]) for d in documents))
    split = Split(documents, config.max_length, config.packing, seed, report)
    report.packed_rows = split.rows_per_epoch(0)
    report.efficiency = report.tokens / (report.packed_rows * config.max_length)
    return split


def fit(document: Encoded, config: DataConfig, report: DataReport) -> Encoded | None:
    """A document that is not too long and trains something, or None; what is done is counted."""
    length = config.max_length
    tokens, weights = document.tokens, document.weights
    if len(tokens) > length:
        if config.truncation == "error":
            raise UserError(f"{document.where}: {len(tokens)} tokens are more than data.max_length {length}")
        if config.truncation == "drop":
            report.dropped["longer than max_length"] += 1
            return None
        report.truncated += 1
        cut = slice(0, length) if config.truncation == "right" else slice(len(tokens) - length, None)
        tokens, weights = tokens[cut], weights[cut]
    if not any(weights[1:]):
        report.dropped["without a trained token"] += 1
        return None
    return Encoded(tokens, weights, document.where)


@dataclass(frozen=True)
class Split:
    """One tokenised set, ready to be packed."""

    documents: Sequence[Encoded]
    max_length: int
    packing: bool
    seed: int
    report: DataReport

    def __post_init__(self):
        lengths = np.array([len(d.tokens) for d in self.documents])
        object.__setattr__(self, "plan", lru_cache(maxsize=4)(lambda epoch, shuffle: self._plan(lengths, epoch, shuffle)))

    def _plan(self, lengths: np.ndarray, epoch: int, shuffle: bool) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, epoch)) if shuffle else None
        if self.packing:
            return pack(lengths, self.max_length, rng)
        order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
        return [[int(i)] for i in order]

    def rows_per_epoch(self, epoch: int) -> int:
        return len(self.plan(epoch, True))

    def example(self) -> Encoded:
        """The first document, for showing."""
        return self.documents[0]

    def row(self, documents: Sequence[int]) -> dict[str, np.ndarray]:
        """These documents side by side, `[T]` each; what is left is padding of segment 0."""
        row = {name: np.zeros(self.max_length, dtype) for name, dtype in KEYS.items()}
        start = 0
        for segment, number in enumerate(documents, 1):
            document = self.documents[number]
            stop = start + len(document.tokens)
            row["tokens"][start:stop] = document.tokens
            row["targets"][start : stop - 1] = document.tokens[1:]
            row["weights"][start : stop - 1] = document.weights[1:]
            row["positions"][start:stop] = np.arange(stop - start)
            row["segment_ids"][start:stop] = segment
            start = stop
        return row

    def batches(
        self, batch_size: int, *, seed: int, shuffle: bool, epochs: int | None, process_index: int = 0, process_count: int = 1
    ) -> "BatchIterator":
        """Global batches of `batch_size` rows, of which this process gets its `1 / process_count`."""
        if batch_size % process_count:
            raise UserError(f"a batch of {batch_size} rows does not divide by {process_count} processes")
        return BatchIterator(self, batch_size, shuffle, epochs, process_index, process_count)


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """`[batch_size / process_count, T]` at a time; the last batch of an epoch is filled up with rows of padding."""

    def __init__(self, split: Split, batch_size: int, shuffle: bool, epochs: int | None, process_index: int, process_count: int):
        self._split, self._batch_size, self._shuffle, self._epochs = split, batch_size, shuffle, epochs
        share = batch_size // process_count
        self._mine = slice(process_index * share, (process_index + 1) * share)
        self._epoch = self._next = 0
        self._grain: Any = None

    def _build(self, number: int) -> dict[str, np.ndarray]:
        plan = self._split.plan(self._epoch, self._shuffle)
        rows = plan[number * self._batch_size : (number + 1) * self._batch_size]
        rows = [*rows, *([[]] * (self._batch_size - len(rows)))][self._mine]
        built = [self._split.row(documents) for documents in rows]
        return {name: np.stack([row[name] for row in built]) for name in KEYS}

    def _open(self) -> None:
        count = -(-len(self._split.plan(self._epoch, self._shuffle)) // self._batch_size)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        self._grain = iter(grain.MapDataset.range(self._next, count).map(self._build).to_iter_dataset(options))

    def __next__(self) -> dict[str, np.ndarray]:
        while self._epochs is None or self._epoch < self._epochs:
            if self._grain is None:
                self._open()
            try:
                batch = next(self._grain)
            except StopIteration:
                self._epoch, self._next, self._grain = self._epoch + 1, 0, None
                continue
            self._next += 1
            return batch
        raise StopIteration

    def get_state(self) -> dict[str, int]:
        """Where the next batch is: independent of the number of processes."""
        return {"epoch": self._epoch, "batch": self._next, "batch_size": self._batch_size}

    def set_state(self, state: dict[str, int]) -> None:
        if state["batch_size"] != self._batch_size:
            raise UserError(f"the checkpoint counts batches of {state['batch_size']} rows, this run's have {self._batch_size}")
        self._epoch, self._next, self._grain = state["epoch"], state["batch"], None
