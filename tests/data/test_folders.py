"""Tests which files of a folder are read, and that the others are named."""

import json

import pytest

from ftjax.config.data import SourceConfig
from ftjax.data.faults import Faults
from ftjax.data.read import read_rows
from ftjax.errors import UserError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{name}"}}\n' if "json" in path.suffix else f"text\n{name}\n")


def read(folder, split="train"):
    """Return `(names of the files that were read, the message about the others)`."""
    faults = Faults()
    rows = read_rows(SourceConfig(path=str(folder), split=split), faults)
    names = dict.fromkeys(
        row.where.removeprefix(f"{folder}/").rpartition(":")[0].partition("[")[0] or row.where for row in rows
    )
    return [name.removeprefix(f"{folder}/").partition("[")[0] for name in names], " ".join(faults.notes)


def test_a_json_file_among_others_is_data_and_what_is_about_the_data_is_not(tmp_path):
    make(tmp_path, "data.json", "more.jsonl", "dataset_info.json", "README.md", "LICENSE.txt")
    names, note = read(tmp_path)
    assert names == ["data.json", "more.jsonl"] and note == ""


def test_files_of_other_splits_and_of_none_are_named(tmp_path):
    make(tmp_path, "train.jsonl", "test.jsonl", "part1.jsonl", "valid/x.jsonl")
    names, note = read(tmp_path)
    assert names == ["train.jsonl"]
    assert "test.jsonl (test)" in note and "part1.jsonl (no split in its name)" in note and "valid/x.jsonl (validation)" in note
    assert read(tmp_path, "validation")[0] == ["valid/x.jsonl"]


def test_files_without_a_split_are_the_training_data_beside_those_of_others(tmp_path):
    make(tmp_path, "a.jsonl", "b.jsonl", "validation.jsonl")
    assert read(tmp_path) == (
        ["a.jsonl", "b.jsonl"],
        f"{tmp_path}: 2 of its files are read; left out: validation.jsonl (validation)",
    )
    assert read(tmp_path, "validation")[0] == ["validation.jsonl"]
    with pytest.raises(UserError, match="none of test"):
        read(tmp_path, "test")


def test_hidden_files_unknown_kinds_and_notes_beside_data_are_named(tmp_path):
    make(tmp_path, "a.jsonl", "_b.jsonl", ".c.jsonl", "sheet.xlsx", "notes.txt", ".DS_Store")
    names, note = read(tmp_path)
    assert names == ["a.jsonl"]
    assert all(
        part in note for part in ("_b.jsonl (its", ".c.jsonl (its", "sheet.xlsx (unknown kind)", "notes.txt (text beside data)")
    )
    assert "DS_Store" not in note


def test_linked_folders_and_files(tmp_path):
    make(tmp_path / "elsewhere", "b.jsonl", "c.jsonl")
    make(tmp_path / "data", "a.jsonl")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "one.jsonl").symlink_to(tmp_path / "elsewhere" / "c.jsonl")
    assert read(tmp_path / "data") == (["a.jsonl", "more/b.jsonl", "more/c.jsonl", "one.jsonl"], "")


def test_links_that_lead_nowhere_or_back(tmp_path):
    make(tmp_path, "part/a.jsonl")
    (tmp_path / "part" / "b.jsonl").symlink_to("nowhere.jsonl")
    (tmp_path / "part" / "back").symlink_to("..")
    names, note = read(tmp_path)
    assert names == ["part/a.jsonl"]
    assert "part/b.jsonl (a link to nothing)" in note and "part/back (a link to a folder around it)" in note


def test_a_folder_of_texts(tmp_path):
    make(tmp_path, "a.txt", "b.md", "README.md")
    assert read(tmp_path) == (["a.txt", "b.md"], "")


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    make(tmp_path, "sheet.xlsx")
    with pytest.raises(UserError, match=r"this folder holds no data file; .*left out: sheet.xlsx \(unknown kind\)"):
        read(tmp_path)


def test_a_set_that_datasets_saved(tmp_path):
    import datasets

    rows = [{"text": str(n)} for n in range(4)]
    made = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(str(tmp_path / "dict"))
    for split, count in (("train", 4), ("test", 1)):
        got = [row.values for row in read_rows(SourceConfig(path=str(tmp_path / "dict"), split=split))]
        assert got == rows[:count]
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    shard = next((tmp_path / "one").glob("data-*.arrow"))
    (tmp_path / "one" / "cache-1234.arrow").write_bytes(shard.read_bytes())  # a cache file of `map`
    faults = Faults()
    assert [row.values for row in read_rows(SourceConfig(path=str(tmp_path / "one"), split="train"), faults)] == rows
    assert "cache-1234.arrow (not named in state.json)" in " ".join(faults.notes)
    state = tmp_path / "one" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(UserError, match="chosen by a file of indices"):
        list(read_rows(SourceConfig(path=str(tmp_path / "one"), split="train")))
