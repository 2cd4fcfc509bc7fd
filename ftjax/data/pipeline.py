"""Batches of packed rows: planned per epoch, built by Grain, identical for any number of processes.

The plan of an epoch depends only on the documents' lengths, the seed and the epoch. So every process makes the same plan
and builds only the rows of each global batch that its devices hold, and a position is a single row count.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import grain
import numpy as np
import xxhash

from ftjax.config.data import DataConfig
from ftjax.data.batch import Batch, BatchIterator, fill, own_rows
from ftjax.data.build import build_documents
from ftjax.data.clean import held_out
from ftjax.data.encoder import Unit
from ftjax.data.encoding import ANSWERS, RowEncoding
from ftjax.data.pack import Plan, in_order, pack
from ftjax.data.partners import Partners
from ftjax.data.predictions import Predictions
from ftjax.data.report import DataReport
from ftjax.data.store import Documents
from ftjax.data.unknown import refuse_unknown
from ftjax.errors import UserError
from ftjax.long_steps import long_step


class Split(Protocol):
    """One tokenised data set."""

    report: DataReport
    max_length: int

    @property
    def lengths(self) -> np.ndarray:
        """`[D]`, tokens per document."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies these documents, as JSON: the number of documents and tokens, and a digest of tokens and
        weights."""

    def refuse_unknown(self, rows: int, tokenizer: Any) -> None:
        """Raise UserError, naming the data row, for a token id that is not below `rows`, the number of the model's
        embeddings."""

    def rows_per_epoch(self, epoch: int) -> int: ...
    def first(self, count: int) -> list[tuple[Unit, tuple[int | None, int | None]]]:
        """Return the documents of the first rows of data, with the row and segment of the first document in the first epoch."""

    def batches(
        self, batch_size: int, *, seed: int, shuffle: bool, epochs: int | None, rows: Sequence[int] | None = None,
        width_multiple: int = 1,
    ) -> BatchIterator:  # fmt: skip
        """Return an iterator over global batches of `batch_size` rows.

        Args:
            epochs: None: endless.
            rows: which rows of each batch to build, increasing from 0; None: all of them.
            width_multiple: without packing, the row length is a multiple of this; `max_length` is one.
        """


def load_splits(
    config: DataConfig, tokenizer: Any, *, seed: int, encoding: RowEncoding = ANSWERS, positions: int | None = None,
) -> tuple[Split, "PackedSplit | None"]:  # fmt: skip
    """Load the training data, and the validation data if the configuration names or splits off some.

    Args:
        encoding: how rows become documents.
        positions: the longest text in tokens that the model was made for, if known.

    Raises UserError, with file and line, for anything that is wrong with the data.
    """
    train, validation = _load_splits(config, tokenizer, seed, encoding)
    if positions is not None and config.max_length > positions:
        for split in (train, validation):
            longer = 0 if split is None else int((split.lengths > positions).sum())
            if split is not None and (longer or encoding.sequences == 1):  # a row that holds several documents may be longer
                split.report.warnings.append(
                    f"data.max_length {config.max_length:,} is more than the {positions:,} tokens that the model is made for: "
                    f"{longer:,} documents are longer"
                )
    return train, validation


def _load_splits(config: DataConfig, tokenizer: Any, seed: int, encoding: RowEncoding) -> tuple[Split, "PackedSplit | None"]:
    validation = _load("validation", config, tokenizer, seed, encoding) if config.validation is not None else None
    if config.streaming:
        from ftjax.data.stream import StreamSplit

        return StreamSplit.load(config, tokenizer, seed, encoding), validation
    train = _load("train", config, tokenizer, seed, encoding)
    if config.validation_split is not None:
        train, validation = _divide(train, config.validation_split, seed)
    elif validation is not None and config.contamination != "ignore":
        train = _clean_of(validation, train, config.contamination)
    return train, validation


def _load(which: str, config: DataConfig, tokenizer: Any, seed: int, encoding: RowEncoding) -> "PackedSplit":
    sources = config.sources(which)
    name = "training" if which == "train" else which
    with long_step(f"reading and tokenising the {name} data", unit="rows") as step:
        documents, _ = build_documents(sources, config, tokenizer, step.at, encoding)
    report = DataReport.of_state(documents.report)
    report.weights = {source.path: source.weight for source in sources}
    weights = tuple(source.weight for source in sources)
    split = PackedSplit.of(documents, weights, config, seed, report, encoding.sequences)
    seen = set(documents.source[split.plan(0, True, seed).documents].tolist())
    for number, source in enumerate(sources):
        own = int((documents.source == number).sum())
        if own and number not in seen:
            report.warnings.append(
                f"{source.path}: a weight of {source.weight:g} gives none of its {own:,} rows to the first epoch"
            )
    return split


def _divide(split: "PackedSplit", share: float, seed: int) -> tuple["PackedSplit", "PackedSplit"]:
    """Split off `validation_split` by content, so that rows with the same content are on one side."""
    documents, report = split.documents, split.report
    rows, first = np.unique(documents.row, return_index=True)
    if share >= len(rows) and len(rows) > 1:
        raise UserError(
            f"{report.source}: data.validation_split asks for {share:,.0f} rows of the {len(rows):,} that are kept, so that "
            "none is left to train; write a smaller number, or a share below 1"
        )
    out = held_out(documents.digest[first], share, seed)
    if not out.any() or out.all():
        raise UserError(f"{report.source}: data.validation_split needs at least two rows that differ; found {len(rows):,} kept")
    wanted = np.isin(documents.row, rows[out])
    one = replace(report, held_out=int(out.sum()), kept=report.kept - int(out.sum()))
    other = DataReport(
        f"{report.source} (validation_split)", rows=int(out.sum()), kept=int(out.sum()), formats=report.formats,
        max_length=report.max_length, packing=report.packing,
    )  # fmt: skip
    return split.choose(np.flatnonzero(~wanted), one), replace(split, weights=(1.0,) * len(split.weights)).choose(
        np.flatnonzero(wanted), other
    )


def _clean_of(validation: "PackedSplit", train: "PackedSplit", what: str) -> "PackedSplit":
    """Report rows of validation that are also in train, or drop them from train."""
    same = np.isin(train.documents.digest, validation.documents.digest)
    if not same.any():
        return train
    report = replace(train.report, dropped=Counter(train.report.dropped), warnings=list(train.report.warnings))
    rows = len(np.unique(train.documents.row[same]))
    shared = len(np.unique(validation.documents.row[np.isin(validation.documents.digest, train.documents.digest)]))
    where = train.documents.where[int(np.argmax(same))].as_py()
    if what == "report":
        report.warnings.append(
            f"{shared:,} rows of validation are found in train too, such as {where}, so its loss looks better than it is; "
            "data.contamination: drop leaves them out of train"
        )
        return replace(train, report=report)
    if same.all():
        raise UserError(f"{report.source}: every row is in validation too; data.contamination: drop leaves nothing to train")
    report.dropped["found in validation"] += rows
    report.kept -= rows
    return train.choose(np.flatnonzero(~same), report)


@dataclass(frozen=True)
class PackedSplit:
    """One tokenised data set in the cache; it uses the documents `chosen`."""

    documents: Documents
    chosen: np.ndarray  # int64 [N]
    weights: tuple[float, ...]  # per source: how many times an epoch sees its documents
    packing: bool
    mix_epochs: bool
    shuffle: bool
    max_length: int
    truncation: str
    seed: int
    report: DataReport
    sequences: int = 1  # documents per row of data, consecutive in `chosen`
    predictions: Predictions | None = None  # of a teacher, which batches carry as `labels`
    partners: Partners | None = None  # the documents of a teacher with another tokenizer, which batches carry as `labels`

    @classmethod
    def of(
        cls, documents: Documents, weights: tuple[float, ...], config: DataConfig, seed: int, report: DataReport,
        sequences: int = 1,
    ) -> "PackedSplit":  # fmt: skip
        """Build a split of all documents."""
        chosen = np.arange(len(documents))
        how = (config.packing, config.mix_epochs, config.shuffle, config.max_length, config.truncation)
        return cls(documents, chosen, weights, *how, seed, report, sequences).choose(chosen, report)

    def choose(self, chosen: np.ndarray, report: DataReport) -> "PackedSplit":
        """Return the split with other documents and an updated report."""
        split = replace(self, chosen=chosen, report=report)
        lengths = split.lengths
        truncated = len(np.unique(self.documents.row[chosen[self.documents.truncated[chosen] > 0]]))
        report.truncated = Counter({self.truncation: truncated} if truncated else {})
        report.documents, report.tokens = len(chosen), int(lengths.sum())
        report.trained_tokens = int(self.documents.trained[chosen].sum())
        report.measure(lengths)
        plan = split.plan(0, True, self.seed)
        if not len(plan):
            raise UserError(
                f"{report.source}: with weight {max(self.weights):g} an epoch sees none of its {len(chosen):,} rows; raise the "
                "weight, or leave it out"
            )
        report.packed_rows = len(plan)
        used = np.diff(self.documents.starts)[plan.documents].sum()
        width = self.max_length * len(plan) if self.packing else int(split.widths(plan.documents).sum())
        report.efficiency = float(used / max(width, 1))
        return split

    def __post_init__(self):
        object.__setattr__(self, "plan", lru_cache(maxsize=3)(self._plan))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.documents.starts)[self.chosen]

    def fingerprint(self) -> dict[str, Any]:
        """See `Split.fingerprint`; the choice of documents, the weights of sources and what is a teacher's count too."""
        digest = xxhash.xxh3_128(self.documents.content.encode())
        digest.update(np.ascontiguousarray(self.chosen, np.int64).tobytes() + repr(self.weights).encode())
        if self.predictions is not None:
            digest.update(json.dumps(self.predictions.facts, sort_keys=True).encode())
        if self.partners is not None:
            digest.update(self.partners.other.content.encode())
        return {"documents": len(self.chosen), "tokens": int(self.lengths.sum()), "digest": digest.hexdigest()}

    def places(self) -> frozenset[tuple[int, str]]:
        """Return `(index of the source, file and line)` of each row that has a document here."""
        sources, where = self.documents.source[self.chosen].tolist(), self.documents.where.take(self.chosen).to_pylist()
        return frozenset(zip(sources, where, strict=True))

    def refuse_unknown(self, rows: int, tokenizer: Any) -> None:
        """See `Split.refuse_unknown`."""
        if self.documents.highest < rows:
            return
        for number in self.chosen:
            document = self.documents.document(number)
            refuse_unknown(document.tokens, rows, document.where, tokenizer)

    # ---- the plan of an epoch ----

    def _plan(self, epoch: int, shuffle: bool, seed: int, batch_size: int = 0) -> Plan:
        """Plan an epoch; without packing, `batch_size` groups documents of similar length.

        The plan's units are the documents of one data row, which stay together.
        """
        rng = np.random.default_rng((seed, epoch)) if shuffle and self.shuffle else None
        units = self._seen(epoch)
        lengths = self._unit_lengths(units)
        if not self.shuffle:
            starts = in_order(lengths, self.max_length) if self.packing else np.arange(len(units) + 1)
            return Plan(units.ravel(), starts * self.sequences)
        if self.packing:
            plan = pack(lengths, self.max_length, rng)
            return Plan(units[plan.documents].ravel(), plan.starts * self.sequences)
        order = np.arange(len(units)) if rng is None else rng.permutation(len(units))
        order = order[np.argsort(np.searchsorted(self.buckets, lengths[order]), kind="stable")]
        full = len(order) // batch_size if batch_size else 0
        if full and rng is not None:  # whole batches are shuffled; the last, perhaps smaller one stays
            blocks = order[: full * batch_size].reshape(full, batch_size)
            order = np.concatenate([blocks[rng.permutation(full)].ravel(), order[full * batch_size :]])
        return Plan(units[order].ravel(), np.arange(len(order) + 1) * self.sequences)

    def _seen(self, epoch: int) -> np.ndarray:
        """Return the units `[U, sequences]` of an epoch as document indices: whole copies of each source, and for a
        fractional weight the part that is next in turn."""
        units = self.chosen.reshape(-1, self.sequences)
        if all(weight == 1 for weight in self.weights):
            return units
        parts = []
        for number, weight in enumerate(self.weights):
            own = units[self.documents.source[units[:, 0]] == number]
            whole = int(weight)
            parts += [own] * whole
            if weight > whole and len(own):
                turn = np.random.default_rng((self.seed, 0x6D6978, number)).permutation(len(own))
                low, high = (int((weight - whole) * len(own) * (epoch + step)) for step in (0, 1))
                parts.append(own[turn[np.arange(low, high) % len(own)]])
        return np.concatenate(parts)

    def _unit_lengths(self, units: np.ndarray) -> np.ndarray:
        own = np.diff(self.documents.starts)[units].sum(axis=1)
        return own if self.partners is None else np.maximum(own, self.partners.sizes(units).sum(axis=1))

    @property
    def buckets(self) -> np.ndarray:
        """The widths of batches without packing: `max_length` and its halves, at most four."""
        widths = [self.max_length]
        while len(widths) < 4 and widths[-1] % 2 == 0 and widths[-1] >= 64:
            widths.append(widths[-1] // 2)
        return np.array(widths[::-1])

    def widths(self, documents: np.ndarray) -> np.ndarray:
        """Return, per unit, the width of a row that holds it alone."""
        return self.buckets[np.searchsorted(self.buckets, self._unit_lengths(documents.reshape(-1, self.sequences)))]

    def rows_per_epoch(self, epoch: int) -> int:
        """Return the number of rows that hold documents; rows of padding complete the last batch."""
        return len(self.plan(epoch, True, self.seed))

    # ---- rows ----

    def first(self, count: int) -> list[tuple[Unit, tuple[int | None, int | None]]]:
        """See `Split.first`; segments count from 1."""
        plan, found = self.plan(0, True, self.seed), []
        for unit in self.chosen.reshape(-1, self.sequences)[:count]:
            at = np.flatnonzero(plan.documents == unit[0])[:1]
            row = np.searchsorted(plan.starts, at, side="right") - 1
            place = (int(row[0]), int(at[0] - plan.starts[row[0]]) + 1) if len(at) else (None, None)
            found.append((tuple(map(self.documents.document, unit)), place))
        return found

    def rows(self, plan: Plan, numbers: np.ndarray, width: int) -> Batch:
        """Build rows of a plan as `[len(numbers), width]`; a number past the plan gives a row of padding."""
        documents, count = plan.take(numbers)
        starts = self.documents.starts
        labels = None if self.documents.labels is None else self.documents.labels[documents]
        batch = fill(self.documents, starts[documents], starts[documents + 1] - starts[documents], count, width, labels)
        if self.predictions is not None:
            found = np.zeros((*batch["weights"].shape, self.predictions.width), np.float32)
            found[batch["weights"] != 0] = self.predictions.of(documents)
            batch["labels"] = found.reshape(len(found), -1)
        if self.partners is not None:
            batch["labels"] = self.partners.fill(documents, count, width)
        return batch

    def batches(
        self, batch_size: int, *, seed: int, shuffle: bool, epochs: int | None, rows: Sequence[int] | None = None,
        width_multiple: int = 1,
    ) -> "PackedBatches":  # fmt: skip
        """See `Split.batches`."""
        return PackedBatches(self, batch_size, seed, shuffle, epochs, own_rows(rows, batch_size), width_multiple)


class PackedBatches(Iterator[Batch]):
    """The batches of a `PackedSplit`. Rows of padding complete the last one of an epoch, or (`mix_epochs`) the first rows
    of the next epoch."""

    def __init__(
        self,
        split: PackedSplit,
        batch_size: int,
        seed: int,
        shuffle: bool,
        epochs: int | None,
        rows: np.ndarray,
        width_multiple: int,
    ):
        self._split, self._batch_size, self._seed, self._shuffle, self._epochs = split, batch_size, seed, shuffle, epochs
        self._rows = rows
        self._widths = split.buckets[split.buckets % width_multiple == 0]
        self._epoch = self._row = 0
        self._grain: Any = None

    def plan(self, epoch: int) -> Plan:
        """Return the rows of an epoch."""
        return self._split.plan(epoch, self._shuffle, self._seed, 0 if self._split.packing else self._batch_size)

    def _build(self, epoch: int, row: int) -> Batch:
        """Build this process's rows of the batch that begins with `row` of `epoch`."""
        split, plan, numbers = self._split, self.plan(epoch), row + self._rows
        if not split.packing:  # the whole batch decides, so that all processes use the same width
            documents = plan.documents[plan.starts[row] : plan.starts[min(row + self._batch_size, len(plan))]]
            longest = split.widths(documents).max()
            return split.rows(plan, numbers, int(self._widths[np.searchsorted(self._widths, longest)]))
        if not split.mix_epochs:
            return split.rows(plan, numbers, split.max_length)
        parts = []
        while len(numbers) and (self._epochs is None or epoch < self._epochs):
            plan = self.plan(epoch)
            inside = numbers < len(plan)
            parts.append(split.rows(plan, numbers[inside], split.max_length))
            numbers, epoch = numbers[~inside] - len(plan), epoch + 1
        parts.append(split.rows(plan, len(plan) + numbers, split.max_length))  # padding after the last epoch
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _open(self) -> None:
        epoch, start = self._epoch, self._row
        count = max(0, -(-(len(self.plan(epoch)) - start) // self._batch_size))
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        build = grain.MapDataset.range(count).map(lambda number: self._build(epoch, start + number * self._batch_size))
        self._grain = iter(build.to_iter_dataset(options))

    def __next__(self) -> Batch:
        while self._epochs is None or self._epoch < self._epochs:
            rows = len(self.plan(self._epoch))
            if self._row >= rows:
                ahead = self._row - rows if self._split.mix_epochs else 0
                self._epoch, self._row, self._grain = self._epoch + 1, ahead, None
                continue
            if self._grain is None:
                self._open()
            batch = next(self._grain)
            self._row += self._batch_size
            return batch
        raise StopIteration

    def get_state(self) -> dict[str, int]:
        """Return the position: rows of the epoch consumed so far, over all processes."""
        return {"epoch": self._epoch, "row": self._row, "batch_size": self._batch_size}

    def set_state(self, state: dict[str, int]) -> None:
        """Move to a position. Raises UserError if the batch size changed and the rows of a batch depend on it."""
        if state["batch_size"] != self._batch_size and not self._split.packing:
            raise UserError(
                f"the checkpoint's batches have {state['batch_size']} rows and this run's {self._batch_size}; with "
                "data.packing: false both must be the same"
            )
        self._epoch, self._row, self._grain = state["epoch"], state["row"], None
