"""Builds the tokenised documents of a data set: reads, formats, cleans, encodes and fits rows, and counts each step."""

import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import xxhash

from ftjax.config.data import DataConfig, SourceConfig
from ftjax.data.clean import Duplicates, content, digest, normalizer
from ftjax.data.encoder import Encoded, RowEncoder, Unit
from ftjax.data.encoding import ANSWERS, RowEncoding
from ftjax.data.example import Example
from ftjax.data.faults import SHOWN, Faults
from ftjax.data.find import Files, Found, find
from ftjax.data.reader import Reader, read_source
from ftjax.data.remarks import BROKEN, EMPTY, LONG, LONG_PROMPT, MASKED, UNWANTED, warnings_of
from ftjax.data.report import DataReport
from ftjax.data.row import Row
from ftjax.data.store import Documents, Writer, cached
from ftjax.data.tokens import Tokens
from ftjax.data.values import EmptyRow
from ftjax.errors import UserError

VERSION = 6  # format of the tokens and weights; raise it to rebuild every cache
CHUNK = 1024  # rows that are tokenised together
OPTIONS = (
    "prompt_format", "max_length", "truncation", "train_on_inputs", "last_turn_only", "special_tokens_in_text", "fold_system",
    "on_error", "drop_empty", "min_tokens", "max_tokens", "deduplicate", "near_duplicate_threshold", "unicode_normalization",
    "personal_data",
)  # fmt: skip


def build_documents(
    sources: Sequence[SourceConfig], config: DataConfig, tokenizer: Any, progress: Any = None,
    encoding: RowEncoding = ANSWERS,
) -> tuple[Documents, bool]:  # fmt: skip
    """Return the tokenised documents of a data set, and whether they were in the cache.

    Args:
        encoding: how rows become documents.

    Raises UserError, with file and line, for anything that is wrong with the data.
    """
    found = [find(source) for source in sources]
    key = cache_key(sources, found, config, tokenizer, encoding)

    def build(writer: Writer) -> dict[str, Any]:
        return Build(sources, found, config, tokenizer, encoding, progress).run(writer)

    return cached(key, build)


def cache_key(
    sources: Sequence[SourceConfig], found: Sequence[Found], config: DataConfig, tokenizer: Any,
    encoding: RowEncoding = ANSWERS,
) -> str:  # fmt: skip
    """Return a digest of everything that determines the documents."""
    facts = {
        "version": VERSION,
        "tokenizer": Tokens(tokenizer).fingerprint(),
        "options": {name: getattr(config, name) for name in OPTIONS},
        "sources": [
            {**source.model_dump(exclude={"weight"}), "path": _names(source, where)}
            for source, where in zip(sources, found, strict=True)
        ],
        "data": [where.fingerprint() for where in found],
    }
    if (key := encoding.key()) is not None:
        facts["encoding"] = key
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogateescape"))


def _names(source: SourceConfig, found: Found) -> Any:
    """Return the file names of a source. Documents record them, so other paths to the same bytes get another cache entry."""
    return [str(path) for path in found.paths] if isinstance(found, Files) else source.path


