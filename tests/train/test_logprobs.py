"""Tests log-probabilities in chunks against the full logits: values and gradients, for any loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from processes import ALL

from ftjax.mesh import AXES
from ftjax.objectives.logprobs import segment_sums, token_logprobs
from ftjax.objectives.loss import keep_sharding
from ftjax.objectives.projection import Projection

B, T, E, V = 4, 12, 8, 31


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 2, (B, T))
    wanted[1] = 0
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(V, E)), jnp.float32), "b": jnp.asarray(rng.normal(size=V), jnp.float32)},
        "hidden": jnp.asarray(rng.normal(size=(B, T, E)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "wanted": jnp.asarray(wanted, jnp.float32),
        "segments": jnp.asarray(np.sort(rng.integers(0, 4, (B, T)), axis=1)[:, ::-1].copy(), jnp.int32),
    }


def unembed(params, hidden):
    return 5 * jnp.tanh((hidden @ params["w"].T + params["b"]) / 5)  # with a softcap


def full(params, hidden, problem):
    """Return log-probabilities and entropy `[B, T]` from all logits at once."""
    logp = jax.nn.log_softmax(unembed(params, hidden))
    own = jnp.take_along_axis(logp, problem["targets"][..., None], -1)[..., 0]
    return own * problem["wanted"], -jnp.sum(jnp.exp(logp) * logp, -1) * problem["wanted"]


def curved(logprobs, entropy, problem):
    """Return a loss that is not a weighted sum over tokens: a product over documents, as in preference losses, and an entropy
    bonus."""
    sums = segment_sums(logprobs, problem["segments"], 3)
    return -jnp.sum(jax.nn.log_sigmoid(sums[:, 0] - 0.3 * sums[:, 1])) + 0.1 * jnp.sum(entropy**2)


@pytest.mark.parametrize("chunk", [1, 5, 12, 64] if ALL else [5, 64])
@pytest.mark.parametrize("masked", [True, False])
def test_chunked_is_full(problem, chunk, masked):
    problem = problem if masked else {**problem, "wanted": jnp.ones((B, T))}

    def chunked(params, hidden):
        output = Projection(unembed, params, keep_sharding)
        wanted = problem["wanted"] if masked else None
        found = token_logprobs(output, hidden, problem["targets"], chunk, wanted, entropy=True)
        return curved(found.logprobs, found.entropy, problem), found

    arguments = problem["params"], problem["hidden"]
    want, want_grads = jax.jit(jax.value_and_grad(lambda p, h: curved(*full(p, h, problem), problem), (0, 1)))(*arguments)
    (got, found), got_grads = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(*arguments)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5), got_grads, want_grads)
    for one, other in zip((found.logprobs, found.entropy), jax.jit(lambda p, h: full(p, h, problem))(*arguments), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_most_likely_tokens(problem):
    output = Projection(unembed, problem["params"], keep_sharding)
    found = token_logprobs(output, problem["hidden"], problem["targets"], 4, problem["wanted"], top=3)
    logp = jax.nn.log_softmax(unembed(problem["params"], problem["hidden"]))
    want = np.argsort(-np.asarray(logp), axis=-1)[..., :3]
    on = np.asarray(problem["wanted"]) > 0
    np.testing.assert_array_equal(np.asarray(found.top[0])[on], want[on])
    np.testing.assert_allclose(np.asarray(found.top[1])[on], np.take_along_axis(np.asarray(logp), want, -1)[on], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found.greedy)[on], (want[..., 0] == problem["targets"])[on])
    assert not np.asarray(found.greedy)[~on].any() and not np.asarray(found.top[1])[~on].any()


def test_logits_of_minus_infinity():
    """Impossible words contribute nothing to the entropy or its gradient."""
    logits = jnp.array([[[0.0, 1.0, -jnp.inf]]])

    def entropy(logits):
        output = Projection(lambda params, hidden: hidden, {}, keep_sharding)
        return token_logprobs(output, logits, jnp.array([[1]]), 1, entropy=True).entropy.sum()

    value, gradient = jax.value_and_grad(entropy)(logits)
    p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    np.testing.assert_allclose(value, -(p * np.log(p)).sum(), rtol=1e-6)
    assert np.isfinite(np.asarray(gradient)[..., :2]).all()


def test_full_logits_never_exist(problem):
    """The largest array with a vocabulary axis is one chunk, in the compiled gradient too."""
    hidden, targets = jnp.zeros((2, 4096, E)), jnp.zeros((2, 4096), jnp.int32)

    def loss(params, hidden):
        found = token_logprobs(Projection(unembed, params, keep_sharding), hidden, targets, 16)
        return jnp.sum(found.logprobs**2)

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(problem["params"], hidden).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 4096 * V * 4


def test_sharded(problem):
    """Rows are sharded over four devices, the length over two."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")

    def loss(params, hidden):
        output = Projection(unembed, params, keep_sharding)
        found = token_logprobs(output, hidden, problem["targets"], 5, problem["wanted"], entropy=True)
        return curved(found.logprobs, found.entropy, problem)

    run = jax.value_and_grad(loss, (0, 1))
    want = run(problem["params"], problem["hidden"])
    shape = [{"data": 4, "sequence": 2}.get(axis, 1) for axis in AXES]
    with jax.set_mesh(Mesh(np.array(jax.devices()[:8]).reshape(shape), AXES)):
        got = jax.jit(run)(problem["params"], problem["hidden"])
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5, rtol=1e-5), got, want)


def test_segment_sums():
    values, ids = jnp.array([[1.0, 2, 4, 8, 16]]), jnp.array([[1, 1, 2, 0, 3]])
    np.testing.assert_array_equal(segment_sums(values, ids, 4), [[3, 4, 16, 0]])
    np.testing.assert_array_equal(segment_sums(values, ids, 1), [[3]])
