"""Advice for `data.columns` when no format fits: a guess from column names and values, or a list of the columns found."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftjax.data.row import Row
from ftjax.data.values import by_row, kind_of

# Names that other data sets give a column, the most reliable first.
ANSWERS = (
    "completion", "response", "answer", "answers", "output", "target", "highlights", "summary", "abstract", "solution", "reply",
    "assistant", "gpt", "bot", "generation", "translation", "rewrite", "correction", "code", "answerkey",
)  # fmt: skip
LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "emotion", "topic", "tag", "rating", "verdict")
PROMPTS = (
    "prompt", "instruction", "question", "query", "problem", "request", "task", "user", "human", "input", "article", "document",
    "dialogue", "sentence", "text", "content", "review", "comment", "tweet", "post", "passage", "message", "body", "source",
    "src", "premise", "title",
)  # fmt: skip
WINNERS = ("chosen", "accepted", "preferred", "winner", "win", "better", "good", "best", "positive")
LOSERS = ("rejected", "dispreferred", "loser", "lose", "worse", "bad", "worst", "negative")
CONTEXTS = ("context", "input", "passage", "background", "document", "article")
# Last words of names of columns that describe the row and hold none of its content.
ABOUT = {"id", "ids", "idx", "index", "uuid", "hash", "url", "count", "num", "len", "length", "score", "date", "time", "lang",
         "language", "split", "source", "dataset", "model", "version"}  # fmt: skip

NO_NAMES = ("null", "true", "false", "yes", "no", "on", "off")  # words that YAML reads as null or a boolean


@dataclass(frozen=True)
class Column:
    """One column of some rows; `values` are those that are not null."""

    name: str
    values: list[Any]

    @property
    def words(self) -> list[str]:
        """Lower-case words of the name: `answerKey` and `Answer key` both give `answer`, `key`."""
        return [w.lower() for w in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+", self.name)]

    @property
    def is_text(self) -> bool:
        return 2 * sum(isinstance(value, str) and bool(value.strip()) for value in self.values) > len(self.values)

    @property
    def holds_text(self) -> bool:
        """True if every value is text; most of them may be empty."""
        return bool(self.values) and all(isinstance(value, str) for value in self.values)

    @property
    def is_answer(self) -> bool:
        return bool(self.values) and all(isinstance(value, str | int | float) for value in self.values)

    @property
    def repeats(self) -> bool:
        """True if a few values recur, as class labels do."""
        distinct = len(set(map(str, self.values)))
        return self.is_answer and len(self.values) >= 6 and distinct >= 2 and 3 * distinct <= len(self.values)

    def called(self, names: Sequence[str]) -> int | None:
        """Return the index in `names` of this column's name or of a word of it; None if there is none."""
        joined = "".join(self.words)
        if joined in names:
            return names.index(joined)
        return next((len(names) + at for at, name in enumerate(names) if name in self.words and not self.is_about), None)

    @property
    def is_about(self) -> bool:
        return bool(ABOUT.intersection(self.words[-1:]))

    def described(self) -> str:
        if not self.values:
            return f'"{self.name}" (empty)'
        kind = kind_of(self.values[0])
        if kind == "text":
            words = sum(len(str(value).split()) for value in self.values) / len(self.values)
            kind = f"text, about {words:.0f} words" if words >= 1.5 else "text"
        if len(self.values) > 1:
            kind += f", {len(set(map(repr, self.values))):,} different of {len(self.values):,}"
        return f'"{self.name}" ({kind})'


