"""Tests batches: their contents, that every row occurs once, and that a position means the same for any processes (trap 8)."""

import json

import numpy as np
import pytest
from data_sets import counted, documents_in, load, same, whole, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftjax.data.batch import KEYS
from ftjax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def split(tmp_path):
    return load(write_rows(tmp_path / "a.jsonl", 200), max_length=64)


def every(split, size, **options):
    return list(split.batches(size, **{"seed": 0, "shuffle": True, "epochs": 1, **options}))


# One batch


@pytest.mark.parametrize("packing", [True, False])
def test_targets_weights_and_positions_are_those_of_each_document(tmp_path, packing):
    split = load(write_rows(tmp_path / "a.jsonl", 50), max_length=64, packing=packing)
    encoded = {tuple(d.tokens.tolist()): d for d in (split.documents.document(n) for n in split.chosen)}
    for batch in every(split, 4):
        assert {name: array.dtype for name, array in batch.items()} == {name: key.dtype for name, key in KEYS.items()}
        for row in range(4):
            tokens, targets, weights, positions, segments = (batch[name][row] for name in KEYS)
            count = int(segments.max())
            assert packing or count <= 1
            for segment in range(1, count + 1):
                at = np.flatnonzero(segments == segment)
                document = encoded[tuple(tokens[at].tolist())]
                assert (np.diff(at) == 1).all() and positions[at].tolist() == list(range(len(at)))
                assert targets[at][:-1].tolist() == document.tokens[1:].tolist()
                assert weights[at][:-1].tolist() == document.weights[1:].tolist() and weights[at[-1]] == 0
            empty = segments == 0
            assert not tokens[empty].any() and not weights[empty].any() and not positions[empty].any()


def test_the_example_of_the_documentation():
    from ftjax.data.batch import fill

    class Store:
        tokens = np.array([1, 15, 31, 2, 1, 40, 41, 2], np.int32)
        weights = np.array([0, 0, 1, 1] * 2, np.uint8)

    batch = fill(Store, np.array([0, 4]), np.array([4, 4]), np.array([2]), 12)
    assert {name: values[0].tolist() for name, values in batch.items()} == {
        "tokens": [1, 15, 31, 2, 1, 40, 41, 2, 0, 0, 0, 0],
        "targets": [15, 31, 2, 0, 40, 41, 2, 0, 0, 0, 0, 0],
        "weights": [0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0],
        "positions": [0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0],
    }


# Epochs


