"""Tests the cache, cleaning and counting: every row is accounted for, and a second start reads what the first one built."""

import json

import numpy as np
import pytest
from data_sets import load, whole, write_rows
from data_tokenizers import CHATML, byte_level, spaced

from ftjax.config.data import DataConfig
from ftjax.data import build as room
from ftjax.data.pipeline import load_splits
from ftjax.data.store import cache_folder
from ftjax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def asked(prompt, completion=" fine"):
    return {"prompt": prompt, "completion": completion}


def balanced(report):
    assert report.rows == report.kept + sum(report.dropped.values()) + report.held_out
    return report


# The cache


@pytest.fixture
def builds(monkeypatch):
    """Count how often data is tokenised."""
    count, run = [], room.Build.run
    monkeypatch.setattr(room.Build, "run", lambda self, writer: (count.append(1), run(self, writer))[1])
    return count


def test_a_second_start_reads_what_the_first_made(tmp_path, builds):
    path = write_rows(tmp_path / "a.jsonl", 30)
    one, two = load(path, max_length=64), load(path, max_length=64)
    assert len(builds) == 1 and whole(one) == whole(two) and one.report.lines() == two.report.lines()
    assert isinstance(two.documents.tokens.base, object) and not two.documents.tokens.flags.owndata, "it is a view of the file"


def test_whatever_decides_the_tokens_makes_another_cache(tmp_path, builds):
    path = write_rows(tmp_path / "a.jsonl", 30)
    load(path, max_length=64)
    for number, options in enumerate(
        [
            {"max_length": 32},
            {"max_length": 64, "train_on_inputs": True},
            {"max_length": 64, "truncation": "right"},
            {"max_length": 64, "template": "{prompt}:"},
            {"max_length": 64, "tokenizer": byte_level(CHATML)},
            {"max_length": 64, "tokenizer": spaced()},
        ],
        2,
    ):
        load(path, **options)
        assert len(builds) == number
    load(path, max_length=64, packing=False, seed=3)
    assert len(builds) == 7, "how rows are put together does not change them"
    before = path.stat()
    path.write_text(path.read_text().replace("Hello", "hello"))
    import os

    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    load(path, max_length=64)
    assert len(builds) == 8, "the bytes count, not the time of the file"


@pytest.mark.parametrize("harm", ["cut", "removed", "report"])
def test_a_cache_that_is_not_whole_is_made_again(tmp_path, builds, harm):
    path = write_rows(tmp_path / "a.jsonl", 30)
    before = whole(load(path, max_length=64))
    file = next(cache_folder().rglob("documents.arrow"))
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "removed":
        file.unlink()
    else:
        (file.parent / "report.json").write_text("{")
    assert whole(load(path, max_length=64)) == before and len(builds) == 2


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"a.jsonl:2: broken JSON"):
        load(write(tmp_path / "a.jsonl", asked("Hello"), "{"), max_length=64)
    assert [p for p in cache_folder().rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written: .*FTJAX_CACHE"):
        load(write_rows(tmp_path / "a.jsonl", 3), max_length=64)


def test_a_full_disk(tmp_path, monkeypatch):
    import errno

    from ftjax.data.store import Writer

    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "add", full)
    with pytest.raises(UserError, match=r"the disk is full \(.* GiB free\).*streaming"):
        load(write_rows(tmp_path / "a.jsonl", 3), max_length=64)


def test_processes_make_the_same(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 3000)
    path.write_text(path.read_text() + json.dumps({"input": 3}) + "\n")
    alone = load(path, max_length=64, on_error="skip")
    several = load(path, max_length=48, on_error="skip", num_proc=2)
    again = load(path, max_length=48, on_error="skip")
    assert several.report.lines() == again.report.lines() and whole(several) == whole(again)
    assert alone.report.rows == several.report.rows == 3001


# What is left out