def advise(rows: Sequence[Row], accepted: Callable[[dict[str, str]], bool], preferences: bool = False) -> str:
    """Return one sentence of advice. It suggests a mapping only if `accepted` says that the rows can be read with it.

    Args:
        preferences: the rows should be preferences.
    """
    names = dict.fromkeys(name for row in rows for name in row.values)
    columns = [Column(name, [v for row in rows if (v := row.values.get(name)) is not None]) for name in names]
    guess = guessed(columns)
    if guess and accepted(guess):
        return f"Map them with data.columns, such as data.columns: {written(guess)}"
    there = f": {'; '.join(column.described() for column in columns[:12])}" if columns else ""
    if preferences:
        return (
            "Say which is which with data.columns: {prompt: NAME, chosen: NAME, rejected: NAME} or "
            f"{{prompt: NAME, completion: NAME, label: NAME}}{there}"
        )
    return (
        "Say which is which with data.columns: {prompt: NAME, completion: NAME} or {text: NAME}, or write data.template "
        f"(in a CSV file the first line is the names){there}"
    )


def guessed(columns: Sequence[Column]) -> dict[str, str] | None:
    """Guess a mapping from our column names to theirs; None if the names and values do not tell."""
    for column in columns:
        first = by_row(column.values[0]) if column.values else None
        if isinstance(first, list) and first and isinstance(first[0], dict) and {"role", "from"} & first[0].keys():
            return {"messages" if "role" in first[0] else "conversations": column.name}
    system = next((c for c in columns if c.words[:1] == ["system"] and c.is_answer), None)
    texts = [c for c in columns if c.is_text and c is not system]
    answers = [c for c in columns if c.is_answer and c is not system]
    chosen, rejected = (_best(texts, names) for names in (WINNERS, LOSERS))
    if chosen and rejected:
        prompt = _best([c for c in texts if c not in (chosen, rejected)], PROMPTS)
        return _named(prompt=prompt, chosen=chosen, rejected=rejected, system=system)
    answer = _best(answers, ANSWERS)
    label = None if answer else _best(answers, LABELS)
    prompt = _best([c for c in texts if c not in (answer, label)], PROMPTS)
    if prompt and not answer and not label:
        repeated = [c for c in answers if c is not prompt and c.repeats and not c.is_about]
        label = repeated[0] if len(repeated) == 1 else None
    others = [c for c in texts if c not in (prompt, answer, label) and not c.is_about]
    if (answer or label) and not prompt and len(others) == 1:
        prompt = others[0]
    if prompt and answer:
        context = _best([c for c in columns if c not in (prompt, answer, system) and c.holds_text], CONTEXTS)
        if context and context.called(CONTEXTS) < len(CONTEXTS):
            return _named(instruction=prompt, input=context, output=answer, system=system)
        return _named(system=system, prompt=prompt, completion=answer)
    if prompt and label:
        return _named(text=prompt, label=label)
    if not prompt and not answer and not label and len(others) == 2 and sum(c.repeats for c in others) == 1:
        text, label = sorted(others, key=lambda c: c.repeats)
        return _named(text=text, label=label)
    if len(texts) == 1 and not answer and not label and len(answers) == 1:
        return {"text": texts[0].name}
    return None


def taken_in_order(columns: Sequence[Column]) -> dict[str, str] | None:
    """Take a single column of texts as texts, and two as prompts and answers, whatever their names are; None for others."""
    texts = [column.name for column in columns if column.is_text and not column.is_about]
    if len(texts) == 1:
        return {"text": texts[0]}
    return {"prompt": texts[0], "completion": texts[1]} if len(texts) == 2 else None


def written(columns: dict[str, str]) -> str:
    """Format the mapping as YAML that can be pasted on a line of its own or after `data.columns=`."""
    return "{" + ", ".join(f"{ours}: {_yaml(theirs)}" for ours, theirs in columns.items()) + "}"


def _yaml(name: str) -> str:
    plain = re.fullmatch(r"[^\W\d][\w-]*(?: [\w-]+)*", name) and name.lower() not in NO_NAMES
    return name if plain else json.dumps(name, ensure_ascii=False)


def _best(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    found = [(at, n) for n, column in enumerate(columns) if (at := column.called(names)) is not None]
    return columns[min(found)[1]] if found else None


def _named(**columns: Column | None) -> dict[str, str]:
    return {ours: column.name for ours, column in columns.items() if column is not None and ours != column.name}
