"""The label column of a classification or regression, and the text that represents its labels.

A row's labels take the place of its answer as JSON, so that everything that compares rows (duplicates, contamination,
references of an evaluation) sees them: `["joy", "love"]`, in the order of the classes, from any of

    names      ["love", "joy"]        or, with `objective.label_separator: ","`, the text "love, joy"
    ids        [3, 2]
    multi_hot  [0, 0, 1, 1]

and `[3.5]` from a regression's 3.5. A single class stays the text that it is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.config.objective import ClassificationConfig, ObjectiveConfig, ProblemType
from ftjax.data.values import EmptyRow
from ftjax.errors import UserError

LARGEST = float(np.finfo(np.float32).max)
MOST = 200  # most labels that are found in data; more are answers, not labels
SEPARATORS = (",", ";", "|")
SEVERAL = (
    "for several labels a row set objective: {name: classification, problem_type: multi_label_classification}, for numbers "
    "problem_type: regression"
)


@dataclass(frozen=True)
class Labels:
    """The configuration of an objective's label column.

    Attributes:
        names: names of the classes, labels or outputs, by index; None before they are found.
        head: whether a classification head predicts them, not words.
    """

    problem_type: ProblemType
    names: tuple[str, ...] | None = None
    form: str = "auto"
    separator: str | None = None
    head: bool = True

    @classmethod
    def of(cls, objective: ObjectiveConfig) -> "Labels | None":
        """Build from an objective; return None for one without labels."""
        if not isinstance(objective, ClassificationConfig):
            return None
        names = None if objective.labels is None else tuple(objective.labels)
        return cls(objective.problem_type, names, objective.label_format, objective.label_separator, objective.head)

    @property
    def single(self) -> bool:
        return self.problem_type == "single_label_classification"

    def read(self, value: Any, where: str) -> Any:
        """Return the text for a value of the column; a single class comes back unchanged, for the format to read.

        Raises UserError, with file and line, for a value that is not a label, and EmptyRow for an empty one.
        """
        if self.single:
            if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
                raise UserError(f"{where}: the label is {_shown(value)}, expected one class; {SEVERAL}")
            return value
        if self.problem_type == "regression":
            return self._numbers(value, where)
        return self._set(value, where)

    def _numbers(self, value: Any, where: str) -> str:
        found = numbers(value, where, self.separator)
        if self.names is not None and len(found) != len(self.names):
            raise UserError(f"{where}: expected {len(self.names)} numbers, as objective.labels says; found {len(found)}")
        return json.dumps(found)

    def _set(self, value: Any, where: str) -> str:
        found = parts(value, where, self.separator)
        if self.form == "multi_hot":
            chosen = self._of_multi_hot(found, where)
        elif self.form == "ids":
            chosen = [self._of_id(part, where) for part in found]
        else:
            chosen = [self._of_name(part, where) for part in found]
        if twice := next((one for one in chosen if chosen.count(one) > 1), None):
            raise UserError(f"{where}: the label {twice!r} occurs twice in {_shown(value)}")
        return json.dumps(sorted(chosen, key=self.names.index), ensure_ascii=False)

    def _of_name(self, part: Any, where: str) -> str:
        if not isinstance(part, str):
            raise UserError(f"{where}: the label {part!r} is a number, expected a name (objective.label_format: names)")
        if part not in self.names:
            raise UserError(f"{where}: the label {part!r} is not in objective.labels: {', '.join(self.names)}")
        return part

    def _of_id(self, part: Any, where: str) -> str:
        number = int(part) if isinstance(part, str) and part.isdecimal() else part
        if type(number) is not int or not 0 <= number < len(self.names):
            raise UserError(f"{where}: the label {part!r} is not a number from 0 to {len(self.names) - 1} (label_format: ids)")
        return self.names[number]

    def _of_multi_hot(self, found: Sequence[Any], where: str) -> list[str]:
        values = [int(part) if part in ("0", "1") else part for part in found]
        if len(values) != len(self.names):
            raise UserError(f"{where}: expected 0 or 1 for each of {len(self.names)} labels; found values: {len(values)}")
        if odd := next((part for part in values if isinstance(part, str) or part not in (0, 1)), None):
            raise UserError(f"{where}: the value {odd!r} of a label, expected 0 or 1 (objective.label_format: multi_hot)")
        return [name for name, value in zip(self.names, values, strict=True) if value]

    # ---- and back ----

    def chosen(self, text: str) -> list[str]:
        """Return the names in a text that `read` returned."""
        return json.loads(text)

    def vector(self, text: str) -> np.ndarray:
        """Return float32 `[labels]` for a text that `read` returned: the numbers, or 1 for each label of the row."""
        found = json.loads(text)
        if self.problem_type == "regression":
            return np.array(found, np.float32)
        return np.array([name in found for name in self.names], np.float32)

    def words(self, number: int, vector: np.ndarray | None) -> str:
        """Return the labels of an encoded row for display, from its last token and its vector."""
        if self.single:
            return self.names[number]
        if self.problem_type == "regression":
            return ", ".join(f"{value:g}" for value in vector)
        return ", ".join(name for name, value in zip(self.names, vector, strict=True) if value) or "(no label)"


def parts(value: Any, where: str, separator: str | None) -> list[Any]:
    """Return the labels of a row as a list of texts or numbers."""
    if value is None:
        raise EmptyRow(f"{where}: the row has no labels; write an empty list for a row that has none of them")
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) and separator is not None:
        found = [part.strip() for part in value.split(separator)] if value.strip() else []
    elif isinstance(value, str):
        found = _json_list(value)
        if found is None:
            raise UserError(
                f"{where}: the labels are the text {_shown(value)}, expected a list; where one text holds several, say what "
                "separates them: objective.label_separator"
            )
    elif isinstance(value, list | tuple):
        found = [part.strip() if isinstance(part, str) else part for part in value]
    else:
        raise UserError(f"{where}: the labels are {_shown(value)}, expected a list")
    odd = [part for part in found if part == "" or not isinstance(part, str | int | float)]
    if odd:
        raise UserError(f"{where}: a label is {_shown(odd[0])}; expected names or numbers in {_shown(value)}")
    if len({isinstance(part, str) for part in found}) > 1:
        raise UserError(f"{where}: names and numbers are mixed in {_shown(value)}; write labels one way")
    return found


def numbers(value: Any, where: str, separator: str | None) -> list[float]:
    """Return the numbers of a regression row."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise EmptyRow(f"{where}: the row has no number to learn; fill or remove it")
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str):
        value = value.split(separator) if separator is not None else _json_list(value) or value
    found = []
    for one in value if isinstance(value, list | tuple) else [value]:
        try:
            number = float("nan" if isinstance(one, bool) else one)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not abs(number) <= LARGEST:
            raise UserError(f"{where}: {_shown(one)} is not a number that a regression can learn; expected one such as 3.5")
        found.append(number)
    if not found:
        raise EmptyRow(f"{where}: the row has no number to learn; fill or remove it")
    return found


