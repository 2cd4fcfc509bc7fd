"""The demo's data: what is committed is what the generator writes, and the splits share nothing that was asked."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "demo" / "data"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "scripts" / "make_demo_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def turns() -> dict[str, list[tuple[str, str]]]:
    """(message, answer) of every row of each split."""
    found = {}
    for split in SPLITS:
        rows = [json.loads(line)["messages"] for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
        assert all([turn["role"] for turn in row] == ["system", "user", "assistant"] for row in rows)
        found[split] = [(row[1]["content"], row[2]["content"]) for row in rows]
    return found


def test_committed_files_are_what_the_generator_writes(generator, tmp_path):
    generator.write(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


def test_nothing_of_validation_and_test_is_in_train(turns):
    answers = {split: [answer for _, answer in rows] for split, rows in turns.items()}
    messages = {split: {plain(message) for message, _ in rows} for split, rows in turns.items()}
    everything = [answer for split in SPLITS for answer in answers[split]]
    assert len(everything) == len(set(everything))
    assert not messages["train"] & (messages["validation"] | messages["test"])
    assert not messages["validation"] & messages["test"]
    assert len(turns["train"]) >= 400 and len(turns["validation"]) >= 50 and len(turns["test"]) >= 50


def plain(message: str) -> str:
    """The message without case, punctuation and line breaks, in which two fillings of one template could differ."""
    return re.sub(r"[^a-z0-9]+", " ", message.lower()).strip()


def test_new_items_and_names_are_in_test_only(generator, turns):
    train = " ".join(answer for _, answer in turns["train"])
    test = " ".join(answer for _, answer in turns["test"])
    for pool in (generator.NEW_ITEMS, generator.NEW_LAST):
        assert not any(word in train for word in pool)
        assert any(word in test for word in pool)


def test_every_answer_can_be_read_off_its_message(generator, turns):
    numbers = {word: number for number, word in enumerate(generator.NUMBERS, 1)}
    numbers |= {"a pair of": 2, "half a dozen": 6, "a dozen": 12, "a": 1, "an": 1, "my": 1}
    for message, answer in (row for rows in turns.values() for row in rows):
        form = json.loads(answer)
        assert list(form) == ["action", "item", "quantity", "color", "day", "name"]
        assert form["item"] in message and all(
            form[key].lower() in message.lower() for key in ("color", "day", "name") if form[key]
        )
        noun = f"{form['color']} {form['item']}" if form["color"] else form["item"]
        before = message[: message.index(noun)].split()
        candidates = [" ".join(before[-n:]).lower() for n in (3, 2, 1)]
        read = next(int(c) if c.isdigit() else numbers[c] for c in candidates if c in numbers or c.isdigit())
        assert read == form["quantity"], message


def test_closed_fields_are_used_evenly_enough(turns):
    """No field can be won by always answering the same."""
    forms = [json.loads(answer) for _, answer in turns["train"]]
    for key, most in (("action", 0.35), ("quantity", 0.5), ("color", 0.5), ("day", 0.5), ("item", 0.1), ("name", 0.25)):
        values = [form[key] for form in forms]
        assert max(map(values.count, set(values))) / len(values) < most, key
