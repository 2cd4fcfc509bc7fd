"""Tests the chunked loss against the full loss: values and gradients (T17)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ALL

from ftjax.objectives.loss import token_totals, trained_first

B, T, E, V = 3, 13, 8, 31


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 2, (B, T)) * rng.uniform(0.5, 2, (B, T))
    weights[1] = 0
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(V, E)), jnp.float32), "b": jnp.asarray(rng.normal(size=V), jnp.float32)},
        "hidden": jnp.asarray(rng.normal(size=(B, T, E)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "weights": jnp.asarray(weights, jnp.float32),
    }


def unembed(params, hidden):
    return 5 * jnp.tanh((hidden @ params["w"].T + params["b"]) / 5)  # with a softcap


def full(params, hidden, targets, weights):
    logp = jax.nn.log_softmax(unembed(params, hidden))
    return -jnp.sum(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weights)


@pytest.mark.parametrize("length", [1, 4, 13, 64] if ALL else [4, 64])
def test_chunked_is_full(problem, length):
    def chunked(params, hidden):
        return 3 * token_totals(unembed, length, params, hidden, problem["targets"], problem["weights"]).loss

    want, want_grads = jax.value_and_grad(lambda p, h: 3 * full(p, h, problem["targets"], problem["weights"]), (0, 1))(
        problem["params"], problem["hidden"]
    )
    got, got_grads = jax.value_and_grad(chunked, (0, 1))(problem["params"], problem["hidden"])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), got_grads, want_grads)


@pytest.mark.parametrize("differentiated", [True, False])
def test_idle_chunks_are_not_computed(problem, differentiated):
    """With trained tokens first, only chunks that have some are computed; values and gradients stay the same."""
    ran = []

    def counting(params, hidden):
        jax.debug.callback(lambda: ran.append(1))
        return unembed(params, hidden)

    def loss(params, hidden, skip=True, unembed=counting):
        tokens = (hidden, problem["targets"], problem["weights"])
        first = trained_first(*tokens) if skip else tokens
        return token_totals(unembed, 3, params, *first, skip=skip).loss

    arguments = problem["params"], problem["hidden"]
    run = jax.value_and_grad(loss, (0, 1)) if differentiated else loss
    got = jax.block_until_ready(jax.jit(run)(*arguments))
    jax.effects_barrier()
    assert len(ran) == -(-int((problem["weights"] > 0).sum()) // 3) < -(-B * T // 3)
    plain = partial(loss, skip=False, unembed=unembed)
    want = (jax.value_and_grad(plain, (0, 1)) if differentiated else plain)(*arguments)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-5), got, want)


def test_sums(problem):
    sums = token_totals(unembed, 5, problem["params"], problem["hidden"], problem["targets"], problem["weights"])
    best = np.asarray(unembed(problem["params"], problem["hidden"])).argmax(-1)
    np.testing.assert_allclose(sums.weight, problem["weights"].sum(), rtol=1e-6)
    np.testing.assert_allclose(
        sums.metrics["token_accuracy"][0], jnp.where(best == problem["targets"], problem["weights"], 0).sum(), rtol=1e-6
    )


def test_ties(problem):
    """Among equally likely tokens the first counts, as in greedy decoding; NaN counts nothing."""
    levels = jnp.asarray([[[1.0, 3.0, 3.0, 0.0]] * 4])
    logits = jnp.concatenate([levels, levels * jnp.nan], axis=1)
    targets = jnp.asarray([[0, 1, 2, 3] * 2])
    sums = token_totals(lambda params, hidden: hidden, 2, {}, logits, targets, jnp.ones((1, 8)).at[0, 4].set(0))
    assert sums.metrics["token_accuracy"][0] == 1


def test_gradients_are_summed_in_float32():
    """A bfloat16 weight has its float32 gradient up to one rounding, for any number of chunks."""
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=(V, E)), jnp.bfloat16)
    hidden = jnp.asarray(rng.normal(size=(1, 1024, E)), jnp.float32)
    targets, weights = jnp.asarray(rng.integers(0, V, (1, 1024))), jnp.ones((1, 1024))

    def gradient(weight, length):
        def loss(weight):
            project = lambda w, h: h @ w.astype(jnp.float32).T  # noqa: E731
            return token_totals(project, length, weight, hidden, targets, weights).loss

        found = jax.grad(loss)(weight)
        assert found.dtype == weight.dtype
        return np.asarray(found, np.float32)

    want = gradient(weight.astype(jnp.float32), 1024)
    error = np.linalg.norm(gradient(weight, 4) - want) / np.linalg.norm(want)
    assert error < 2.5e-3


def test_padding_has_no_effect(problem):
    """A target of weight zero may be anything, and its hidden state gets no gradient."""
    dead = problem["weights"] == 0
    other = jnp.where(dead, (problem["targets"] + 7) % V, problem["targets"])

    def loss(hidden, targets):
        return token_totals(unembed, 4, problem["params"], hidden, targets, problem["weights"]).loss

    value, grad = jax.value_and_grad(loss)(problem["hidden"], problem["targets"])
    np.testing.assert_array_equal(value, jax.value_and_grad(loss)(problem["hidden"], other)[0])
    assert not np.any(np.asarray(grad)[np.asarray(dead)])


def test_full_logits_never_exist(problem):
    """The largest array with a vocabulary axis is one chunk, in the compiled gradient too."""
    hidden = jnp.zeros((2, 4096, E))
    targets, weights = jnp.zeros((2, 4096), jnp.int32), jnp.ones((2, 4096))

    def loss(params, hidden):
        return token_totals(unembed, 16, params, hidden, targets, weights).loss

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(problem["params"], hidden).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 4096 * V * 4