def test_broken_and_empty_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", asked("Hello"), "{", asked("Hi", ""), {"prompt": "x"}, asked("world"))
    with pytest.raises(UserError, match=r"a.jsonl:2"):
        load(path, max_length=64)
    report = balanced(load(path, max_length=64, on_error="skip").report)
    assert (report.rows, report.kept, dict(report.dropped)) == (5, 2, {"broken (on_error: skip)": 3})
    assert "3 broken rows were skipped" in report.warnings[0] and "a.jsonl:2: broken JSON" in report.warnings[0]
    report = balanced(load(path, max_length=64, on_error="skip", drop_empty=True).report)
    assert dict(report.dropped) == {"broken (on_error: skip)": 2, "empty": 1}
    alone = write(tmp_path / "b.jsonl", asked("Hello"), asked("Hi", " "))
    with pytest.raises(UserError, match=r"b.jsonl:2: 'completion' is empty"):
        load(alone, max_length=64)
    assert dict(load(alone, max_length=64, drop_empty=True).report.dropped) == {"empty": 1}


def test_a_template_that_refuses_a_row_is_a_broken_row(tmp_path):
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}]} for text in ("good", "bad")
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError, match=r"a.jsonl:2: the chat template refuses these messages: no"):
        load(path, max_length=64, tokenizer=byte_level(template))
    assert balanced(load(path, max_length=64, tokenizer=byte_level(template), on_error="skip").report).kept == 1
    with pytest.raises(UserError, match="this tokenizer has no chat template"):  # not the fault of a row
        load(path, max_length=64, on_error="skip")


def test_bounds_and_truncation_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", asked("a"), asked("b " * 30), asked("c " * 300))
    lengths = load(path, max_length=2000).lengths
    assert lengths[0] < 20 < lengths[1] < 120 < lengths[2]
    for policy, kept, documents in (("drop", 2, 2), ("right", 2, 2), ("left", 3, 3), ("middle", 3, 3), ("split", 3, 3)):
        report = balanced(load(path, max_length=120, truncation=policy).report)
        assert (report.kept, report.documents) == (kept, documents), policy
        if policy == "drop":
            assert dict(report.dropped) == {"longer than max_length": 1}
        elif policy == "right":  # the answer was cut off, so nothing of that row is trained
            assert dict(report.dropped) == {"without a trained token": 1} and "a.jsonl:3" in report.warnings[0]
        else:
            assert dict(report.truncated) == {policy: 1} and not report.dropped
    with pytest.raises(UserError, match=r"a.jsonl:3: \d+ tokens are more than data.max_length 120"):
        load(path, max_length=120, truncation="error")
    with pytest.raises(UserError, match=r"a.jsonl:3"):
        load(path, max_length=120, truncation="error", on_error="skip")
    report = balanced(load(path, max_length=2000, min_tokens=20, max_tokens=120).report)
    assert dict(report.dropped) == {"shorter than min_tokens": 1, "longer than max_tokens": 1}


def test_split_trains_every_token_of_a_long_text(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "Hello world " * 200})
    long, short = load(path, max_length=4000), load(path, max_length=50, truncation="split")
    assert short.report.trained_tokens == long.report.trained_tokens and short.report.kept == 1 < short.report.documents


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(UserError, match=r"none of 2 examples is left: 2 longer than max_length. Raise data.max_length \(2\)"):
        load(write(tmp_path / "a.jsonl", asked("Hello"), asked("Hi")), max_length=2)


def test_duplicates(tmp_path):
    words = "once upon a time there was a little girl who loved to play in the park with all of her toys every single day "
    words += "and when the night came she went home and her mother read her a story about a bear who could not sleep"
    rows = [asked(words), asked("other words entirely"), asked(words), asked(words + " now"), asked("other  words entirely")]
    path = write(tmp_path / "a.jsonl", *rows)
    assert balanced(load(path, max_length=256).report).kept == 5
    assert dict(balanced(load(path, max_length=256, deduplicate="exact").report).dropped) == {"exact duplicates": 1}
    report = balanced(load(path, max_length=256, deduplicate="near").report)
    assert dict(report.dropped) == {"exact duplicates": 1, "near duplicates": 2}
    assert balanced(load(path, max_length=256, deduplicate="near", near_duplicate_threshold=1.0).report).kept >= 3


def test_unicode_normalisation_makes_rows_equal(tmp_path):
    path = write(tmp_path / "a.jsonl", asked("caf\u00e9"), asked("cafe\u0301"))
    assert load(path, max_length=64, deduplicate="exact").report.kept == 2
    assert load(path, max_length=64, deduplicate="exact", unicode_normalization="NFC").report.kept == 1


