"""Preferences: splits `chosen` and `rejected` into prompt and answers.

As in TRL, the common beginning is the prompt if none is given, and a prompt that both answers repeat is removed from them.
"""

import re
from collections.abc import Mapping
from typing import Any

from ftjax.data.translate import translated
from ftjax.data.values import EmptyRow, by_row, kind_of
from ftjax.errors import UserError

SPACELESS = 0x2E80  # scripts from here on have no spaces between words
# Anthropic's transcripts: "\n\nHuman: Hi\n\nAssistant: Hello"
SPEAKERS = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
SPOKEN = {"Human": "user", "Assistant": "assistant"}


def split_preference(prompt: Any, chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """Return `(prompt, chosen, rejected)`; the last two are answers alone: text, or messages that follow the prompt's.

    Raises EmptyRow if nothing is left of an answer, and UserError if there is no prompt.
    """
    chosen, rejected, prompt = (by_row(value) for value in (chosen, rejected, prompt))
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer is None or answer == [] or (isinstance(answer, str) and not answer.strip()):
            raise EmptyRow(f"{where}: {name!r} is empty, so there is nothing to compare in this row; fill or remove it")
        if not isinstance(answer, list | str):
            raise UserError(f"{where}: {name!r} is {kind_of(answer)}, expected an answer as text or messages")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise UserError(f"{where}: 'chosen' is {kind_of(chosen)} and 'rejected' {kind_of(rejected)}; expected both alike")
    if isinstance(chosen, list):
        return _of_messages(prompt, chosen, rejected, where)
    if prompt is None or prompt == "":
        return _of_texts(chosen, rejected, where)
    if isinstance(prompt, str) and len(prompt.split()) > 1 and all(text.startswith(prompt) for text in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if not chosen.strip() or not rejected.strip():
            raise EmptyRow(f"{where}: 'chosen' and 'rejected' repeat the prompt, and nothing follows it in one of them")
    return prompt, chosen, rejected


def without_prompt(prompt: Any, answer: list[Any], where: str) -> tuple[Any, list[Any]]:
    """Return the prompt and the messages that follow it, for an answer that may repeat the prompt's messages.

    Raises UserError if the answer begins with a question that is not the prompt.
    """
    turns = [_said(turn, where) for turn in answer]
    if not turns or turns[0][0] == "assistant":
        return prompt, answer
    asked = [_said(turn, where) for turn in prompt] if isinstance(prompt, list) else [("user", prompt)]
    for start in range(len(turns) - len(asked)):  # a system message or earlier turns may come first
        if turns[start : start + len(asked)] == asked and turns[start + len(asked)][0] == "assistant":
            stop = start + len(asked)
            return answer[:stop], answer[stop:]
    raise UserError(
        f"{where}: the answer begins with a message of role {turns[0][0]} that is not the prompt's; give the answer's messages "
        "alone, or the whole conversation without a prompt"
    )


def _of_messages(prompt: Any, chosen: list[Any], rejected: list[Any], where: str) -> tuple[Any, list[Any], list[Any]]:
    if prompt:
        before, after = without_prompt(prompt, chosen, where)
        return before, after, without_prompt(prompt, rejected, where)[1]
    same = 0
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)  # the last message is the answer, even if both are equal
    for one, other in pairs:
        if _said(one, where) != _said(other, where):
            break
        same += 1
    if not same:
        raise UserError(f"{where}: there is no prompt: 'chosen' and 'rejected' have no message in common before their answers")
    return chosen[:same], chosen[same:], rejected[same:]


def _of_texts(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Split the texts where they differ, at the beginning of that word."""
    pairs = zip(chosen, rejected, strict=False)
    same = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    if chosen[same : same + 1].isalnum() or rejected[same : same + 1].isalnum():
        while same and chosen[same - 1].isalnum() and ord(chosen[same - 1]) < SPACELESS:
            same -= 1
    while same and chosen[same - 1] == " ":
        same -= 1
    if not chosen[:same].strip():
        raise UserError(
            f"{where}: there is no prompt: name its column, or give texts of which the common beginning is the prompt"
        )
    if not chosen[same:].strip() or not rejected[same:].strip():
        raise EmptyRow(f"{where}: nothing is left of an answer without the beginning that 'chosen' and 'rejected' share")
    return chosen[:same], chosen[same:], rejected[same:]


# messages of a transcript, and the offset of the answer in its text
Transcript = tuple[list[dict[str, str]], int]


def transcripts(chosen: Any, rejected: Any) -> tuple[int, Transcript, Transcript] | None:
    """Return `(number of prompt messages, chosen, rejected)` for two of Anthropic's transcripts with a common beginning; None
    for anything else."""
    one, other = (_transcript(text) if isinstance(text, str) else [] for text in (chosen, rejected))
    same = 0
    for (turn, _), (its, _) in zip(one[:-1], other[:-1], strict=False):
        if turn != its:
            break
        same += 1
    chosen, rejected = (([turn for turn, _ in turns], turns[same][1] if same else 0) for turns in (one, other))
    return (same, chosen, rejected) if same else None


def _transcript(text: str) -> list[tuple[dict[str, str], int]]:
    """Return a transcript's messages, each with the offset of its content; [] for other text."""
    marks = list(SPEAKERS.finditer(text))
    if not marks or marks[0].start() or marks[-1][1] != "Assistant":
        return []
    stops = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        ({"role": SPOKEN[mark[1]], "content": text[mark.end() : stop].strip()}, mark.end())
        for mark, stop in zip(marks, stops, strict=True)
    ]


def _said(turn: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: expected messages with role and content; found {turn!r:.80}")
    turn = translated(turn, where)
    return turn.get("role"), turn.get("content")
