"""Tests streamed data: every row once, shuffled, packed, and the same position for any number of processes."""

import json

import numpy as np
import pytest
from data_sets import counted, load, same, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ftjax.data.stream as room
from ftjax.config.data import DataConfig
from ftjax.data.batch import KEYS
from ftjax.errors import UserError


@pytest.fixture(autouse=True)
def small_windows(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "WINDOW", 40)


def every(split, size, **options):
    return list(split.batches(size, **{"seed": 0, "shuffle": True, "epochs": 1, **options}))


def test_the_same_documents_as_without_streaming_and_no_cache(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 150)
    split = load(path, max_length=64, streaming=True)
    batches = every(split, 4)
    assert not (tmp_path / "cache").exists()
    assert {batch["tokens"].shape for batch in batches} == {(4, 64)}
    whole = load(path, max_length=64)
    assert counted(batches) == counted(every(whole, 4)) and sum(counted(batches).values()) == 150
    full = [(batch["segment_ids"] > 0).any(1).all() for batch in batches]
    assert all(full[:-1]), "only the last batch of an epoch has rows of padding"
    assert not same(every(split, 4, seed=1), batches) and same(every(split, 4), batches)
    two = every(split, 4, epochs=2)
    assert same(two[: len(batches)], batches) and not same(two[len(batches) :], batches)
    assert counted(two[len(batches) :]) == counted(batches)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]), size=st.sampled_from([4, 12]), stop=st.integers(0, 30)
)
def test_any_processes_before_and_after_a_restart(tmp_path, before, after, size, stop):
    path = tmp_path / "a.jsonl"
    if not path.exists():
        write_rows(path, 130)
    split = load(path, max_length=64, streaming=True)
    reference = every(split, size, epochs=2)
    stop = min(stop, len(reference))

    def shares(count):
        parts = np.split(np.arange(size), count)
        return [split.batches(size, seed=0, shuffle=True, epochs=2, rows=part) for part in parts]

    def step(iterators):
        parts = [next(iterator) for iterator in iterators]
        return {name: np.concatenate([part[name] for part in parts]) for name in KEYS}

    first = shares(before)
    seen = [step(first) for _ in range(stop)]
    states = [json.loads(json.dumps(iterator.get_state())) for iterator in first]
    assert all(state == states[0] for state in states)
    second = shares(after)
    for iterator in second:
        iterator.set_state(states[-1])
    while len(seen) < len(reference):
        seen.append(step(second))
    assert same(seen, reference)
    with pytest.raises(StopIteration):
        step(second)


def test_what_is_read_of_a_hub_set_is_streamed(monkeypatch):
    import datasets

    rows = [{"prompt": f"Hello {n}", "completion": f" fine {n}"} for n in range(100)]
    asked = []

    def hub(*args, streaming, **options):
        asked.append(streaming)
        data = datasets.Dataset.from_list(rows)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", hub)
    split = load("org/name", max_length=64, streaming=True)
    assert sum(counted(every(split, 4)).values()) == 100 and set(asked) == {True}
    assert split.rows_per_epoch(0) == room.UNKNOWN and "is not known" in split.report.warnings[-1]


def test_the_length_of_an_epoch_is_estimated_or_known(tmp_path):
    short = load(write_rows(tmp_path / "a.jsonl", 30), max_length=64, streaming=True)
    assert len(every(short, 1)) == short.rows_per_epoch(0) and short.report.exact
    split = load(write_rows(tmp_path / "b.jsonl", 400), max_length=64, streaming=True)
    rows = len(every(split, 1))
    assert rows / 3 < split.rows_per_epoch(0) < rows * 3
    assert "estimated" in split.report.warnings[-1] and "of a first part: 40 of 40" in split.report.lines()[0]


def test_a_mixture_takes_turns_by_weight(tmp_path):
    parts = [{"path": str(write_rows(tmp_path / f"{n}.jsonl", 60, seed=n)), "weight": n} for n in (1, 3)]
    split = load(parts, max_length=64, streaming=True)
    assert sum(counted(every(split, 1)).values()) == 60 + 3 * 60
    places = [d.where.rpartition("/")[2].partition(".")[0] for (d,), _ in split.first(40)]
    assert places.count("3") == 30 and places.count("1") == 10


def test_an_epoch_sees_each_row_as_often_as_its_weight_says(tmp_path):
    weights = {"a": 2, "b": 1, "c": 0.25, "d": 1.5}
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", 40, seed=n) for n, name in enumerate(weights)}
    parts = [{"path": str(paths[name]), "weight": weight} for name, weight in weights.items()]
    split = load(parts, max_length=64, streaming=True)
    of = {name: set(counted(every(load(path, max_length=64, streaming=True), 1))) for name, path in paths.items()}
    one, four = (counted(every(split, 1, epochs=epochs)) for epochs in (1, 4))
    for name, weight in weights.items():
        seen = [one[document] for document in of[name]]
        assert set(seen) <= {int(weight), int(-(-weight // 1))}
        assert abs(sum(seen) - 40 * weight) <= 2
        assert all(four[document] == 4 * weight for document in of[name]), "after four epochs each row had its turns"


def test_weights_that_leave_no_row(tmp_path):
    part = {"path": str(write_rows(tmp_path / "a.jsonl", 10)), "weight": 0.001}
    with pytest.raises(UserError, match=r"an epoch sees none of its (10 )?rows; raise"):
        load([part], max_length=64)


def test_mistakes_show_at_once_or_when_they_are_reached(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 100)
    path.write_text(path.read_text() + "{\n")
    split = load(path, max_length=64, streaming=True)
    with pytest.raises(UserError, match=r"a.jsonl:101: broken JSON"):
        every(split, 4)
    assert sum(counted(every(load(path, max_length=64, streaming=True, on_error="skip"), 4)).values()) == 100
    path.write_text("{\n" + path.read_text())
    with pytest.raises(UserError, match=r"a.jsonl:1: broken JSON"):
        load(path, max_length=64, streaming=True)


def test_a_file_that_is_changed_between_epochs(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 100)
    split = load(path, max_length=64, streaming=True)
    write_rows(path, 50)
    with pytest.raises(UserError, match="was changed while the run goes on"):
        every(split, 4)


@pytest.mark.parametrize(
    "options", [{"packing": False}, {"validation_split": 0.1}, {"deduplicate": "exact"}, {"mix_epochs": True}]
)
def test_what_streaming_cannot_do_is_refused(options):
    with pytest.raises(ValueError, match="streaming sees a window"):
        DataConfig(train="a.jsonl", streaming=True, **options)