@dataclass
class Build:
    """One pass over the sources."""

    sources: Sequence[SourceConfig]
    found: Sequence[Found]
    config: DataConfig
    tokenizer: Any
    encoding: RowEncoding = ANSWERS
    progress: Any = None  # called with the number of rows read
    epoch: int = 0  # of a streamed set: decides which rows a fractional weight selects

    def __post_init__(self):
        config = self.config
        self.unread, self.faults = Faults(config.on_error == "skip"), Faults(config.on_error == "skip")
        self.encoder = self.encoding.encoder(self.tokenizer, config)
        self.ends = self.encoder.tokens.ends | {self.encoder.tokens.eos}
        self.duplicates = (
            Duplicates(config.deduplicate, config.near_duplicate_threshold) if config.deduplicate != "none" else None
        )
        self.report = DataReport(
            ", ".join(source.path for source in self.sources), max_length=config.max_length, packing=config.packing,
            imitated=self.encoding.imitated,
        )  # fmt: skip
        self.masked_where: list[str] = []
        self.readers: dict[int, Reader] = {}

    def run(self, writer: Writer) -> dict[str, Any]:
        """Write every document and return the report."""
        for chunk, encoded in self.encoded(self.arranged()):
            documents, truncated, rows, digests = [], [], [], []
            for (number, mark, _), unit in zip(chunk, encoded, strict=True):
                pieces = self.fit(unit) if unit is not None else ()
                documents += pieces
                truncated += [self.encoding.size(pieces) != self.encoding.size(unit)] * len(pieces) if pieces else []
                rows += [number] * len(pieces)
                digests += [mark] * len(pieces)
            writer.add(documents, truncated, rows, digests)
        return self.summary().state()

    def rows(self) -> Iterator[tuple[int, Reader, Row]]:
        """Yield `(index of the source, its reader, row)`: source after source, or interleaved when streaming."""
        normalize = normalizer(self.config)

        def one(number: int) -> Iterator[tuple[int, Reader, Row]]:
            source, streaming = self.sources[number], self.config.streaming
            for reader, row in read_source(
                source, self.unread, found=self.found[number], streaming=streaming, normalize=normalize,
                label=self.encoding.label_reader, prefers=self.encoding.formats,
            ):  # fmt: skip
                self.readers.setdefault(number, reader)
                self.report.formats[source.path] = reader.name
                yield number, reader, row

        def weighted(number: int) -> Iterator[tuple[int, Reader, Row]]:
            whole, share = divmod(self.sources[number].weight, 1)
            for _ in range(int(whole)):
                yield from one(number)
            if share:
                yield from (row for at, row in enumerate(one(number)) if _has_turn(at, share, self.epoch))

        if not self.config.streaming:  # the epoch's plan applies weights to the documents
            for number in range(len(self.sources)):
                yield from one(number)
            return
        open_parts = {number: weighted(number) for number in range(len(self.sources))}
        credit = dict.fromkeys(open_parts, 0.0)
        while open_parts:  # the source furthest below its weight gives the next row
            for number in open_parts:
                credit[number] += self.sources[number].weight
            number = max(open_parts, key=lambda n: (credit[n], -n))
            credit[number] -= sum(self.sources[n].weight for n in open_parts)
            row = next(open_parts[number], None)
            if row is None:
                del open_parts[number]
            else:
                yield row

    def examples(self) -> Iterator[tuple[int, int, Example]]:
        """Yield `(row number, digest of its content, example)` for every row to encode."""
        for number, reader, row in self.rows():
            self.report.rows += 1
            if self.progress and self.report.rows % CHUNK == 0:
                self.progress(self.report.rows)
            try:
                example = reader(row).with_source(number, *self.config.reading)
            except EmptyRow as error:
                if self.config.drop_empty:
                    self.report.dropped[EMPTY] += 1
                else:
                    self.faults(error)
                continue
            except UserError as error:
                self.faults(error)
                continue
            if not example.wanted and not self.encoding.unwanted:
                self.report.dropped[UNWANTED] += 1
                continue
            text = content(example)
            mark = digest(text)
            label = example.wanted if example.labelled else None
            if self.duplicates and (reason := self.duplicates.reason(text, mark, label)):
                self.report.dropped[reason] += 1
                continue
            yield self.report.rows, mark, example

    def arranged(self) -> Iterator[tuple[int, int, Example]]:
        """Yield the examples as the objective takes them, such as two unpaired answers as a pair."""
        return self.encoding.arrange(self.examples(), self.report)

    def _described(self) -> list[str]:
        """Return warnings about the columns."""
        found = []
        for number, reader in self.readers.items():
            path = self.sources[number].path
            if reader.unused and self.encoding.imitated:  # those beside prompts are for rewards
                found.append(f"{path}: columns that are not used: {', '.join(reader.unused)}")
            if count := reader.notes["system column"]:
                found.append(
                    f"{path}: {count:,} rows have a system column and another system message of their own, which is kept"
                )
            if reader.unknown_roles:
                roles = ", ".join(f"{role!r:.60} in {count:,} rows" for role, count in reader.unknown_roles.most_common(5))
                found.append(
                    f"{path}: roles that are not known: {roles}. The chat template gets them as they are, and what they say is "
                    "not trained"
                )
            if reader.name == "preference" and not self.encoding.rejected:
                found.append(
                    f"{path}: the answers in `chosen` are trained; those in `rejected` are checked, and this objective "
                    "has no use for them (objective.name: dpo and others compare both)"
                )
        return found

    def encoded(self, examples: Iterable[tuple[int, int, Example]]) -> Iterator[tuple[list, list[Unit | None]]]:
        """Yield chunks of examples with their documents, in order; `num_proc` worker processes encode them."""
        chunks = iter(lambda: list(islice(examples, CHUNK)), [])
        if self.config.num_proc == 1:
            read: deque[list] = deque()

            def examples_of() -> Iterator[list[Example]]:
                for chunk in chunks:
                    read.append(chunk)
                    yield [example for _, _, example in chunk]

            for documents in self.encoder.stream(examples_of(), self.faults):
                yield read.popleft(), documents
            return
        # The parent's threads (JAX has many) do not survive a fork, so workers are spawned.
        context = multiprocessing.get_context("spawn")
        made = (self.tokenizer, self.config, self.encoding)
        with context.Pool(self.config.num_proc, _start_worker, made) as pool:
            waiting: deque = deque()
            for chunk in chunks:
                waiting.append((chunk, pool.apply_async(_work, ([example for _, _, example in chunk],))))
                if len(waiting) > 2 * self.config.num_proc:
                    yield self._collected(*waiting.popleft())
            while waiting:
                yield self._collected(*waiting.popleft())

    def _collected(self, chunk: list, result: Any) -> tuple[list, list[Unit | None]]:
        documents, messages, notes = result.get()
        for message in messages:
            self.faults(UserError(message))
        self.encoder.notes.update(notes)
        return chunk, documents

    def fit(self, unit: Unit) -> Sequence[Encoded]:
        """Return the documents of a row that remain after truncation: within the length limits, with trained tokens.

        Several documents of a row are kept or dropped together, and together fit into one row of a batch.
        """
        config, report = self.config, self.report
        count = self.encoding.size(unit)
        if config.min_tokens and count < config.min_tokens:
            report.dropped["shorter than min_tokens"] += 1
            return ()
        if config.max_tokens and count > config.max_tokens:
            report.dropped["longer than max_tokens"] += 1
            return ()
        if reason := self.encoding.refused(unit):
            report.dropped[reason] += 1
            return ()
        pieces: Sequence[Encoded] = unit
        if sum(len(document.tokens) for document in unit) > config.max_length - self.encoding.reserved:
            pieces = self.encoding.shorten(unit, config, self.encoder.tokens.bos)
            if not pieces:
                report.dropped[LONG if not self.encoding.reserved else LONG_PROMPT] += 1
                report.notes["longest"] = max(report.notes["longest"], sum(len(document.tokens) for document in unit))
                return ()
        elif self.encoding.answers:
            for document in unit:
                last = document.tokens[1:][document.weights[1:] > 0][-3:].tolist()
                report.notes["no end trained"] += bool(last) and not self.ends.intersection(last)
        kept = [piece for piece in pieces if piece.weights[1:].any() or not self.encoding.imitated]
        if len(unit) > 1 and len(kept) < len(unit):
            kept = []
        report.notes["pieces without a trained token"] += len(pieces) - len(kept) if kept else 0
        if not kept:
            report.dropped[MASKED] += 1
            if len(self.masked_where) < 3:
                self.masked_where.append(unit[0].where)
            return ()
        if pieces is not unit:
            if reason := self.encoding.refused(kept):
                report.dropped[reason] += 1
                return ()
            report.notes["partner shortened"] += self.encoding.size(pieces) == count
        report.kept += 1
        report.documents += len(kept)
        return kept

    def summary(self) -> DataReport:
        """Return the counts so far. Raises UserError if no row is left."""
        messages = [*self.unread.messages, *self.faults.messages][:SHOWN]
        dropped = self.report.dropped + Counter({BROKEN: self.unread.count + self.faults.count})
        # `rows` lacks rows that could not be read, and has those found broken later.
        report = replace(self.report, rows=self.report.rows + self.unread.count, dropped=dropped)
        report.notes = self.report.notes + self.encoder.notes
        report.warnings = [
            *self.unread.notes,
            *self._described(),
            *warnings_of(report, messages, self.masked_where, self.encoding),
        ]
        if not report.kept:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
            first = f" (the first: {messages[0]})" if messages else ""
            advice = "Change the data, or what drops it"
            if report.dropped[LONG_PROMPT]:
                advice = f"Raise data.max_length ({self.config.max_length}) or lower objective.max_completion_length"
            elif report.dropped[LONG] or report.dropped[MASKED]:
                advice = f"Raise data.max_length ({self.config.max_length}), choose another data.truncation, or change the data"
            raise UserError(f"{report.source}: none of {report.rows:,} examples is left: {reasons}{first}. {advice}")
        return report


def _has_turn(row: int, share: float, epoch: int) -> bool:
    """Return whether a row is in the `share` of its source that this epoch sees; the next epoch sees the next ones."""
    place = row * 0.6180339887498949 % 1  # the golden ratio spreads any run of rows evenly
    return (place - share * epoch) % 1 < share


_encoder: RowEncoder | None = None


def _start_worker(tokenizer: Any, config: DataConfig, encoding: RowEncoding) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoding.encoder(tokenizer, config)


def _work(examples: list[Example]) -> tuple[list[Unit | None], list[str], Counter[str]]:
    """Encode in a worker process; return documents, error messages and notes."""
    messages: list[str] = []

    def fault(error: UserError) -> None:
        messages.append(str(error))

    _encoder.notes.clear()
    return next(_encoder.stream([examples], fault)), messages, Counter(_encoder.notes)
