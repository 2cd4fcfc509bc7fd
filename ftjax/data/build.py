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
from ftjax.data.find import Files, HubSet, find
from ftjax.data.reader import Reader, read_source
from ftjax.data.report import DataReport
from ftjax.data.row import Row
from ftjax.data.store import Documents, Writer, cached
from ftjax.data.tokens import Tokens
from ftjax.data.values import EmptyRow
from ftjax.errors import UserError

VERSION = 4  # format of the tokens and weights; raise it to rebuild every cache
CHUNK = 1024  # rows that are tokenised together
OPTIONS = (
    "prompt_format", "max_length", "truncation", "train_on_inputs", "last_turn_only", "special_tokens_in_text", "fold_system",
    "on_error", "drop_empty", "min_tokens", "max_tokens", "deduplicate", "near_duplicate_threshold", "unicode_normalization",
)  # fmt: skip
COUNTED = {  # encoder notes and their warnings: "in 3 rows ..."
    "prompt differs": "rows the chat template's generation prompt is not what it writes before the answer (some begin it with "
    "<think>): they are trained on the text without that beginning, and generation adds it. Set model.chat_template to a "
    "version that writes both alike, or write the beginning into the answers",
    "prompt ids differ": "rows the ids before an answer are not those that generation makes, as an earlier boundary between "
    "prompt and answer is tokenised apart; data.last_turn_only: true has one answer a row, and no such difference",
    "answer left out": "rows the chat template leaves out a part of a trained answer (such as reasoning in <think>); set "
    "model.chat_template to a version that writes all of it",
    "reasoning left out": "rows the chat template leaves out the reasoning of trained answers; set model.chat_template to a "
    "version that writes it, or put it into the content",
    "tools left out": "rows the chat template does not write the tools, so that the model is not told of them; set "
    "model.chat_template to a version that does",
    "system folded": "rows the chat template takes no system message: it is put in front of the first user's text, as "
    "`ftjax generate` and `ftjax chat` do; other programs have to do the same (data.fold_system: false refuses such rows)",
    "control tokens split": "rows a user, a tool or the system spells control tokens (such as <|im_end|>): they are read as "
    "plain text; data.special_tokens_in_text: encode makes them tokens, error refuses them",
    "control tokens split in answers": "rows an answer spells tokens that begin or end turns: they are read as plain text; "
    "data.special_tokens_in_text: encode makes them tokens, error refuses them",
    "control tokens encoded": "rows a message spells control tokens, which are tokens (data.special_tokens_in_text: encode), "
    "so that a text may end its own turn",
    "unknown tokens": "rows the answer holds characters that the tokenizer does not know: the model learns to write its "
    "unknown token there. Take a tokenizer (and model) that knows them, or leave such rows out",
}  # fmt: skip
BROKEN, EMPTY, MASKED, LONG = "broken (on_error: skip)", "empty", "without a trained token", "longer than max_length"
UNWANTED = "with label false"


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
    sources: Sequence[SourceConfig], found: Sequence[Files | HubSet], config: DataConfig, tokenizer: Any,
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


def _names(source: SourceConfig, found: Files | HubSet) -> Any:
    """Return the file names of a source. Documents record them, so other paths to the same bytes get another cache entry."""
    return [str(path) for path in found.paths] if isinstance(found, Files) else source.path