def test_every_row_once_an_epoch_and_shapes_never_change(split):
    batches = every(split, 7)
    assert {batch["tokens"].shape for batch in batches} == {(7, 64)}
    assert counted(batches) == whole(split) and len(whole(split)) == 200
    assert len(batches) == -(-split.rows_per_epoch(0) // 7)
    padding = [bool((row == 0).all()) for batch in batches for row in batch["segment_ids"]]
    assert padding == sorted(padding), "rows of padding come last"


def test_epochs_differ_in_order_and_the_seed_repeats_them(split):
    two = every(split, 8, epochs=2)
    one = every(split, 8)
    assert same(two[: len(one)], one) and not same(two[len(one) :], one)
    assert counted(two[len(one) :]) == counted(one)
    assert not same(every(split, 8, seed=1), one)
    plain = every(split, 8, shuffle=False, epochs=2)
    assert same(plain[: len(plain) // 2], plain[len(plain) // 2 :])


def test_epochs_are_not_mixed_in_a_batch_unless_asked(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 60)
    mixed = load(path, max_length=64, mix_epochs=True)
    rows = sum(mixed.rows_per_epoch(epoch) for epoch in range(3))
    batches = every(mixed, 8, epochs=3)
    assert len(batches) == -(-rows // 8) and rows % 8, "the last batch is the only one with rows of padding"
    assert all((batch["segment_ids"] > 0).any(1).all() for batch in batches[:-1])
    assert not all((b["segment_ids"] > 0).any(1).all() for b in every(load(path, max_length=64), 8, epochs=3)[:-1])
    assert counted(batches) == whole(mixed) + whole(mixed) + whole(mixed)
    middle = mixed.batches(8, seed=0, shuffle=True, epochs=3)
    for _ in range(4):
        next(middle)
    again = mixed.batches(8, seed=0, shuffle=True, epochs=3)
    again.set_state(json.loads(json.dumps(middle.get_state())))
    assert same(list(again), batches[4:])
    tiny = load(write_rows(tmp_path / "b.jsonl", 3), max_length=64, mix_epochs=True)
    assert counted(every(tiny, 16, epochs=5)) == sum([whole(tiny)] * 5, whole(tiny) - whole(tiny))


def test_rows_that_are_not_packed_stand_with_others_of_like_length(tmp_path):
    split = load(write_rows(tmp_path / "a.jsonl", 300, longest=100), max_length=512, packing=False)
    batches = every(split, 8)
    widths = [batch["tokens"].shape[1] for batch in batches]
    assert set(widths) <= {64, 128, 256, 512} and len(set(widths)) > 1
    assert widths != sorted(widths), "batches of one width do not follow each other"
    assert counted(batches) == whole(split) and len(batches) == -(-split.rows_per_epoch(0) // 8)
    for batch, width in zip(batches, widths, strict=True):
        longest = (batch["segment_ids"] > 0).sum(1).max()
        assert width == 64 or longest > width // 2
    iterator = split.batches(8, seed=0, shuffle=True, epochs=1)
    next(iterator)
    again = split.batches(8, seed=0, shuffle=True, epochs=1)
    again.set_state(iterator.get_state())
    assert same(list(again), batches[1:])
    with pytest.raises(UserError, match="batches have 8 rows and this run's 4"):
        split.batches(4, seed=0, shuffle=True, epochs=1).set_state(iterator.get_state())


# Processes and restarts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.sampled_from([1, 2, 4, 8]),
    after=st.sampled_from([1, 2, 4, 8]),
    size=st.sampled_from([8, 16, 24]),
    stop=st.integers(0, 40),
    packing=st.booleans(),
    data=st.data(),
)
def test_any_processes_before_and_after_a_restart_see_every_row_once(tmp_path, before, after, size, stop, packing, data):
    path = tmp_path / "a.jsonl"
    if not path.exists():
        write_rows(path, 150)
    split = load(path, max_length=64, packing=packing)
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
    assert all(state == states[0] for state in states), "the position depends on the process"
    second = shares(after)
    for iterator in second:
        iterator.set_state(states[data.draw(st.integers(0, before - 1))])
    while len(seen) < len(reference):
        seen.append(step(second))
    with pytest.raises(StopIteration):
        step(second)
    assert same(seen, reference)
    half = len(reference) // 2
    assert counted(seen[:half]) == counted(seen[half:]) == whole(split)


def test_packed_rows_go_on_with_another_batch_size(split):
    iterator = split.batches(8, seed=0, shuffle=True, epochs=1)
    seen = [next(iterator), next(iterator)]
    other = split.batches(4, seed=0, shuffle=True, epochs=1)
    other.set_state(iterator.get_state())
    assert counted([*seen, *other]) == whole(split)


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"mix_epochs": True}, {"streaming": True}])
def test_any_rows_of_a_batch(tmp_path, options):
    """Processes may share rows, and a process may hold rows that are not adjacent."""
    split = load(write_rows(tmp_path / "a.jsonl", 150), max_length=64, **options)
    reference = every(split, 8, epochs=2)
    for rows in ([0, 1, 4, 5], [3], [6, 7], list(range(8))):
        got = every(split, 8, epochs=2, rows=rows)
        assert same(got, [{name: values[rows] for name, values in batch.items()} for batch in reference])


@pytest.mark.parametrize("rows", [[], [1, 0], [2, 2], [8], [-1]])
def test_rows_that_are_none_of_the_batch(split, rows):
    with pytest.raises(ValueError, match="rows of a batch of 8"):
        split.batches(8, seed=0, shuffle=True, epochs=1, rows=rows)


def test_rows_that_are_not_packed_have_lengths_that_the_mesh_divides(tmp_path):
    """Rows of 72 tokens can be sharded over 8 devices; the narrower width of 36 cannot."""
    split = load(write_rows(tmp_path / "a.jsonl", 40), max_length=72, packing=False)
    assert {batch["tokens"].shape[1] for batch in every(split, 4)} == {36}
    batches = every(split, 4, width_multiple=8)
    assert {batch["tokens"].shape[1] for batch in batches} == {72} and counted(batches) == whole(split)


# Mixtures


def test_a_weight_is_how_often_an_epoch_sees_a_row(tmp_path):
    a, b, c = (write_rows(tmp_path / f"{name}.jsonl", 40, seed=seed) for seed, name in enumerate("abc"))
    parts = [{"path": str(a)}, {"path": str(b), "weight": 2}, {"path": str(c), "weight": 0.25}]
    split = load(parts, max_length=64)
    source = {tuple(split.documents.document(n).tokens.tolist()): int(split.documents.source[n]) for n in split.chosen}
    per_epoch = []
    for epoch in range(4):
        iterator = split.batches(8, seed=0, shuffle=True, epochs=epoch + 1)
        iterator.set_state({"epoch": epoch, "row": 0, "batch_size": 8})
        seen = counted(iterator)
        assert [sorted({n for d, n in seen.items() if source[d] == part}) for part in range(3)] == [[1], [2], [1]]
        assert sum(n for d, n in seen.items() if source[d] == 2) == 10
        per_epoch.append({d for d in seen if source[d] == 2})
        assert split.rows_per_epoch(epoch) == len(split.plan(epoch, True, 0))
    assert len(set().union(*per_epoch)) == 40, "a quarter in turn: after four epochs each row was seen once"
    assert "2 x" in "\n".join(split.report.lines())


def test_parts_of_a_mixture_have_their_own_formats(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("sentence,sentiment\nHello,1\n")
    parts = [
        str(write_rows(tmp_path / "a.jsonl", 2)),
        {"path": str(path), "columns": {"prompt": "sentence", "completion": "sentiment"}},
    ]
    split = load(parts, max_length=64)
    assert split.report.kept == 3 and len(split.report.formats) == 2


def test_documents_in_a_batch_know_where_they_came_from(split):
    batch = every(split, 4)[0]
    places = {tuple(split.documents.document(n).tokens.tolist()): split.documents.where[int(n)].as_py() for n in split.chosen}
    assert all(places[document].rpartition(":")[2].isdigit() for document in documents_in(batch))
    ((first,), (row, segment)), *_ = split.first(3)
    assert first.where.endswith("a.jsonl:1")
    plan = split.rows(split.plan(0, True, 0), np.array([row]), 64)
    assert plan["tokens"][0][plan["segment_ids"][0] == segment].tolist() == first.tokens.tolist()
