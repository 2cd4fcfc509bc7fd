"""Small data sets of every kind that ftjax trains on, with the names and the columns of the real ones for which they stand."""

import csv
import json
import random
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from story_text import WORDS, write_story

Row = dict[str, Any]
ROWS = {"train": 400, "validation": 40, "test": 40}
FUNCTION = '''

def add_{number}(x):
    """
    Write a function to add {number} to a number.
    >>> add_{number}({one})
    {sum}
    """
'''
CHECK = """

METADATA = {{}}


def check(candidate):
    assert candidate({one}) == {sum}

"""

# Each row has a number of its own, so that no two rows are the same.


def instruction(rng: random.Random, number: int) -> Row:
    words = " ".join(write_story(rng) for _ in range(3)).split()
    story = " ".join(words[: rng.randint(10, len(words))])
    asked = rng.choice(("Who is this story about?", "Write the story again.", "What happened — and where?"))
    return {"instruction": f"{asked} ({number})", "input": rng.choice(("", story)), "output": story}


def conversation(rng: random.Random, number: int) -> Row:
    return {"tree": f"tree-{number}", "messages": talk(rng, rng.choice((2, 4)))}


def function(rng: random.Random, number: int) -> Row:
    one = rng.randint(0, 99)
    numbers = {"number": number, "one": one, "sum": one + number}
    body = rng.choice(("    return x + {number}", "  \n    y = {number}\n    return (x + y) ", "\treturn x + {number} "))
    return {
        "task_id": f"ADD/{number}", "prompt": FUNCTION.format(**numbers), "completion": body.format(**numbers),
        "entry_point": f"add_{number}", "test": CHECK.format(**numbers),
    }  # fmt: skip


def preference(rng: random.Random, number: int) -> Row:
    asked = talk(rng, rng.choice((1, 3)))
    return {"tree": f"tree-{number}", "prompt": asked, "chosen": write_story(rng), "rejected": f"No. ({number})"}


def problem(rng: random.Random, number: int) -> Row:
    one, two, own = rng.randint(2, 90), rng.randint(2, 90), f"{rng.choice(WORDS['thing'])}s"
    asked = f"Lily has {one} {own} on day {number} and gets {two} more.  How many {own} has she then?"
    return {"question": asked, "answer": f"She has {one}+{two}=<<{one}+{two}={one + two}>>{one + two} {own}.\n#### {one + two}"}


def request(rng: random.Random, number: int) -> Row:
    verb, label = rng.choice((("draw", "safe"), ("steal", "unsafe")))
    return {"prompt": f"How do I {verb} the {thing(rng)} number {number}?", "label": label, "type": "things", "source": "made"}


def review(rng: random.Random, number: int) -> Row:
    word, label = rng.choice((("glad", "positive"), ("sad", "negative")))
    return {"text": f'the {thing(rng)} , "number {number}" , made me {word} .', "label": label}


def paper(rng: random.Random, number: int) -> Row:
    stories = [write_story(rng) for _ in range(rng.randint(2, 6))]
    summaries = [story.split(".")[0] for story in stories]
    return {"paper_id": f"paper-{number}", "document": " ".join(stories), "summary": summaries[0], "references": summaries}


def talk(rng: random.Random, turns: int) -> list[Row]:
    return [{"role": ("user", "assistant")[turn % 2], "content": beginning(rng)} for turn in range(turns)]


def beginning(rng: random.Random) -> str:
    """A story's first sentences, or all of it: conversations are short and long, so that some rows hold several."""
    sentences = re.split(r"(?<=[.?]) ", write_story(rng))
    return " ".join(sentences[: rng.randint(1, len(sentences))])


def thing(rng: random.Random) -> str:
    return f"{rng.choice(WORDS['adjective'])} {rng.choice(WORDS['thing'])}"


SETS: dict[str, Callable[[random.Random, int], Row]] = {
    "chat_instruct": instruction,
    "chat_messages": conversation,
    "code_completion": function,
    "preference_helpful": preference,
    "qa_math": problem,
    "safety_prompts": request,
    "sentiment_movie": review,
    "summarization_science": paper,
}
CSV = {"safety_prompts", "sentiment_movie"}


def write_sets(folder: Path) -> None:
    """Write `NAME/train.jsonl` (or .csv), `NAME/validation.jsonl` and `NAME/test.jsonl` of every set."""
    rng, numbers = random.Random(0), count(1)
    for name, make in SETS.items():
        (folder / name).mkdir()
        for split, size in ROWS.items():
            rows = [make(rng, next(numbers)) for _ in range(size)]
            path = folder / name / split
            if name in CSV:
                with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)
            else:
                lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
                path.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
