"""What a search tries: `optimizer.learning_rate=log(1e-5,1e-3) method.r=[8,16,32]`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftjax.api.settings import settings_of
from ftjax.config import Config
from ftjax.config.yaml_text import resolve_plain
from ftjax.errors import UserError, join_problems

Search = str | Mapping[str, Any]
FORMS = "log(1e-5,1e-3), uniform(0,0.1), int(1,8), logint(8,256) or [8,16,32]"
_RANGE = re.compile(r"(?P<kind>log|uniform|int|logint)\((?P<low>[^,()]+),(?P<high>[^,()]+)\)")
_PART = re.compile(r"(?P<key>[^\s=]+)=(?P<value>\[[^\]]*\]|[a-z]+\([^)]*\))(?:\s+|$)")


@dataclass(frozen=True)
class Dimension:
    """The values of one key: a range with a scale, or choices.

    Attributes:
        key: dotted key of the configuration.
    """

    key: str
    kind: str  # log, uniform, int, logint, choice
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: Any) -> Any:
        """Return the value of this key that an `optuna.Trial` tries."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, list(self.choices))
        if self.kind in ("int", "logint"):
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.kind == "logint")
        return trial.suggest_float(self.key, self.low, self.high, log=self.kind == "log")

    @property
    def ends(self) -> tuple[Any, ...]:
        """Return the values to check before a search: all choices, or both ends of the range."""
        if self.kind == "choice":
            return self.choices
        number = int if self.kind in ("int", "logint") else float
        return number(self.low), number(self.high)

    @property
    def text(self) -> str:
        """Return the values as `parse` reads them."""
        if self.kind == "choice":
            return f"[{', '.join(map(_shown, self.choices))}]"
        return f"{self.kind}({self.low:g},{self.high:g})"


def parse(search: Search) -> list[Dimension]:
    """Return the dimensions of a search. Raises UserError for one that is not understood, or named twice."""
    pairs = list(search.items()) if isinstance(search, Mapping) else _pairs(search)
    if not pairs:
        raise UserError(f"--search names no key; write KEY=VALUES with {FORMS}")
    found = [_dimension(key.replace("__", "."), value) for key, value in pairs]
    if twice := next((one.key for one in found if sum(one.key == other.key for other in found) > 1), None):
        raise UserError(f"--search names {twice} twice")
    return found


def check(config: Config, dimensions: Sequence[Dimension]) -> None:
    """Raise UserError for keys or values that the configuration refuses, all of them together."""
    problems = []
    for one in dimensions:
        if one.key == "output_dir":
            raise UserError("--search output_dir: each trial has a folder of its own")
        for value in one.ends:
            try:
                settings_of(config, {one.key: value}, note=lambda text: None)
            except UserError as error:
                found = " ".join(str(error).split()).removeprefix(f"argument {one.key}: ").removeprefix(f"{one.key}: ")
                problems.append(f"{one.key}={value}: {found}")
                break
    if problems:
        raise UserError(join_problems(problems, "--search"))


def _pairs(text: str) -> list[tuple[str, str]]:
    text, found, at = text.strip(), [], 0
    while at < len(text):
        match = _PART.match(text, at)
        if not match:
            raise UserError(f"--search: cannot read {text[at:]!r}; expected KEY=VALUES with {FORMS}, separated by spaces")
        found.append((match["key"], match["value"]))
        at = match.end()
    return found


def _dimension(key: str, value: Any) -> Dimension:
    if isinstance(value, list | tuple):
        return _choices(key, list(value))
    text = str(value).strip()
    if text.startswith("[") and text.endswith("]"):
        return _choices(key, [resolve_plain(one.strip()) for one in text[1:-1].split(",") if one.strip()])
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if not match:
        raise UserError(f"--search {key}={value}: expected {FORMS}")
    try:
        low, high = float(match["low"]), float(match["high"])
    except ValueError:
        raise UserError(f"--search {key}={value}: the ends of a range are numbers") from None
    whole = match["kind"] in ("int", "logint")
    if not low < high or (match["kind"].startswith("log") and low <= 0) or (whole and (low % 1 or high % 1)):
        what = "whole numbers, " if whole else ""
        above = ", above 0 on a logarithmic scale" if match["kind"].startswith("log") else ""
        raise UserError(f"--search {key}={value}: expected {what}the smaller one first{above}")
    return Dimension(key, match["kind"], low, high)


def _choices(key: str, values: list[Any]) -> Dimension:
    if len(values) < 2 or any(isinstance(value, list | dict) for value in values):
        raise UserError(f"--search {key}={values}: expected at least two single values, such as [8,16,32]")
    return Dimension(key, "choice", choices=tuple(values))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
