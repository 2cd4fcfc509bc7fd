"""What can be wrong with an answer whatever it says: nothing in it, the same over and over, no end, another language."""

from collections.abc import Callable, Sequence
from typing import Any

from ftjax.evaluate.check.material import Asked
from ftjax.evaluate.check.refusal import refuses
from ftjax.evaluate.statistic import Scores, means
from ftjax.generate.answer import Generation

TIMES, SPAN = 3, 16  # at its end, an answer repeats itself where a part comes so often and fills so many tokens
GRAM, VARIETY = 4, 0.5  # and on the whole, where less than this share of its n-grams are new ones
LETTERS = 20  # of which a text must have so many before its language is asked
SURE = 0.9  # probability below which a language is not told


def repeats(tokens: Sequence[int]) -> bool:
    """Whether a part comes `TIMES` times in a row at the end, over `SPAN` tokens or more, or few n-grams are new.

    `a b c c c c c ...` and `the cat sat the cat sat ...` do; a list whose items begin alike does not.
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
    """`language(text)`: ISO 639 code, or None where the text is too short or not clearly in one language.

    Raises ImportError where py3langid is not installed.
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
    """Of each answer, what it is (1) and is not (0); a question that makes no sense for it is left out."""
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
    """Of each question, the share of the answers for which it makes sense."""
    names = dict.fromkeys(name for row in judged for name in row)
    return {name: means([{name: row[name]} if name in row else {} for row in judged]) for name in names}
