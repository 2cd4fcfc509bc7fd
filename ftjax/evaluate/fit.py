"""Checks that a metric suits the references: otherwise its number means nothing."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.evaluate.rows import Item
from ftjax.objectives import head_of

TEXTS = "exact_match, f1, rouge, chrf and bleu compare texts, loss needs no choice"
LONG_LABEL = 60  # characters; a class has a name, not a paragraph
FEW = 10  # rows; with fewer, each may have a class of its own
WORDS = 20  # an answer this long is hardly ever word for word the reference
GRAM = 4  # n-gram length of BLEU


def check_labels(labels: Sequence[str]) -> list[str]:
    """Return warnings about the answers of the rows as classes.

    With free text each answer is a class of its own, and the right one is always among the candidates, and so by far the
    likeliest.
    Raises UserError if the answers are clearly free text.
    """
    counts = Counter(labels)
    alone = sum(count == 1 for count in counts.values())
    longest = max(counts, key=len)
    if len(longest) > LONG_LABEL or "\n" in longest:
        _refuse(f"such as {longest[:LONG_LABEL]!r}...")
    if len(counts) > 2 and 2 * alone > len(labels):
        said = f"{alone:,} of {len(labels):,} rows have an answer that no other row has"
        if len(labels) >= FEW:
            _refuse(said)
        return [f"evaluate.task classification: {said}; if these are not classes, choose another task ({TEXTS})"]
    return []


def _refuse(what: str) -> None:
    raise UserError(
        f"evaluate.task classification: the answers are texts, not classes: {what}. Choose another task ({TEXTS}), or name the "
        "classes in evaluate.labels"
    )


def named_classes(config: Config) -> Sequence[str] | None:
    """Return the classes that a configuration names; None if it names none."""
    head = head_of(config)
    return (head and head.classes) or config.evaluate.labels


def misfits(task: str, items: Sequence[Item], labels: Sequence[str] | None) -> list[str]:
    """Return warnings about results that are hard to interpret. Raises UserError if they would mean nothing.

    Args:
        labels: the classes, if they are named.
    """
    if task == "classification":
        return check_labels([item.label for item in items]) if labels is None else []
    if task not in ("exact_match", "bleu"):
        return []
    words = [max(len(reference.split()) for reference in item.references) for item in items]
    if task == "exact_match" and median(words) > WORDS:
        return [
            f"evaluate.task exact_match: half of the references have {median(words):g} words or more, which hardly any "
            "answer has word for word; rouge, chrf and loss compare texts"
        ]
    if task == "bleu" and median(words) < GRAM:
        return [
            f"evaluate.task bleu: it counts runs of {GRAM} words, and half of the references have {median(words):g} or fewer; "
            "exact_match, f1 and chrf fit short answers"
        ]
    return []
