"""From the sources of a set to its tokenised documents: read, formatted, cleaned, encoded and fitted, all of it counted."""

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
from ftjax.data.classes import cut as cut_document
from ftjax.data.classes import make_encoder
from ftjax.data.clean import Duplicates, content, digest, normalizer
from ftjax.data.encode import Encoded, Encoder
from ftjax.data.example import Example
from ftjax.data.faults import SHOWN, Faults
from ftjax.data.find import Files, HubSet, find
from ftjax.data.formats import EmptyRow, Reader
from ftjax.data.read import read_rows
from ftjax.data.report import DataReport
from ftjax.data.row import Row
from ftjax.data.store import Documents, Writer, cached
from ftjax.data.tokens import Tokens
from ftjax.errors import UserError

VERSION = 2  # of the tokens and weights that one row becomes: a new one makes every cache anew
CHUNK = 1024  # rows that are tokenised together
OPTIONS = (
    "prompt_format", "max_length", "truncation", "train_on_inputs", "last_turn_only", "on_error", "drop_empty", "min_tokens",
    "max_tokens", "deduplicate", "near_duplicate_threshold", "unicode_normalization",
)  # fmt: skip
BROKEN, EMPTY, MASKED, LONG = "broken (on_error: skip)", "empty", "without a trained token", "longer than max_length"


def build_documents(
    sources: Sequence[SourceConfig], config: DataConfig, tokenizer: Any, progress: Any = None,
    classes: Sequence[str] | None = None,
) -> tuple[Documents, bool]:  # fmt: skip
    """The tokenised documents of a set, and whether they were in the cache.

    Args:
        classes: of a classification head.

    Raises UserError, with file and line, for anything that is wrong with the data.
    """
    found = [find(source) for source in sources]
    key = cache_key(sources, found, config, tokenizer, classes)

    def build(writer: Writer) -> dict[str, Any]:
        return Build(sources, found, config, tokenizer, progress, classes).run(writer)

    return cached(key, build)


