"""Tests what each truncation policy keeps, and that the report counts it (trap 6)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.encoder import Encoded
from ftjax.data.truncate import truncate
from ftjax.errors import UserError

BOS = 1


def document(tokens, weights=None):
    tokens = np.array(tokens, np.int32)
    return Encoded(tokens, np.ones(len(tokens), np.float32) if weights is None else np.array(weights, np.float32), "a.jsonl:7")


@pytest.mark.parametrize(
    "policy, kept",
    [
        ("drop", []),
        ("right", [[1, 10, 11]]),
        ("left", [[1, 12, 13]]),
        ("middle", [[1, 10, 13]]),
        ("split", [[1, 10, 11], [1, 12, 13]]),
    ],
)
def test_what_is_kept(policy, kept):
    pieces = truncate(document([1, 10, 11, 12, 13]), 3, policy, BOS)
    assert [piece.tokens.tolist() for piece in pieces] == kept
    assert all(piece.where == "a.jsonl:7" for piece in pieces)


def test_without_a_bos_pieces_share_a_token_of_context():
    pieces = truncate(document([10, 11, 12, 13, 14]), 3, "split", None)
    assert [piece.tokens.tolist() for piece in pieces] == [[10, 11, 12], [12, 13, 14]]
    assert [piece.weights.tolist() for piece in pieces] == [[1, 1, 1], [0, 1, 1]]


def test_an_error_says_where():
    with pytest.raises(UserError, match=r"a.jsonl:7: 5 tokens are more than data.max_length 3.*data.truncation"):
        truncate(document([1, 10, 11, 12, 13]), 3, "error", BOS)


@settings(max_examples=200, deadline=None)
@given(
    rest=st.lists(st.integers(0, 1), min_size=4, max_size=60),
    length=st.integers(2, 12),
    with_bos=st.booleans(),
    policy=st.sampled_from(["right", "left", "middle", "split"]),
)
def test_no_piece_is_too_long_and_split_trains_each_token_once(rest, length, with_bos, policy):
    tokens = [BOS if with_bos else 2, *range(10, 10 + len(rest))]
    whole = document(tokens, [0, *rest])
    if len(tokens) <= length:
        return
    pieces = truncate(whole, length, policy, BOS if with_bos else None)
    assert all(2 <= len(piece.tokens) <= length for piece in pieces)
    if with_bos and length > 2:
        assert all((piece.tokens == BOS).tolist() == [True] + [False] * (len(piece.tokens) - 1) for piece in pieces)
    trained = [int(t) for piece in pieces for t, w in zip(piece.tokens[1:], piece.weights[1:], strict=True) if w]
    wanted = [t for t, w in zip(tokens[1:], rest, strict=True) if w]
    assert trained == wanted if policy == "split" else set(trained) <= set(wanted)
