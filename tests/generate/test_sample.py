"""Tests sampling against transformers' logits processors."""

import math

import jax
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from ftjax.errors import UserError
from ftjax.generate import sample
from ftjax.generate.sample import IN_PROMPT, Sampling, row_sampling, uses_of

B, V = 6, 257
UNSEEN = np.zeros((B, V), np.int32)
process, choose, restrict = jax.jit(sample.process), jax.jit(sample.choose), jax.jit(sample.restrict)
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 10},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.05},
    {"temperature": 1.0, "top_p": 0.999999},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"temperature": 0.5, "repetition_penalty": 0.8},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
]


def case(seed: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(B, V)) * scale).astype(np.float32), rng.integers(0, V, (B, 12))


def theirs(logits: np.ndarray, ids: np.ndarray, settings: dict) -> np.ndarray:
    """Process the logits with the processors that transformers' `generate` would build, in its order."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=4, n_layer=1, n_head=1))
    sampled = bool(settings.get("temperature"))
    options = {"top_k": 0, **settings} if sampled else settings
    config = GenerationConfig(do_sample=sampled, **options)
    prepared, _ = model._prepare_generation_config(config)
    processors = model._get_logits_processor(prepared, input_ids_seq_length=ids.shape[1])
    return processors(torch.tensor(ids), torch.tensor(logits)).numpy()


def ours(logits: np.ndarray, ids: np.ndarray, settings: dict) -> np.ndarray:
    seen = np.zeros((B, V), np.int32)
    np.put_along_axis(seen, ids, IN_PROMPT, axis=1)
    rows = row_sampling([Sampling(**settings)] * B)
    return np.asarray(process(logits, seen, rows))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_processed_logits_are_transformers(settings):
    for seed, scale in enumerate((3.0, 0.3, 30.0)):
        logits, ids = case(seed, scale)
        np.testing.assert_allclose(ours(logits, ids, settings), theirs(logits, ids, settings), rtol=1e-6)


def test_ties_at_the_limit_are_kept():
    """Top-k keeps ties, as in transformers, whose top-p keeps as many as its sort happens to."""
    logits = np.array([[1.0, 2.0, 2.0, 2.0, 0.0, -0.0]], np.float32)
    for settings in ({"top_k": 2}, {"top_p": 0.5}):
        kept = process(logits, UNSEEN[:1, :6], row_sampling([Sampling(temperature=1.0, **settings)]))
        assert np.isfinite(kept).tolist() == [[False, True, True, True, False, False]]


def test_draws_follow_the_distribution():
    logits, _ = case(0)
    sampling = row_sampling([Sampling(temperature=0.9, top_k=5, top_p=0.95)])
    processed = np.asarray(process(logits[:1], UNSEEN[:1], sampling))
    many = 20_000
    keys = jax.random.split(jax.random.key(0), many)
    drawn = choose(np.broadcast_to(processed, (many, V)), np.full(many, 0.9, np.float32), keys)
    counts = np.bincount(np.asarray(drawn), minlength=V) / many
    odds = np.exp(processed[0] - np.max(processed[0]))
    want = odds / odds.sum()
    np.testing.assert_allclose(counts, want, atol=4 * np.sqrt(0.25 / many))
    assert counts[want == 0].sum() == 0


def test_greedy_is_the_most_probable():
    logits, _ = case(1)
    rows = row_sampling([Sampling()] * B)
    processed = process(logits, UNSEEN, rows)
    drawn = choose(processed, rows.temperature, jax.random.split(jax.random.key(0), B))
    np.testing.assert_array_equal(processed, logits)
    np.testing.assert_array_equal(drawn, logits.argmax(axis=1))


def test_each_row_has_its_own_sampling():
    """Rows with different settings in one batch give, bit for bit, what each gives alone."""
    logits, ids = case(2)
    for at in range(0, len(SETTINGS) - B + 1, B):
        several = SETTINGS[at : at + B]
        seen = np.zeros((B, V), np.int32)
        np.put_along_axis(seen, ids, IN_PROMPT, axis=1)
        rows = row_sampling([Sampling(**settings) for settings in several])
        together = np.asarray(process(logits, seen, rows))
        keys = jax.random.split(jax.random.key(1), B)
        drawn = np.asarray(choose(together, rows.temperature, keys))
        for row, settings in enumerate(several):
            np.testing.assert_array_equal(together[row], ours(logits, ids, settings)[row])
            temperature = np.full(B, settings.get("temperature", 0.0), np.float32)
            alone = np.asarray(choose(ours(logits, ids, settings), temperature, keys))
            assert drawn[row] == alone[row]


def test_penalties_count_the_answer_alone():
    """Presence and frequency are OpenAI's: tokens of the prompt do not count; the repetition penalty counts both."""
    logits = np.linspace(-2, 2, 6, dtype=np.float32)[None]
    uses = uses_of([0, 0, 5], [1, 1, 1, 5], 6)[None]
    found = process(logits, uses, row_sampling([Sampling(presence_penalty=0.5, frequency_penalty=0.25)]))
    np.testing.assert_allclose(found[0] - logits[0], [0, -1.25, 0, 0, 0, -0.75], atol=1e-6)
    found = process(logits, uses, row_sampling([Sampling(repetition_penalty=2.0)]))
    np.testing.assert_allclose(found[0], np.where(np.array(uses[0]) > 0, np.where(logits[0] < 0, 2, 0.5), 1) * logits[0])


def test_bias_and_mask_are_each_rows_own():
    logits, _ = case(3)
    ids, bias = np.full((B, 4), V, np.int32), np.zeros((B, 4), np.float32)
    ids[0, :2], bias[0, :2] = (7, 256), (5.0, -100.0)
    mask = np.full((B, -(-V // 32)), 2**32 - 1, np.uint32)
    mask[1] = 0
    mask[1, [1, 8]] = 1 << 3, 1  # tokens 35 and 256
    found = np.asarray(restrict(logits, ids, bias, mask))
    want = logits.copy()
    want[0, [7, 256]] += [5.0, -100.0]
    want[1, np.setdiff1d(np.arange(V), [35, 256])] = -np.inf
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -1}, "temperature = -1; expected 0"),
        ({"top_k": -3}, "top_k"),
        ({"top_k": 2.5}, "whole number"),
        ({"top_p": 0}, "more than 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "between -2 and 2"),
        ({"frequency_penalty": -3}, "between -2 and 2"),
        ({"temperature": "hot"}, "a number"),
        ({"temperature": float("nan")}, "a number"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(UserError, match=says):
        Sampling(**settings)


def test_numbers_that_the_arrays_cannot_hold():
    """A request's numbers may be any that Python has; none of them may stop the engine."""
    rows = row_sampling([Sampling(temperature=1e300, top_k=2**70, repetition_penalty=10**40), Sampling(temperature=math.inf)])
    assert rows.top_k.tolist() == [2**31 - 1, 0] and all(np.isfinite(x).all() for x in rows)
    with pytest.raises(UserError, match="top_k"):
        Sampling(temperature=1.0, top_k=math.inf)
