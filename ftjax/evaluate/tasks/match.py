"""Tasks that compare an answer with its references: exact_match, f1, numeric_answer, json_match."""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from ftjax.config import EvaluateConfig
from ftjax.errors import UserError
from ftjax.evaluate.rows import Item
from ftjax.evaluate.statistic import Scores, means

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
MARKED = re.compile(r"####\s*(-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))")


def normalized(text: str) -> str:
    """Normalize as SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250): lower case, no punctuation or articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(items: Sequence[Item], answers: Sequence[str], config: EvaluateConfig) -> Scores:
    """Score whether the answer is one of the references."""
    same = normalized if config.normalize else str.strip
    return means([
        {"exact_match": float(any(same(answer) == same(one) for one in item.references))}
        for item, answer in zip(items, answers, strict=True)
    ])  # fmt: skip


def f1(items: Sequence[Item], answers: Sequence[str], config: EvaluateConfig) -> Scores:
    """Score SQuAD's F1 of words and its exact match, the best over the references."""
    return means([
        {
            "f1": max(word_f1(answer, one) for one in item.references),
            "exact_match": float(any(normalized(answer) == normalized(one) for one in item.references)),
        }
        for item, answer in zip(items, answers, strict=True)
    ])  # fmt: skip


def word_f1(answer: str, reference: str) -> float:
    """Return SQuAD 2.0's F1: if one of the two is empty, 1 if both are."""
    said, wanted = normalized(answer).split(), normalized(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def numeric_answer(items: Sequence[Item], answers: Sequence[str], config: EvaluateConfig) -> Scores:
    """Score GSM8K (Cobbe et al. 2021, arXiv:2110.14168): the number after `####`, or else the last one of the answer.

    `numeric_answer_strict` counts only the number after `####`.
    """
    found = []
    for item, answer in zip(items, answers, strict=True):
        wanted = {number(one) for one in item.references}
        if None in wanted:
            raise UserError(f"{item.where}: numeric_answer: the reference holds no number; found {item.references[0][-60:]!r}")
        marked = MARKED.findall(answer)
        strict = _decimal(marked[0]) if marked else None
        found.append({"numeric_answer": float(number(answer) in wanted), "numeric_answer_strict": float(strict in wanted)})
    return means(found)


def number(text: str) -> Decimal | None:
    """Return the number that a text ends in; None if there is none."""
    found = MARKED.findall(text)[:1] or NUMBER.findall(text)[-1:]
    return _decimal(found[0]) if found else None


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def json_match(items: Sequence[Item], answers: Sequence[str], config: EvaluateConfig) -> Scores:
    """Score JSON objects, field by field.

    `json_valid`: the answer has an object. `json_match`: it equals the reference, with all fields and no others (with
    `evaluate.fields`: those fields). `json_fields`: share of the reference's fields that are right; `field/NAME`: each of them.
    """
    found = []
    for item, answer in zip(items, answers, strict=True):
        wanted, said = _objects(item), find_object(answer)
        best = max((_compared(said, one, config.fields) for one in wanted), key=lambda row: row["json_fields"])
        found.append({"json_valid": float(said is not None), **best})
    return means(found)


def _objects(item: Item) -> list[dict[str, Any]]:
    wanted = [find_object(text) for text in item.references]
    if None in wanted or not wanted:
        raise UserError(f"{item.where}: json_match: the reference is no JSON object; found {item.references[0][:60]!r}")
    return wanted


def _compared(said: dict | None, wanted: dict, fields: Sequence[str] | None) -> dict[str, float]:
    names = list(wanted) if fields is None else [name for name in fields if name in wanted]
    right = {f"field/{name}": float(said is not None and name in said and _equal(said[name], wanted[name])) for name in names}
    whole = all(right.values()) and said is not None
    if fields is None:
        whole = whole and set(said) == set(wanted)
    return {"json_match": float(whole), "json_fields": sum(right.values()) / len(right) if right else float(whole), **right}


def _equal(one: Any, other: Any) -> bool:
    """Compare JSON values; `true` is not 1, though Python says so."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return set(one) == set(other) and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def find_object(text: str) -> dict[str, Any] | None:
    """Return the first JSON object of a text; words or a code fence may surround it."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value = decoder.raw_decode(text, at)[0]
        except (json.JSONDecodeError, RecursionError):
            value = None
        if isinstance(value, dict):
            return value
        at = text.find("{", at + 1)
    return None