@dataclass
class Build:
    """One pass over the sources."""

    sources: Sequence[SourceConfig]
    found: Sequence[Files | HubSet]
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
            ", ".join(source.path for source in self.sources), max_length=config.max_length, packing=config.packing
        )
        self.masked_where: list[str] = []
        self.readers: dict[int, Reader] = {}

    def run(self, writer: Writer) -> dict[str, Any]:
        """Write every document and return the report."""
        for chunk, encoded in self.encoded(self.arranged()):
            documents, cut, rows, digests = [], [], [], []
            for (number, mark, _), unit in zip(chunk, encoded, strict=True):
                pieces = self.fit(unit) if unit is not None else ()
                documents += pieces
                cut += [sum(len(document.tokens) for document in unit or ()) > self.config.max_length] * len(pieces)
                rows += [number] * len(pieces)
                digests += [mark] * len(pieces)
            writer.add(documents, cut, rows, digests)
        return self.summary().state()

    def rows(self) -> Iterator[tuple[int, Reader, Row]]:
        """Yield `(index of the source, its reader, row)`: source after source, or interleaved when streaming."""
        normalize = normalizer(self.config.unicode_normalization)

        def one(number: int) -> Iterator[tuple[int, Reader, Row]]:
            source, streaming = self.sources[number], self.config.streaming
            for reader, row in read_source(
                source, self.unread, found=self.found[number], streaming=streaming, normalize=normalize,
                label=self.encoding.label_reader,
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
            if self.duplicates and (reason := self.duplicates.reason(text, mark)):
                self.report.dropped[reason] += 1
                continue
            yield self.report.rows, mark, example

    def arranged(self) -> Iterator[tuple[int, int, Example]]:
        """Yield the examples as the objective takes them, such as two unpaired answers as a pair."""
        return self.encoding.arrange(self.examples(), self.report.dropped)

    def _described(self) -> list[str]:
        """Return warnings about the columns."""
        found = []
        for number, reader in self.readers.items():
            path = self.sources[number].path
            if reader.unused:
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
                    "has no use for them"
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
        count = sum(len(document.tokens) for document in unit)
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
        if count > config.max_length:
            pieces = self.encoding.shorten(unit, config, self.encoder.tokens.bos)
            if not pieces:
                report.dropped[LONG] += 1
                return ()
        elif self.encoding.answers:
            for document in unit:
                last = document.tokens[1:][document.weights[1:] > 0][-3:].tolist()
                report.notes["no end trained"] += bool(last) and not self.ends.intersection(last)
        kept = [piece for piece in pieces if piece.weights[1:].any()]
        if len(unit) > 1 and len(kept) < len(unit):
            kept = []
        report.notes["pieces without a trained token"] += len(pieces) - len(kept) if kept else 0
        if not kept:
            report.dropped[MASKED] += 1
            if len(self.masked_where) < 3:
                self.masked_where.append(unit[0].where)
            return ()
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
        report.warnings = [*self.unread.notes, *self._described(), *warnings_of(report, messages, self.masked_where)]
        if not report.kept:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
            first = f" (the first: {messages[0]})" if messages else ""
            advice = "Change the data, or what drops it"
            if report.dropped[LONG] or report.dropped[MASKED]:
                advice = f"Raise data.max_length ({self.config.max_length}), choose another data.truncation, or change the data"
            raise UserError(f"{report.source}: none of {report.rows:,} examples is left: {reasons}{first}. {advice}")
        return report


def _has_turn(row: int, share: float, epoch: int) -> bool:
    """Return whether a row is in the `share` of its source that this epoch sees; the next epoch sees the next ones."""
    place = row * 0.6180339887498949 % 1  # the golden ratio spreads any run of rows evenly
    return (place - share * epoch) % 1 < share


def warnings_of(report: DataReport, broken: list[str], masked: list[str]) -> list[str]:
    """Return the warnings that follow from the counts."""
    notes, found = report.notes, []
    if report.dropped[BROKEN]:
        more = report.dropped[BROKEN] - len(broken)
        rest = f" and {more:,} more" if more else ""
        found.append(f"{report.dropped[BROKEN]:,} broken rows were skipped: {' | '.join(broken)}{rest}")
    if report.dropped[UNWANTED]:
        found.append(
            f"{report.dropped[UNWANTED]:,} rows have label false (an unpaired preference, as for KTO): their completions are "
            "not wanted, and this objective has no use for them; data.format: prompt_completion trains them too"
        )
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
        found.append(f"the chat template writes no end after the last answer; EOS is added in {notes['end added']:,} rows")
    if notes["found turn by turn"]:
        found.append(
            "the chat template has no {% generation %} marks: what the assistant wrote was found by rendering turn by turn, "
            "and each turn was checked to be a prefix of the whole"
        )
    found += [f"in {notes[name]:,} {said}" for name, said in COUNTED.items() if notes[name]]
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