# Validation


def both(config):
    return load_splits(config, byte_level(), seed=0)


def test_rows_of_validation_in_train_are_said_or_dropped(tmp_path):
    train = write(tmp_path / "t.jsonl", asked("one"), asked("two"), asked("three"), asked("two"))
    validation = write(tmp_path / "v.jsonl", asked("two"), asked("four"))
    config = {"train": str(train), "validation": str(validation), "max_length": 64}
    kept, _ = both(DataConfig(**config))
    assert balanced(kept.report).kept == 4 and any(
        "1 rows of validation are found in train too" in w for w in kept.report.warnings
    )
    dropped, other = both(DataConfig(**config, contamination="drop"))
    assert dict(balanced(dropped.report).dropped) == {"found in validation": 2} and dropped.report.kept == 2
    assert not whole(dropped) & whole(other) and len(whole(dropped)) == 2
    ignored, _ = both(DataConfig(**config, contamination="ignore"))
    assert ignored.report.kept == 4 and not ignored.report.warnings
    with pytest.raises(UserError, match="leaves nothing to train"):
        both(DataConfig(train=str(train), validation=str(train), contamination="drop", max_length=64))


@pytest.mark.parametrize("share, count", [(0.1, 20), (0.25, 50), (3, 3)])
def test_a_validation_split_is_a_part_by_content(tmp_path, share, count):
    path = write_rows(tmp_path / "a.jsonl", 200)
    config = DataConfig(train=str(path), validation_split=share, max_length=64)
    train, validation = both(config)
    assert validation.report.kept == count and balanced(train.report).kept == 200 - count == 200 - train.report.held_out
    assert not whole(train) & whole(validation)
    assert len(whole(train) + whole(validation)) == 200
    again = both(config)[1]
    assert whole(again) == whole(validation)
    assert whole(load_splits(config, byte_level(), seed=1)[1]) != whole(validation)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(np.random.default_rng(0).permutation(lines)))
    assert whole(both(config)[1]) == whole(validation), "the order of the file decides nothing"


def test_equal_rows_and_pieces_of_a_row_are_on_one_side(tmp_path):
    rows = [{"text": f"{n % 20} Hello world " * 30} for n in range(60)]
    config = DataConfig(train=str(write(tmp_path / "a.jsonl", *rows)), validation_split=0.3, max_length=40, truncation="split")
    train, validation = both(config)
    assert not set(train.documents.digest[train.chosen]) & set(train.documents.digest[validation.chosen])
    assert train.report.kept + validation.report.kept == 60
    assert sum(validation.report.truncated.values()) == validation.report.kept


def test_a_split_of_one_row_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least two rows that differ"):
        both(DataConfig(train=str(write(tmp_path / "a.jsonl", asked("one"))), validation_split=0.5, max_length=64))


# Warnings


def test_warnings(tmp_path):
    rows = [{**asked("Hello", "there"), "id": 1}]
    report = load(write(tmp_path / "a.jsonl", *rows), max_length=64).report
    assert any("columns that are not used: id" in w for w in report.warnings)
    assert any("without white space between them" in w for w in report.warnings)
    tokens = write(
        tmp_path / "b.jsonl", {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6], "labels": [5, -100]}
    )
    report = balanced(load(tokens, max_length=64).report)
    assert any("in 1 rows no EOS or end of turn is trained" in w for w in report.warnings)
    assert any("1 rows have no trained token" in w and "b.jsonl:2" in w for w in report.warnings)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    talks = write(tmp_path / "c.jsonl", {"messages": talk})
    warned = load(talks, max_length=64, tokenizer=byte_level(CHATML)).report.warnings
    assert any("has no {% generation %} marks" in w for w in warned)
    assert any("writes no BOS" in w for w in load(talks, max_length=64, tokenizer=spaced(CHATML)).report.warnings)
    pair = write(tmp_path / "d.jsonl", {"prompt": talk[:1], "chosen": "Hello", "rejected": "no"})
    warned = load(pair, max_length=64, tokenizer=byte_level(CHATML)).report.warnings
    assert any("`rejected` are checked" in w for w in warned)