def _json_list(text: str) -> list[Any] | None:
    """Parse a list that a table holds as JSON text; None for any other text."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Survey:
    """Surveys the label column of all rows to find the labels and how they are written.

    A `Reader` calls `read` in place of `Labels.read`; then `labels()` returns the result.
    """

    def __init__(self, labels: Labels):
        self.asked = labels
        self.found: dict[str, str] = {}  # class or name: its first location
        self.numbers: str | None = None  # location of the first numeric labels
        self.sizes: dict[int, str] = {}  # number of labels in a row: its first location
        self.bits, self.whole, self.largest = True, True, -1

    def read(self, value: Any, where: str) -> Any:
        """Record a value of the column. Raises UserError as `Labels.read` does."""
        if self.asked.single:
            return self.asked.read(value, where)
        if self.asked.problem_type == "regression":
            found = numbers(value, where, self.asked.separator)
            self.sizes.setdefault(len(found), where)
            if len(self.sizes) > 1:
                first, other = self.sizes.items()
                raise UserError(f"{where}: expected as many numbers as in {first[1]}, {first[0]}; found {other[0]}")
            return "[]"
        found = parts(value, where, self.asked.separator)
        if self.asked.form in ("ids", "multi_hot"):
            found = [int(part) if isinstance(part, str) and part.isdecimal() else part for part in found]
        if found and isinstance(found[0], str):
            for name in found:
                self.see(name, where)
            return "[]"
        self.sizes.setdefault(len(found), where)
        if found:
            self.numbers = self.numbers or where
            self.bits &= all(part in (0, 1) for part in found)
            self.whole &= all(type(part) is int for part in found)
            self.largest = max([self.largest, *(part for part in found if type(part) is int)])
        if self.numbers and self.found and self.asked.form == "auto":
            first = next(iter(self.found.values()))
            raise UserError(f"{where}: labels are numbers in {self.numbers} and names in {first}; write them one way")
        return "[]"

    def see(self, name: str, where: str) -> None:
        """Record a class or name. Raises UserError for too many to be classes."""
        self.found.setdefault(name, where)
        if self.asked.names is None and len(self.found) > MOST:
            raise UserError(
                f"objective classification: more than {MOST} different labels, such as {', '.join(list(self.found)[:3])}; are "
                "these classes? Then name them in objective.labels"
            )

    def labels(self) -> tuple[list[str], str]:
        """Return the names by index, configured or found, and how rows write them.

        Raises UserError if the values found are not labels.
        """
        names = None if self.asked.names is None else list(self.asked.names)
        if self.asked.single:
            return names if names is not None else self._classes(), "auto"
        if self.asked.problem_type == "regression":
            count = next(iter(self.sizes), len(names or [""]))
            return names if names is not None else _unnamed(count), "auto"
        form = self._form(len(names) if names else None)
        if names is None and form == "names":
            names = sorted(self.found)
        elif names is None:
            count = max(self.sizes) if form == "multi_hot" and self.sizes else self.largest + 1
            if count > MOST:
                raise UserError(f"objective classification: {count} labels by number; name them in objective.labels")
            names = _unnamed(count)
        if not names:
            raise UserError("objective classification: no row has a label; name the labels in objective.labels")
        return names, form

    def _classes(self) -> list[str]:
        """Return the classes of single-label rows in alphabetical order."""
        if len(self.found) < 2:
            raise UserError(
                f"objective classification: all rows have the label {next(iter(self.found), None)!r}; name the classes in "
                "objective.labels"
            )
        for name, where in self.found.items():
            for separator in SEPARATORS:
                several = [part.strip() for part in name.split(separator)]
                if len(several) > 1 and all(part in self.found for part in several):
                    raise UserError(
                        f"{where}: the label {name!r} looks like several: {' and '.join(several)} are labels of other rows; "
                        f"set objective.problem_type: multi_label_classification and label_separator: '{separator}', or, where "
                        "it is a class of its own, name all classes in objective.labels"
                    )
        return sorted(self.found)

    def _form(self, count: int | None) -> str:
        """Return the format. `auto`: numbers are multi-hot if every row has the same number of them and all are 0 or 1."""
        if self.asked.form != "auto":
            return self.asked.form
        if self.numbers is None:
            return "names"
        if not self.whole:
            return "multi_hot"
        alike = len(self.sizes) == 1 and (count in self.sizes if count else max(self.sizes) > 1)
        return "multi_hot" if self.bits and alike else "ids"


def _unnamed(count: int) -> list[str]:
    """Return the names that transformers gives to unnamed labels."""
    return [f"LABEL_{number}" for number in range(count)]
