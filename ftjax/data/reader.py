"""Turns the rows of a source into examples: detects the format, maps the columns and reports unused ones.

The columns of the first rows determine the format, unless `data.format` names it. Columns with other names are mapped with
`data.columns: {prompt: question, completion: answer}` (ours: the file's).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

from ftjax.config.data import SourceConfig, template_fields
from ftjax.data.advice import advise
from ftjax.data.example import Example
from ftjax.data.faults import Faults
from ftjax.data.find import Found
from ftjax.data.formats import CHAT, FORMATS, asked, is_verdict
from ftjax.data.read import read_rows
from ftjax.data.row import Row
from ftjax.data.translate import KNOWN
from ftjax.data.values import EmptyRow, Values, filled, names_of, normalized, quoted, string
from ftjax.errors import UserError

AHEAD = 1024  # rows that determine the format
MEDIA = ("images", "videos", "audios")  # columns of lists, by the names that TRL and LLaMA-Factory give them


def read_source(
    source: SourceConfig, faults: Faults | None = None, *, found: Found | None = None, streaming: bool = False,
    normalize: Callable[[str], str] | None = None, label: Callable[[Any, str], Any] | None = None, prefers: Sequence[str] = (),
) -> Iterator[tuple["Reader", Row]]:  # fmt: skip
    """Yield every row of a source with its reader; see `read_rows` and `Reader` for the arguments.

    Raises UserError, with file and line, for rows that cannot be read or that fit no format.
    """
    yield from _with_reader(source, read_rows(source, faults, found=found, streaming=streaming), normalize, label, prefers)


def to_examples(rows: Iterable[Row], source: SourceConfig | None = None, faults: Faults | None = None) -> Iterator[Example]:
    """Yield every row as an example, for callers that already have rows.

    Raises UserError, with file and line, for a row that is wrong, unless `faults` skips it.
    """
    faults = faults or Faults()
    for reader, row in _with_reader(source or SourceConfig(path="data"), iter(rows)):
        try:
            yield reader(row)
        except UserError as error:
            faults(error)


def _with_reader(
    source: SourceConfig,
    rows: Iterator[Row],
    normalize: Callable[[str], str] | None = None,
    label: Callable[[Any, str], Any] | None = None,
    prefers: Sequence[str] = (),
) -> Iterator[tuple["Reader", Row]]:
    first, error = [], None
    try:
        for row in islice(rows, AHEAD):
            first.append(row)
    except UserError as caught:  # raised in its place, after the rows before it
        error = caught
    reader = Reader(source, first, normalize, label=label, prefers=prefers) if first else None
    for row in first:
        yield reader, row
    if error is not None:
        raise error
    for row in rows:
        yield reader, row


def refuse_media(row: Row) -> None:
    """Raise UserError for a row with images, videos or sounds: trained without them, its answer would be a guess."""
    if found := [name for name in MEDIA if isinstance(row.values.get(name), list) and row.values[name]]:
        raise UserError(
            f"{row.where}: it has {quoted(found)}, and only text can be trained; remove the row, or the column if the text "
            "does not need it"
        )


class Reader:
    """Turns rows of one source into examples.

    After reading, `unused` holds the columns that were not read, and `notes` counts what deserves a warning.

    Args:
        rows: the first rows, which determine the format.
        normalize: applied to each text.
        label: turns a label column's value and its location into what the format reads (`ftjax.data.labels`).
        prefers: formats that are taken before all others if the rows fit them.
        advising: whether messages suggest `data.columns`.
    """

    def __init__(
        self, source: SourceConfig, rows: Sequence[Row], normalize: Callable[[str], str] | None = None, *,
        label: Callable[[Any, str], Any] | None = None, prefers: Sequence[str] = (), advising: bool = True,
    ):  # fmt: skip
        self.source = source
        self.prefers = tuple(prefers)
        self.order = dict.fromkeys((*prefers, *(name for name, form in FORMATS.items() if not form.asked_for)))
        self.advising = advising
        self.columns = source.columns or {}
        self.normalize, self.label = normalize, label
        self.template = _Template(source.template) if source.template else None
        self.completion_template = _Template(source.completion_template) if source.completion_template else None
        self._ahead = rows
        self._known = dict.fromkeys(name for row in rows for name in row.values)
        if label and "labels" in self._known and not {"label", "input_ids"} & {*self._known, *self.columns}:
            self.columns = {**self.columns, "label": "labels"}  # the name that transformers uses
        if absent := [theirs for theirs in self.columns.values() if theirs not in self._known]:
            raise UserError(f"{rows[0].where}: data.columns names {quoted(absent)}, but the rows have {names_of(self._known)}")
        self.name = self._detect() if source.format in (None, "auto") else source.format
        self.format = FORMATS[self.name]
        if self.template and self.format.whole:
            raise UserError(
                f"{rows[0].where}: data.template makes a prompt out of columns, but format {self.name} has none of its own"
            )
        self.seen: dict[str, None] = {}
        self.notes: Counter[str] = Counter()
        self.unknown_roles: Counter[str] = Counter()

    @property
    def unused(self) -> list[str]:
        used = {*self.format.needs, *self.format.takes}
        if self.template:
            used = {self.format.answer, *CHAT, *self.template.fields}
        if self.completion_template:
            used |= {*self.completion_template.fields}
        theirs = {ours: self.columns.get(ours, ours) for ours in used}
        return [name for name in self.seen if name not in theirs.values() and name not in used]

    def __call__(self, row: Row) -> Example:
        """Return the example. Raises UserError, with file and line, if a column is missing or has a wrong type."""
        self.seen.update((name, None) for name, value in row.values.items() if value is not None)
        refuse_media(row)
        values = self._rename(row)
        if self.normalize:
            values = {name: normalized(value, self.normalize) for name, value in values.items()}
        example = self._read(values, row)
        self._note(example, values)
        return example

    def _read(self, values: dict[str, Any], row: Row) -> Example:
        where, completion = row.where, None
        if self.completion_template:
            completion = self.completion_template(values, where)
            values[self.format.answer or "completion"] = completion
        labelled = self.label is not None and self._read_label(values, where)
        if self.template and self.name == "prompt":
            values["prompt"] = self.template(values, where)
        elif self.template:
            if completion is not None:
                completion = values[self.format.answer or "completion"]
            return self._templated(values, where, completion)
        self._need(values, row)
        example = self.format.read(values, where)
        if self.label is not None and not labelled and example.references:
            example = replace(example, references=(self.label(example.references[0], where),))
        taken = ("prompt", "prompt_completion", "unpaired_preference", "preference")
        if completion is None and example.prompt is not None and self.name not in taken:
            example = replace(example, completion=_spaced(example.prompt, example.completion))
        return example

    def _read_label(self, values: dict[str, Any], where: str) -> bool:
        """Read the label column and return True; return False if there is none, or if it holds messages, whose last turn is
        read later."""
        name = self.format.answer or ("completion" if self.template else None)
        value = values.get(name)
        if name not in values or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            return False
        if values.get("references") is not None:
            raise UserError(
                f"{where}: the row has {name!r} and 'references'; a classification has its label alone; leave one out"
            )
        values[name] = self.label(value, where)
        return True

    def _templated(self, values: dict[str, Any], where: str, completion: str | None) -> Example:
        prompt, answer = self.template(values, where), self.format.answer or "completion"
        if answer not in values:
            raise UserError(f"{where}: expected {answer!r} for the completion; found {names_of(values)}")
        if completion is None:
            completion = filled(values, answer, where)
        elif not completion.strip():
            raise EmptyRow(f"{where}: the completion is empty, so there is nothing to learn from this row; fill or remove it")
        example = asked(values, where, prompt, completion)
        return example if self.completion_template else replace(example, completion=_spaced(prompt, completion))

    def _note(self, example: Example, values: Values) -> None:
        messages = example.messages or ()
        system = values.get("system")
        if system and messages and messages[0]["role"] == "system" and messages[0].get("content") != system:
            self.notes["system column"] += 1
        self.unknown_roles.update({message["role"] for message in messages} - KNOWN)

    def _need(self, values: Values, row: Row) -> None:
        missing = [name for name in self.format.needs if name not in values]
        if missing:
            elsewhere = {ours for ours, theirs in self.columns.items() if theirs in self._known} | {*self._known}
            advice = "" if elsewhere.issuperset(missing) else f". {self._advice}"
            raise UserError(
                f"{row.where}: expected {quoted(self.format.needs)} (format {self.name}); found {names_of(row.values)}{advice}"
            )

    def _detect(self) -> str:
        """Return the first format that fits at least half of the rows that fit any; otherwise the one that fits most.

        Columns that are null count as absent, unless no format fits otherwise.
        """
        for nulls in (False, True):
            fits, some = self._fits(nulls)
            if some:
                return next((name for name in self.order if 2 * fits[name] >= some), None) or fits.most_common(1)[0][0]
        raise UserError(self._nothing_fits())

    def _fits(self, nulls: bool) -> tuple[Counter[str], int]:
        """Count the rows that fit each format, and those that fit any; `nulls` includes columns that are null."""
        answers = {form.answer: name for name, form in FORMATS.items() if form.answer}
        fits: Counter[str] = Counter()
        some = 0
        for row in self._ahead:
            values = {name: value for name, value in self._rename(row).items() if nulls or value is not None}
            if self.completion_template:
                values["completion"] = ""
            if self.template:  # the template makes the prompt, and the first completion column is the answer
                found = [name for column, name in answers.items() if column in values][:1]
                found = ["prompt"] if "prompt" in self.prefers else found
            else:
                found = [name for name in self.order if self._fit(name, values)]
            fits.update(found)
            some += bool(found)
        return fits, some

    def _fit(self, name: str, values: Values) -> bool:
        form = FORMATS[name]
        if not (values.keys() >= set(form.needs) and form.fits(values)):
            return False
        return not form.verdict or name in self.prefers or is_verdict(values)

    def _nothing_fits(self) -> str:
        row, found = self._ahead[0], names_of(self._known)
        if self.template:
            return (
                f"{row.where}: data.template makes the prompt, and no column holds the completion; found {found}. Name it with "
                "data.columns: {completion: NAME}, or write data.completion_template"
            )
        named = self.prefers or [name for name, form in FORMATS.items() if not form.verdict]
        named = [name for name in named if not FORMATS[name].asked_for] or named
        known = " or ".join(quoted(FORMATS[name].needs, " and ") for name in named)
        return f"{row.where}: expected columns {known}; found {found}. {self._advice}"

    @cached_property
    def _advice(self) -> str:
        return advise(self._ahead, self._readable, bool(self.prefers)) if self.advising else ""

    def _readable(self, columns: dict[str, str]) -> bool:
        """Return whether these rows can be read with this `data.columns`, in a format that the objective prefers if any."""
        read, source = 0, self.source.model_copy(update={"columns": columns, "format": "auto"})
        try:
            reader = Reader(source, self._ahead, prefers=self.prefers, advising=False)
        except UserError:
            return False
        if self.prefers and reader.name not in self.prefers:
            return False
        for row in self._ahead:
            try:
                reader(row)
                read += 1
            except UserError:
                pass
        return 2 * read >= len(self._ahead)

    def _rename(self, row: Row) -> dict[str, Any]:
        if not self.columns:
            return dict(row.values)
        taken = set(self.columns.values())
        kept = {name: value for name, value in row.values.items() if name not in taken and name not in self.columns}
        return kept | {ours: row.values[theirs] for ours, theirs in self.columns.items() if theirs in row.values}


class _Template:
    """A template such as `Question: {question}\\nAnswer:`, filled from the columns of a row; null becomes ""."""

    def __init__(self, template: str):
        self.template, self.fields = template, template_fields(template)

    def __call__(self, values: Values, where: str) -> str:
        missing = [name for name in self.fields if name not in values]
        if missing:
            raise UserError(f"{where}: the template names {quoted(missing)}; found {names_of(values)}")
        texts = {name: "" if values[name] is None else string(values, name, where) for name in self.fields}
        return self.template.format_map(texts)


def _spaced(prompt: str, completion: str) -> str:
    """Return the completion, with a space in front unless it or the prompt has white space there: `Answer:` and `5`."""
    return completion if not prompt or prompt[-1].isspace() or completion[:1].isspace() else f" {completion}"
