"""A user's own metric: a Python file with one function."""

import inspect
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from ftjax.errors import UserError
from ftjax.evaluate.own_code import public_functions
from ftjax.evaluate.rows import Item
from ftjax.evaluate.statistic import Scores, means

ARGUMENTS = ("prediction", "references", "prompt", "row")
EXPECTED = (
    "expected one function such as `def brevity(prediction, references): return ...`; it may take prediction (text), "
    "references (a list of text), prompt (text), row (the columns of the data) and gives a number or {name: number}"
)


def load_metric(path: str) -> Callable[..., Any]:
    """Load the one public function that the file defines. Raises UserError if there is none, or several."""
    found = list(public_functions(path, "evaluate.task", EXPECTED).values())
    if len(found) != 1:
        names = ", ".join(function.__name__ for function in found) or "none"
        raise UserError(f"{path}: functions found: {names}; {EXPECTED}. Begin the names of helpers with _")
    unknown = [name for name in inspect.signature(found[0]).parameters if name not in ARGUMENTS]
    if unknown:
        raise UserError(f"{path}: {found[0].__name__} takes {', '.join(unknown)}; {EXPECTED}")
    return found[0]


def own(items: Sequence[Item], answers: Sequence[str], function: Callable[..., Any], prompts: Sequence[str]) -> Scores:
    """Return means of the function's results. Raises UserError if it fails, or returns anything but numbers."""
    takes, name, found = list(inspect.signature(function).parameters), function.__name__, []
    for item, answer, prompt in zip(items, answers, prompts, strict=True):
        given = {"prediction": answer, "references": list(item.references), "prompt": prompt, "row": dict(item.values)}
        try:
            value = function(**{key: given[key] for key in takes})
        except Exception as error:
            raise UserError(f"{item.where}: {name} failed: {type(error).__name__}: {error}") from None
        scores = value if isinstance(value, dict) else {name: value}
        if not scores or not all(isinstance(one, Real) for one in scores.values()):
            raise UserError(f"{item.where}: {name} gave {value!r}; expected a number or {{name: number}}")
        found.append({str(key): float(one) for key, one in scores.items()})
    if len({tuple(sorted(row)) for row in found}) > 1:
        raise UserError(f"{name} gives different names for different rows; expected the same for all")
    return means(found, shares=False)
