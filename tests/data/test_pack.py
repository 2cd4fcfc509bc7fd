"""Tests packing: every document is packed once, no row is too long, rows are well filled, and a seed gives the same rows
again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.pack import pack


def naive(lengths, capacity):
    """Return the number of rows by best fit decreasing, one document at a time."""
    rows = []
    for size in sorted(lengths, reverse=True):
        holding = [number for number, left in enumerate(rows) if left >= size]
        if holding:
            rows[min(holding, key=lambda number: rows[number])] -= size
        else:
            rows.append(capacity - size)
    return len(rows)


cases = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


@settings(max_examples=400, deadline=None)
@given(case=cases, seed=st.none() | st.integers(0, 3))
def test_every_document_stands_once_in_rows_that_hold_it(case, seed):
    lengths, capacity = case
    plan = pack(np.array(lengths, int), capacity, None if seed is None else np.random.default_rng(seed))
    assert sorted(plan.documents.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[d] for d in plan.take(np.array([row]))[0]) for row in range(len(plan))]
    assert all(0 < total <= capacity for total in sums)
    assert len(plan) == naive(lengths, capacity)


def test_the_example_of_the_documentation():
    plan = pack(np.array([5, 3, 3, 2]), 8, None)
    assert [plan.take(np.array([row]))[0].tolist() for row in range(2)] == [[0, 1], [2, 3]]


def test_the_seed_decides_the_order_and_nothing_else():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    one, same, other = (pack(lengths, 128, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (one.documents == same.documents).all() and (one.starts == same.starts).all()
    assert (one.documents != other.documents).any() and len(one) == len(other)


def test_without_a_seed_rows_follow_the_data():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    plan = pack(lengths, 128, None)
    first = [plan.take(np.array([row]))[0].min() for row in range(len(plan))]
    assert first == sorted(first)


@pytest.mark.parametrize("lengths", [[9], [0, 3]])
def test_a_document_that_no_row_holds_is_a_mistake(lengths):
    with pytest.raises(ValueError, match="lengths must be 1 to 8"):
        pack(np.array(lengths), 8, None)
