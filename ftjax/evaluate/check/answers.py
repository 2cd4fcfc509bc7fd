"""Faults of an answer, whatever it says: it is empty, repeats itself, does not end, or is in another language."""

from collections.abc import Callable, Sequence
from typing import Any

from ftjax.evaluate.check.material import Asked
from ftjax.evaluate.check.refusal import refuses
from ftjax.evaluate.statistic import Scores, means
from ftjax.generate.answer import Generation

TIMES, SPAN = 3, 16  # a part that repeats so often at the end of an answer, over so many tokens, is repetition
GRAM, VARIETY = 4, 0.5  # and so is a share of distinct n-grams below this
LETTERS = 20  # letters that a text must have for its language to be detected
SURE = 0.9  # lowest probability at which a language counts as detected


def repeats(tokens: Sequence[int]) -> bool:
    """Return whether a part repeats `TIMES` times at the end, over at least `SPAN` tokens, or few n-grams are distinct.

    It does in `a b c c c c c ...` and `the cat sat the cat sat ...`, but not in a list whose items begin alike.
    """
    size = len(tokens)
    if size < SPAN:
        return False
    for period in range(1, size // TIMES + 1):
        same = 0
        while same + period < size and tokens[size - 1 - same] == tokens[size - 1 - same - period]:
            same += 1
        if same + period >= max(SPAN, TIMES * period):
            return True
    grams = [tuple(tokens[at : at + GRAM]) for at in range(size - GRAM + 1)]
    return len(set(grams)) < VARIETY * len(grams)


def languages() -> Callable[[str], str | None]:
    """Build `language(text)`, which returns an ISO 639 code, or None if the text is too short or its language is not clear.

    Raises ImportError if py3langid is not installed.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=SURE)

    def language(text: str) -> str | None:
        if sum(map(str.isalpha, text)) < LETTERS:
            return None
        code = str(identifier.classify(text)[0])
        return None if code in ("und", "zxx") else code

    return language


def judge(
    asked: Sequence[Asked], answers: Sequence[Generation], language: Callable[[str], str | None] | None
) -> list[dict[str, Any]]:
    """Return for each answer which properties it has (1) or lacks (0); a property that does not apply is left out."""
    found = []
    for one, answer in zip(asked, answers, strict=True):
        empty = not answer.text.strip()
        row = {"empty": empty, "repeating": repeats(answer.tokens), "cut_off": answer.finish_reason == "length"}
        if one.label is not None:
            row[f"{one.label}_refused"] = refuses(answer.text)
        if language is not None:
            wanted, given = one.language or language(one.text), language(answer.text)
            if wanted and given:
                row["wrong_language"] = wanted != given
        found.append({name: float(value) for name, value in row.items()})
    return found


def shares(judged: Sequence[dict[str, float]]) -> dict[str, Scores]:
    """Return the share of answers with each property, among those that it applies to."""
    names = dict.fromkeys(name for row in judged for name in row)
    return {name: means([{name: row[name]} if name in row else {} for row in judged]) for name in names}
