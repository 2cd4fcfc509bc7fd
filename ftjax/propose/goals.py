"""Goals of a fine-tuning: which data shows which goal, and what a goal asks of the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftjax.data.advice import Column
from ftjax.errors import UserError
from ftjax.propose.seen import Seen, is_json, look

CODE = ("test", "entry_point", "canonical_solution")  # columns of sets of programs


@dataclass(frozen=True)
class Goal:
    """A goal.

    Attributes:
        purpose: in words.
        formats: formats of data that it takes.
        task: of `evaluate.task`; None for the objective's own.
    """

    purpose: str
    formats: tuple[str, ...]
    task: str | None = None


ANSWERS = ("messages", "conversations", "prompt_completion", "instruction", "question_answer", "document_summary")
PAIRS = ("preference", "unpaired_preference", "unpaired_messages")
GOALS = {
    "chat": Goal("follow instructions and converse", (*ANSWERS, "text_label", "input_ids")),
    "classify": Goal("name the class of a text", ("text_label",)),
    "summarise": Goal("summarise documents", ANSWERS, "rouge"),
    "code": Goal("write programs", ANSWERS, "code"),
    "qa": Goal("answer questions", ANSWERS, "f1"),
    "extract": Goal("turn text into JSON", ANSWERS, "json_match"),
    "preference": Goal("prefer better answers", PAIRS),
    "reward": Goal("score answers: a reward model", ("preference",)),
    "text": Goal("continue texts of this kind", ("text", "input_ids")),
}


def goal_of(seen: Seen) -> tuple[str, str]:
    """Return the goal that the data shows, and why."""
    form = seen.format
    if form in PAIRS:
        return "preference", "the rows compare answers"
    if form == "text_label":
        return "classify", "each text has a label"
    if form in ("text", "input_ids"):
        return "text", "the rows are texts without an answer" if form == "text" else "the rows are token ids"
    if form == "document_summary":
        return "summarise", "the rows are documents and summaries"
    if form == "question_answer":
        return "qa", "the rows are questions and answers"
    if form == "prompt_completion" and any(name in seen.first[0].values for name in CODE):
        return "code", "the rows have programs and tests"
    answers = seen.values("completion") or seen.values("output")
    if answers and sum(map(is_json, answers)) >= 0.9 * len(answers):
        return "extract", "the answers are JSON"
    return "chat", "the rows are conversations" if form in ("messages", "conversations") else "the rows are prompts and answers"


def with_goal(seen: Seen, goal: str) -> Seen:
    """Return the data as the goal reads it. Raises UserError if it does not fit."""
    wanted = GOALS[goal]
    if goal == "classify" and seen.format == "prompt_completion" and Column("", seen.values("completion")).repeats:
        names = {ours: seen.columns.get(theirs, theirs) for ours, theirs in (("text", "prompt"), ("label", "completion"))}
        return look(seen.path, names)
    if seen.format not in wanted.formats:
        fitting = ", ".join(name for name, one in GOALS.items() if seen.format in one.formats)
        raise UserError(
            f"--goal {goal} takes data of the formats {', '.join(wanted.formats)}, and {seen.path} has {seen.format}; "
            f"leave --goal out, or choose one of {fitting or 'none'}"
        )
    return seen


def settings(seen: Seen, goal: str) -> dict[str, tuple[Any, str]]:
    """Return the settings of objective and evaluation by key, each with its reason."""
    found: dict[str, tuple[Any, str]] = {}
    if goal == "classify":
        found |= _classes(seen)
    elif goal == "reward":
        found["objective.name"] = ("reward", "a score for each answer; chosen ones above rejected ones")
    elif goal == "preference" and seen.format == "preference":
        found["objective.name"] = ("dpo", "pairs of a better and a worse answer; docs/preference.md has the others")
        found["objective.beta"] = (0.1, "higher: stays closer to the model before training")
    elif goal == "preference":
        found["objective.name"] = ("kto", "single answers that are wanted or not")
        found["objective.beta"] = (0.1, "higher: stays closer to the model before training")
    else:
        found["objective.name"] = ("sft", "next-token training on the answers" if goal != "text" else "next-token training")
    task, why = _task(seen, goal)
    if task is not None and "test" in seen.beside:
        found["evaluate.task"] = (task, why)
        found["evaluate.data"] = (seen.beside["test"], "found beside the training data; for ftjax evaluate --compare-base")
    return found


def _classes(seen: Seen) -> Mapping[str, tuple[Any, str]]:
    labels = seen.values("label")
    if any(isinstance(value, list | tuple) for value in labels):
        numbers = all(isinstance(one, float) for value in labels for one in value)
        kind = "regression" if numbers else "multi_label_classification"
        return {
            "objective.name": ("classification", "each text has several labels"),
            "objective.problem_type": (kind, "a row's label is a list"),
        }
    if all(isinstance(value, float) for value in labels) and any(value % 1 for value in labels):
        return {
            "objective.name": ("classification", "each text has a number"),
            "objective.problem_type": ("regression", "the labels are numbers with a fraction"),
        }
    distinct = sorted(set(map(str, labels)))
    shown = f"{', '.join(distinct[:6])}{', ...' if len(distinct) > 6 else ''}"
    return {
        "objective.name": ("classification", f"{len(distinct)} classes in the first {len(labels):,} rows: {shown}"),
        "objective.head": (False, "train the words of the class as the answer: the result is an ordinary causal LM"),
    }


def _task(seen: Seen, goal: str) -> tuple[str | None, str]:
    if goal == "qa" and (answers := seen.values("answer")) and all("####" in str(answer) for answer in answers):
        return "numeric_answer", "the answers end with `#### number`"
    if goal == "code" and not seen.has("test"):
        return None, ""
    return GOALS[goal].task, f"usual for: {GOALS[goal].purpose}"
