"""Tests that `data.shuffle: false` keeps the order of the data, and that two rows are equal if the model sees the same of
them."""

import json

import numpy as np
import pytest
from data_sets import documents_in, load
from data_tokenizers import CHATML, byte_level
from rich.console import Console

from ftjax.config.data import DataConfig
from ftjax.data.clean import Duplicates, digest, held_out
from ftjax.data.pack import in_order
from ftjax.data.pipeline import load_splits
from ftjax.data.preview import preview, show_examples
from ftjax.data.shown import render
from ftjax.errors import UserError, printable


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_in_the_order_of_their_documents():
    assert in_order(np.array([5, 3, 3, 2]), 8).tolist() == [0, 2, 4]
    assert in_order(np.array([8, 1, 8]), 8).tolist() == [0, 1, 2, 3]
    assert in_order(np.array([], np.int64), 8).tolist() == [0]


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"streaming": True}])
def test_without_shuffling_epochs_keep_the_order(tmp_path, options):
    path = write(tmp_path / "a.jsonl", *({"text": f"row {n} " + "x y z " * (n % 5)} for n in range(40)))
    split = load(path, max_length=64, shuffle=False, **options)
    tokenizer = byte_level()
    for epochs in (1, 2):
        batches = split.batches(4, seed=3, shuffle=True, epochs=epochs)
        said = [tokenizer.decode(document) for batch in batches for document in documents_in(batch)]
        assert [int(text.split()[1]) for text in said] == list(range(40)) * epochs
    shuffled = load(path, max_length=64, **options).batches(4, seed=3, shuffle=True, epochs=1)
    said = [tokenizer.decode(document) for batch in shuffled for document in documents_in(batch)]
    assert [int(text.split()[1]) for text in said] != list(range(40))


CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
STYLED = "{% if style is defined %}[{{ style }}]{% endif %}" + CHATML


def test_what_the_template_is_given_makes_rows_unlike(tmp_path):
    rows = [{**CHAT, "chat_template_kwargs": {"style": style}} for style in ("long", "short", "short")]
    path = write(tmp_path / "a.jsonl", *rows)
    split = load(path, tokenizer=byte_level(STYLED), deduplicate="exact")
    assert split.report.kept == 2 and split.report.dropped == {"exact duplicates": 1}
    validation = write(tmp_path / "b.jsonl", {**CHAT, "chat_template_kwargs": {"style": "none"}})
    config = DataConfig(train=str(path), validation=str(validation), contamination="drop")
    assert load_splits(config, byte_level(STYLED), seed=0)[0].report.kept == 3


def test_a_flag_that_says_what_is_so_anyway_makes_no_difference(tmp_path):
    turn = {**CHAT["messages"][1], "train": True, "weight": 1}
    path = write(tmp_path / "a.jsonl", CHAT, {"messages": [CHAT["messages"][0], turn]})
    assert load(path, tokenizer=byte_level(CHATML), deduplicate="exact").report.kept == 1


@pytest.mark.parametrize(
    "text, other",
    [
        ("人工智能正在改变我们的生活方式它可以帮助医生更快地发现疾病也可以帮助学生更好地学习各种知识", ("医生", "大夫")),
        ("これはとても長い文章であり単語の間に空白がないので一つの単語と見なされてしまうことがあります", ("長い", "短い")),
        ("ปัญญาประดิษฐ์กำลังเปลี่ยนวิธีการใช้ชีวิตของเราและช่วยให้แพทย์ค้นพบโรคได้เร็วขึ้น", ("เร็ว", "ไว")),
    ],
)
def test_near_duplicates_of_scripts_without_spaces(text, other):
    near = Duplicates("near", 0.75)
    same = text.replace(*other)
    assert same != text
    assert [near.reason(one, digest(one)) for one in (text, same, text[::-1])] == [None, "near duplicates", None]


def test_an_unwanted_answer_is_dropped_and_said(tmp_path):
    rows = [{"prompt": f"q{n}", "completion": f"answer {n}", "label": n != 1} for n in range(3)]
    split = load(write(tmp_path / "a.jsonl", *rows))
    assert split.report.dropped == {"with label false": 1} and split.report.kept == 2
    assert any("1 rows have label false" in warning for warning in split.report.warnings)
    with pytest.raises(UserError, match=r"none of 1 examples is left: 1 with label false. Change the data"):
        load(write(tmp_path / "b.jsonl", rows[1]))


def test_a_number_of_rows_for_validation(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"row {n % 20}"} for n in range(25)))  # rows 0 to 4 occur twice
    for count in (1, 5, 24):
        train, validation = load_splits(DataConfig(train=str(path), validation_split=count), byte_level(), seed=0)
        assert validation.report.kept in (count, count - 1) and train.report.kept == 25 - validation.report.kept
    for count in (25, 30):
        with pytest.raises(UserError, match=f"validation_split asks for {count} rows of the 25 that are kept"):
            load_splits(DataConfig(train=str(path), validation_split=count), byte_level(), seed=0)


def test_rows_that_say_the_same_do_not_make_a_split_larger_than_it_was_meant():
    digests = np.array([7] * 50 + list(range(100, 150)), np.uint64)
    for seed in range(20):
        assert held_out(digests, 10, seed).sum() == 10


def test_a_source_whose_weight_gives_it_no_row_is_said(tmp_path):
    a, b = (write(tmp_path / f"{name}.jsonl", *({"text": f"{name} {n}"} for n in range(10))) for name in "ab")
    split = load([{"path": str(a), "weight": 0.01}, str(b)])
    assert any("a weight of 0.01 gives none of its 10 rows to the first epoch" in w for w in split.report.warnings)


HOSTILE = "\x1b[2J\x1b]0;title\x07 \x9b31m \x7f \x08 é 中"


def test_nothing_of_the_data_steers_the_terminal(tmp_path, capsys):
    from ftjax.config import Config

    path = write(tmp_path / "a.jsonl", {"text": HOSTILE, f"un{HOSTILE}used": "x"})
    config = Config(model={"path": "none"}, data={"train": str(path)}, output_dir=str(tmp_path / "out"))
    for terminal in (True, False):
        preview(config, byte_level(), console=Console(force_terminal=terminal, width=80, color_system=None))
    split = load(path)
    [[example]] = show_examples(split, byte_level())
    said = capsys.readouterr().out + render(example) + "".join(split.report.lines())
    broken = write(tmp_path / "b.jsonl", {f"a{HOSTILE}": HOSTILE})
    with pytest.raises(UserError) as caught:
        load(broken)
    for text in (said, str(caught.value)):
        assert not set(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) & set(text)
    assert "␛[2J" in said and "é 中" in said
    assert set(map(chr, [27, 7])) <= set("".join(example.texts))  # what a page or JSON shows is as it is
    assert printable("a\tb\nc") == "a\tb\nc"


def test_evaluation_leaves_unwanted_answers_out(tmp_path):
    from ftjax.config import Config
    from ftjax.evaluate.rows import read_items

    path = write(tmp_path / "a.jsonl", *({"prompt": f"q{n}", "completion": f"a{n}", "label": n != 1} for n in range(3)))
    config = Config(model={"path": "none"}, data={"train": str(path), "validation": str(path)}, output_dir="out")
    items, left_out = read_items(config)
    assert [item.references for item in items] == [("a0",), ("a2",)] and left_out == 1
