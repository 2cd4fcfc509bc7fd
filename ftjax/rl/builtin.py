"""Rewards that need no code: the metrics of `ftjax evaluate`, and checks of an answer's form."""

import importlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ftjax.config import EvaluateConfig
from ftjax.errors import UserError
from ftjax.evaluate.check.answers import languages
from ftjax.evaluate.measure import TEXT_TASKS
from ftjax.evaluate.sandbox import Limits, run_program
from ftjax.evaluate.tasks.code import program
from ftjax.evaluate.tasks.match import find_object
from ftjax.rl.judge import judge
from ftjax.rl.rollout import Function, Rollout

# metric that is a reward -> the task of `ftjax evaluate` that computes it
TASKS = {
    "exact_match": "exact_match", "f1": "f1", "numeric_answer": "numeric_answer", "numeric_answer_strict": "numeric_answer",
    "json_match": "json_match", "json_fields": "json_match", "bleu": "bleu", "chrf": "chrf",
    "rouge1": "rouge", "rouge2": "rouge", "rougeL": "rouge",
}  # fmt: skip


def task_reward(metric: str, options: dict[str, Any]) -> Function:
    """Return a reward that is a metric of `ftjax evaluate` against the row's own answer.

    Args:
        options: settings of `evaluate`, such as `normalize` or `fields`.
    """
    known = {"normalize", "fields", "rouge_stemmer"}
    if unknown := set(options) - known:
        raise UserError(f"objective.rewards: {metric} takes the options {', '.join(sorted(known))}, not {', '.join(unknown)}")
    task, config = TEXT_TASKS[TASKS[metric]], EvaluateConfig.model_validate(options)

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        scores = task([one.item for one in rollouts], [one.text for one in rollouts], config)
        return [float(row[metric]) for row in scores.each]

    return reward


def needs_reference(name: str) -> bool:
    """Return whether a reward compares with the row's own answer."""
    return name in TASKS


def json_valid() -> Function:
    """1 if the answer holds a JSON object, otherwise 0."""
    return _of_text(lambda text: float(find_object(text) is not None))


def _of_text(value: Callable[[str], float]) -> Function:
    return lambda rollouts: [value(one.text) for one in rollouts]


def regex(pattern: str, *, full: bool = False) -> Function:
    """1 if the pattern is found in the answer (`full`: if it is all of it), otherwise 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"objective.rewards: regex: {pattern!r} is not a regular expression: {error}") from None
    return _of_text(lambda text: float(bool(compiled.fullmatch(text) if full else compiled.search(text))))


def json_schema(schema: dict[str, Any] | str) -> Function:
    """1 if the answer holds a JSON object that fits the schema, otherwise 0. Args: schema: JSON, or a file with it."""
    try:
        module = importlib.import_module("jsonschema")
    except ImportError:
        raise UserError("objective.rewards: json_schema needs jsonschema; pip install 'ftjax[rewards]'") from None
    if isinstance(schema, str):
        try:
            with open(schema, encoding="utf-8") as file:
                schema = json.load(file)
        except (OSError, ValueError) as error:
            raise UserError(f"objective.rewards: json_schema: {schema}: {error}") from None
    try:
        module.validators.validator_for(schema).check_schema(schema)
    except module.SchemaError as error:
        raise UserError(f"objective.rewards: json_schema: it is not a JSON schema: {error.message}") from None
    validator = module.validators.validator_for(schema)(schema)

    def fits(text: str) -> float:
        found = find_object(text)
        return float(found is not None and validator.is_valid(found))

    return _of_text(fits)


def length(*, most: int | None = None, least: int = 0, scale: int | None = None) -> Function:
    """0 for an answer of `least` to `most` tokens, down to -1 for one that is `scale` tokens (default: `most`) beyond them."""
    if most is None and not least:
        raise UserError("objective.rewards: length: give most or least, the bounds in tokens")

    def value(rollout: Rollout) -> float:
        tokens = rollout.size
        beyond = max(0, least - tokens, 0 if most is None else tokens - most)
        return -min(1.0, beyond / (scale or most or least))

    return lambda rollouts: [value(one) for one in rollouts]


def language(code: str) -> Function:
    """1 if the answer is in this language (ISO 639-1), 0 if not, nothing if it is too short to tell."""
    try:
        language_of = languages()
    except ImportError:
        raise UserError("objective.rewards: language needs py3langid; pip install 'ftjax[rewards]'") from None

    def value(text: str) -> float | None:
        found = language_of(text)
        return None if found is None else float(found == code)

    return lambda rollouts: [value(one.text) for one in rollouts]


def code(*, timeout: float = 10.0, memory_mb: int = 1024, processes: int = 32) -> Function:
    """1 if the answer's program passes the row's `test`, as `evaluate.task: code` runs it, otherwise 0."""
    limits = Limits(timeout, memory_mb, processes)

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            outcomes = pool.map(lambda one: run_program(program(one.item, one.text), limits), rollouts)
            return [float(outcome == "passed") for outcome in outcomes]

    return reward


BUILTIN: dict[str, Callable[..., Function]] = {
    "regex": regex, "json_valid": json_valid, "json_schema": json_schema, "length": length, "language": language, "code": code,
    "judge": judge,
}  # fmt: skip