def cache_key(
    sources: Sequence[SourceConfig], found: Sequence[Files | HubSet], config: DataConfig, tokenizer: Any,
    classes: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """A digest of everything that decides which documents come out."""
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
    if classes is not None:
        facts["classes"] = list(classes)
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogateescape"))


def _names(source: SourceConfig, found: Files | HubSet) -> Any:
    """The places of documents name the files, so other paths to the same bytes are another cache."""
    return [str(path) for path in found.paths] if isinstance(found, Files) else source.path


@dataclass
class Build:
    """One pass over the sources."""

    sources: Sequence[SourceConfig]
    found: Sequence[Files | HubSet]
    config: DataConfig
    tokenizer: Any
    progress: Any = None  # called with the number of rows read
    classes: Sequence[str] | None = None  # of a classification head

    def __post_init__(self):
        config = self.config
        self.unread, self.faults = Faults(config.on_error == "skip"), Faults(config.on_error == "skip")
        self.encoder = make_encoder(self.tokenizer, config, self.classes)
        self.ends = self.encoder.tokens.ends | {self.encoder.tokens.eos}
        self.duplicates = (
            Duplicates(config.deduplicate, config.near_duplicate_threshold) if config.deduplicate != "none" else None
        )
        self.report = DataReport(
            ", ".join(source.path for source in self.sources), max_length=config.max_length, packing=config.packing
        )
        self.masked_where: list[str] = []
        self.readers: dict[int, Reader] = {}

    def run(self, writer: Writer) -> dict[str, Any]:
        """Write every document; gives the report."""
        for chunk, encoded in self.encoded(self.examples()):
            documents, cut, rows, digests = [], [], [], []
            for (number, mark, _), document in zip(chunk, encoded, strict=True):
                for piece in self.fit(document) if document is not None else ():
                    documents.append(piece)
                    cut.append(len(document.tokens) > self.config.max_length)
                    rows.append(number)
                    digests.append(mark)
            writer.add(documents, cut, rows, digests)
        return self.summary().state()

    def rows(self) -> Iterator[tuple[int, Reader, Row]]:
        """`(number of the source, its reader, row)`: one source after the other, or, streamed, a bit of each in turn."""
        normalize = normalizer(self.config.unicode_normalization)

        def one(number: int) -> Iterator[tuple[int, Reader, Row]]:
            source, reader = self.sources[number], None
            for row in read_rows(source, self.unread, found=self.found[number], streaming=self.config.streaming):
                if reader is None:
                    reader = self.readers[number] = Reader(source, row, normalize)
                    self.report.formats[source.path] = reader.name
                yield number, reader, row

        if not self.config.streaming:
            for number in range(len(self.sources)):
                yield from one(number)
            return
        open_parts = {number: one(number) for number in range(len(self.sources))}
        credit = dict.fromkeys(open_parts, 0.0)
        while open_parts:  # the source that is furthest behind its weight gives the next row
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
        """`(number of the row, digest of its content, example)` of every row that is to be encoded."""
        for number, reader, row in self.rows():
            self.report.rows += 1
            if self.progress and self.report.rows % CHUNK == 0:
                self.progress(self.report.rows)
            try:
                example = reader(row).with_source(number, self.config.prompt_format)
            except EmptyRow as error:
                if self.config.drop_empty:
                    self.report.dropped[EMPTY] += 1
                else:
                    self.faults(error)
                continue
            except UserError as error:
                self.faults(error)
                continue
            text = content(example)
            mark = digest(text)
            if self.duplicates and (reason := self.duplicates.reason(text, mark)):
                self.report.dropped[reason] += 1
                continue
            yield self.report.rows, mark, example

    def _described(self) -> list[str]:
        """What is worth saying about the columns."""
        found = []
        for number, reader in self.readers.items():
            path = self.sources[number].path
            if reader.unused:
                found.append(f"{path}: columns that are not used: {', '.join(reader.unused)}")
            if reader.name == "preference":
                found.append(
                    f"{path}: the answers in `chosen` are trained; those in `rejected` are checked, and this objective "
                    "has no use for them"
                )
        return found

    def encoded(self, examples: Iterable[tuple[int, int, Example]]) -> Iterator[tuple[list, list[Encoded | None]]]:
        """Chunks of examples with their documents, in order, by as many processes as `num_proc` says."""
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
        # Threads of the parent (JAX has many) do not survive a fork, so workers start fresh.
        context = multiprocessing.get_context("spawn")
        made = (self.tokenizer, self.config, self.classes)
        with context.Pool(self.config.num_proc, _start_worker, made) as pool:
            waiting: deque = deque()
            for chunk in chunks:
                waiting.append((chunk, pool.apply_async(_work, ([example for _, _, example in chunk],))))
                if len(waiting) > 2 * self.config.num_proc:
                    yield self._collected(*waiting.popleft())
            while waiting:
                yield self._collected(*waiting.popleft())

    def _collected(self, chunk: list, result: Any) -> tuple[list, list[Encoded | None]]:
        documents, messages, notes = result.get()
        for message in messages:
            self.faults(UserError(message))
        self.encoder.notes.update(notes)
        return chunk, documents

    def fit(self, document: Encoded) -> Sequence[Encoded]:
        """What is left of a document: of the wanted length, with something that is trained."""
        config, report, count = self.config, self.report, len(document.tokens)
        if config.min_tokens and count < config.min_tokens:
            report.dropped["shorter than min_tokens"] += 1
            return ()
        if config.max_tokens and count > config.max_tokens:
            report.dropped["longer than max_tokens"] += 1
            return ()
        pieces: Sequence[Encoded] = [document]
        if count > config.max_length:
            pieces = cut_document(document, config, self.encoder)
            if not pieces:
                report.dropped[LONG] += 1
                return ()
        elif self.classes is None:
            last = document.tokens[1:][document.weights[1:] > 0][-3:].tolist()
            report.notes["no end trained"] += bool(last) and not self.ends.intersection(last)
        kept = [piece for piece in pieces if piece.weights[1:].any()]
        report.notes["pieces without a trained token"] += len(pieces) - len(kept) if kept else 0
        if not kept:
            report.dropped[MASKED] += 1
            if len(self.masked_where) < 3:
                self.masked_where.append(document.where)
            return ()
        report.kept += 1
        report.documents += len(kept)
        return kept

    def summary(self) -> DataReport:
        """The counts so far. Raises UserError where nothing is left of all rows."""
        messages = [*self.unread.messages, *self.faults.messages][:SHOWN]
        dropped = self.report.dropped + Counter({BROKEN: self.unread.count + self.faults.count})
        # Rows that could not be read are no rows yet; the others turned out to be broken later.
        report = replace(self.report, rows=self.report.rows + self.unread.count, dropped=dropped)
        report.notes = self.report.notes + self.encoder.notes
        report.warnings = [*self._described(), *warnings_of(report, messages, self.masked_where)]
        if not report.kept:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
            first = f" (the first: {messages[0]})" if messages else ""
            raise UserError(
                f"{report.source}: none of {report.rows:,} examples is left: {reasons}{first}. Raise data.max_length "
                f"({self.config.max_length}), choose another data.truncation, or change the data"
            )
        return report


def warnings_of(report: DataReport, broken: list[str], masked: list[str]) -> list[str]:
    """What a person should look at, from the counts."""
    notes, found = report.notes, []
    if report.dropped[BROKEN]:
        more = report.dropped[BROKEN] - len(broken)
        rest = f" and {more:,} more" if more else ""
        found.append(f"{report.dropped[BROKEN]:,} broken rows were skipped: {' | '.join(broken)}{rest}")
    if report.dropped[MASKED]:
        found.append(
            f"{report.dropped[MASKED]:,} rows have no trained token (left within max_length) and are dropped, such as "
            f"{', '.join(masked)}"
        )
    if notes["no end trained"]:
        found.append(
            f"in {notes['no end trained']:,} rows no EOS or end of turn is trained: the model does not learn to stop there"
        )
    if notes["end outside the marks"]:
        found.append(
            f"the chat template's {{% generation %}} marks leave out {notes['end outside the marks']:,} ends of turn; they are "
            "trained all the same, as the model must learn to stop"
        )
    if notes["end added"]:
        found.append(f"the chat template writes no end behind the last answer; EOS is put there in {notes['end added']:,} rows")
    if notes["found turn by turn"]:
        found.append(
            "the chat template has no {% generation %} marks: what the assistant wrote was found by rendering turn by turn, "
            "and each turn was checked to be a prefix of the whole"
        )
    if notes["BOS added"]:
        found.append(
            "the chat template writes no BOS and the tokenizer puts one before every text: ftjax puts one before each "
            "conversation; write {{ bos_token }} into model.chat_template so that other programs do too"
        )
    if notes["joined without a space"]:
        found.append(
            f"in {notes['joined without a space']:,} rows the completion follows the prompt without white space between them; "
            "if that is not meant, write data.completion_template: ' {completion}' or a data.template"
        )
    return found


_encoder: Encoder | None = None


def _start_worker(tokenizer: Any, config: DataConfig, classes: Sequence[str] | None) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = make_encoder(tokenizer, config, classes)


def _work(examples: list[Example]) -> tuple[list[Encoded | None], list[str], Counter[str]]:
    """In a worker: documents, the messages of what failed, and notes."""
    messages: list[str] = []

    def fault(error: UserError) -> None:
        messages.append(str(error))

    _encoder.notes.clear()
    return _encoder(examples, fault), messages, Counter(_encoder.notes)
