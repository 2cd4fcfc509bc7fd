"""What changes in a model's answers if one word about a person changes: refusals, sentiment, length, and what it finds likely.

Each set of prompts differs in that word alone. A group's value is the mean over its words, and the gap of a set is the largest
difference between two groups. Gaps are above zero by chance, too, so they are compared with those of the base model on the
same sets, set by set (`ftjax.evaluate.statistic.compare`); and within one model, the test of Friedman (1937) asks over all sets
of an axis whether a group is always ahead. After the pairs of Huang et al. 2020 (arXiv:1911.03064) and of CrowS-Pairs
(Nangia et al. 2020, arXiv:2010.00133).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftjax.config.data import SourceConfig
from ftjax.data.read import read_rows
from ftjax.errors import UserError
from ftjax.evaluate.check.refusal import refuses
from ftjax.evaluate.check.words import BLAME, ENDINGS, PERSONS, PRAISE, QUESTIONS
from ftjax.evaluate.statistic import Scores, means
from ftjax.generate.session import Generator

BUILT_IN = "built_in"
# Values of an answer; a gap in tokens counts as a share of the longest group's.
KINDS = ("refused", "sentiment", "length", "likelihood")
COLUMNS = ("set", "group", "prompt")


@dataclass(frozen=True)
class Varied:
    """One prompt of a set.

    Attributes:
        axis: what differs, such as `religion`; set: the prompts that differ in it alone.
        endings: an ending that is a slight, and a neutral one, whose likelihoods are compared; None: the prompt is answered.
    """

    axis: str
    set: str
    group: str
    text: str
    endings: tuple[str, str] | None = None


@dataclass
class Measured:
    """Results of one model. Attributes: values: of each prompt, by kind; answers: None where endings were compared."""

    values: list[dict[str, float]] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)


def gather(source: str) -> tuple[Varied, ...]:
    """Return the prompts of a file, or those built in. Raises UserError, with file and line, for rows that are wrong."""
    return _built_in() if source == BUILT_IN else _of_file(source)


def _built_in() -> tuple[Varied, ...]:
    found = []
    for axis, groups in PERSONS.items():
        for number, (text, endings) in enumerate(
            [*((one, None) for one in QUESTIONS), *((t, (a, b)) for t, a, b in ENDINGS)], 1
        ):
            for group, words in groups.items():
                found += [Varied(axis, f"{axis} {number}", group, _filled(text, word), endings) for word in words]
    return tuple(found)


def _filled(text: str, person: str) -> str:
    filled = text.replace("{person}", person)
    return filled[0].upper() + filled[1:]


def _of_file(path: str) -> tuple[Varied, ...]:
    found = []
    for row in read_rows(SourceConfig(path=path, split="test")):
        values = {name: str(value).strip() for name, value in row.values.items() if value is not None}
        if missing := [name for name in COLUMNS if not values.get(name)]:
            raise UserError(
                f"{row.where}: expected texts in the columns {', '.join(COLUMNS)}; {', '.join(missing)} is missing "
                f"(there are {', '.join(map(str, row.values))})"
            )
        endings = values.get("stereotyped"), values.get("neutral")
        if any(endings) and not all(endings):
            raise UserError(f"{row.where}: stereotyped and neutral are two endings of the same prompt; give both or neither")
        pair = (endings[0], endings[1]) if endings[0] and endings[1] else None
        axis = values.get("axis") or "all"
        found.append(Varied(axis, f"{axis} {values['set']}", values["group"], values["prompt"], pair))
    for name, sets in _grouped(found).items():
        if len(sets) < 2:
            raise UserError(f"{path}: the set {name[1]!r} has one group; prompts of at least two groups can be compared")
    return tuple(found)


def measure(
    generator: Generator, varied: Sequence[Varied], *, max_new_tokens: int, batch_size: int, tell: Callable[[str], None]
) -> Measured:
    """Answer the prompts and compare the endings."""
    asked = [n for n, one in enumerate(varied) if one.endings is None]
    found = Measured([{} for _ in varied], [None] * len(varied))
    answers = generator.generate(
        [varied[n].text for n in asked], max_new_tokens=max_new_tokens, batch_size=batch_size,
        progress=lambda done, tokens: tell(f"counterfactual prompts: {done} of {len(asked)}"),
    )  # fmt: skip
    for n, answer in zip(asked, answers, strict=True):
        found.answers[n] = answer.text
        found.values[n] = {
            "refused": float(refuses(answer.text)), "sentiment": sentiment(answer.text), "length": float(len(answer.tokens)),
        }  # fmt: skip
    ended = [n for n, one in enumerate(varied) if one.endings is not None]
    tell(f"endings of {len(ended)} sentences")
    scores = generator.score(
        [varied[n].text for n in ended for _ in range(2)], [text for n in ended for text in varied[n].endings or ()],
        batch_size=batch_size,
    )  # fmt: skip
    each = [float(np.mean(one.logprobs)) for one in scores]
    for n, slight, neutral in zip(ended, each[::2], each[1::2], strict=True):
        found.values[n] = {"likelihood": slight - neutral}
    return found


def sentiment(text: str) -> float:
    """Return the share of praise minus that of blame among the words of a text that are either; 0 without any."""
    words = re.findall(r"[a-z]+", text.lower())
    good, bad = sum(word in PRAISE for word in words), sum(word in BLAME for word in words)
    return (good - bad) / (good + bad) if good + bad else 0.0


def gaps(varied: Sequence[Varied], found: Measured) -> Scores:
    """Return the mean gaps over all sets, by `bias_KIND`."""
    rows = []
    for sets in _grouped(varied).values():
        row = {}
        for kind in KINDS:
            values = _means(sets, found, kind)
            if len(values) > 1:
                gap = max(values.values()) - min(values.values())
                row[f"bias_{kind}"] = gap / max(max(values.values()), 1.0) if kind == "length" else gap
        rows.append(row)
    return means(rows, shares=False)


def by_axis(varied: Sequence[Varied], found: Measured) -> dict[str, dict[str, Any]]:
    """Return of each axis and kind: the mean of each group, the number of sets, and the p-value of Friedman's test.

    The p-value is None with fewer than three groups or sets, or if nothing differs.
    """
    tables: dict[str, dict[str, list[dict[str, float]]]] = {}
    for (axis, _), sets in _grouped(varied).items():
        for kind in KINDS:
            if values := _means(sets, found, kind):
                tables.setdefault(axis, {}).setdefault(kind, []).append(values)
    return {axis: {kind: _summary(rows) for kind, rows in kinds.items()} for axis, kinds in tables.items()}


def _summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    groups = list(dict.fromkeys(group for row in rows for group in row))
    whole = np.array([[row[group] for group in groups] for row in rows if len(row) == len(groups)]).reshape(-1, len(groups))
    averages = {group: float(np.mean([row[group] for row in rows if group in row])) for group in groups}
    return {"groups": averages, "sets": len(rows), "p_value": _friedman(whole)}


def _friedman(table: np.ndarray) -> float | None:
    """Return the p-value of whether columns differ over the rows; with two columns, that of Wilcoxon's signed ranks."""
    from scipy import stats

    if len(table) < 3 or table.shape[1] < 2 or np.ptp(table, axis=1).max() == 0:
        return None
    if table.shape[1] == 2:
        return float(stats.wilcoxon(table[:, 0], table[:, 1], zero_method="zsplit").pvalue)
    return float(stats.friedmanchisquare(*table.T).pvalue)


def _grouped(varied: Sequence[Varied]) -> dict[tuple[str, str], dict[str, list[int]]]:
    """Return the numbers of the prompts by `(axis, set)` and group."""
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for number, one in enumerate(varied):
        found.setdefault((one.axis, one.set), {}).setdefault(one.group, []).append(number)
    return found


def _means(sets: Mapping[str, Sequence[int]], found: Measured, kind: str) -> dict[str, float]:
    """Return the mean of each group of a set; {} if it has no value of this kind."""
    values = {group: [found.values[n][kind] for n in numbers if kind in found.values[n]] for group, numbers in sets.items()}
    return {group: float(np.mean(each)) for group, each in values.items() if each}
