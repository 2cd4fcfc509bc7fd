"""Tests the gated delta rule in chunks against the recurrence that defines it, and against transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from packed import ROWS, segments
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from ftjax.models.nn.delta_rule import gated_delta_rule, normalised, unit_lower_inverse
from ftjax.models.nn.recurrence import recur
from ftjax.models.nn.short_convolution import causal_conv

B, K, N, D, V = 2, 2, 6, 8, 10


def inputs(t: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, t, K, D))
    v, g, beta = rng.normal(size=(B, t, N, V)), -np.exp(rng.normal(size=(B, t, N))), rng.uniform(size=(B, t, N))
    return tuple(x.astype(np.float32) for x in (q, k, v, g, beta, rng.normal(size=(B, N, D, V))))


def by_token(q, k, v, g, beta, state, ids):
    """Compute the rule as its definition says."""

    def step(state, own):
        q, k, v, g, beta = own
        state = state * jnp.exp(g)[..., None, None]
        wrong = v - jnp.einsum("bndv,bnd->bnv", state, k)
        state = state + jnp.einsum("bnd,bnv,bn->bndv", k, wrong, beta)
        return state, jnp.einsum("bndv,bnd->bnv", state, q)

    q, k = (jnp.repeat(normalised(x), N // K, axis=2) for x in (q, k))
    return recur(step, state, (q * D**-0.5, k, v, g, beta), ids)


@partial(jax.jit, static_argnames="rule")
def learn(values, weights, ids, rule):
    """Return `((loss, (outputs, last state)), gradients)` of a rule."""
    real = (ids != 0).astype(jnp.float32)[..., None, None]

    def total(*values):
        y, state = rule(*values, ids)
        return jnp.sum(y * real * weights[0]) + jnp.sum(state * weights[1]), (y * real, state)

    return jax.value_and_grad(total, argnums=range(6), has_aux=True)(*values)


RULES = {chunk: partial(gated_delta_rule, chunk=chunk) for chunk in (16, 64)}


@pytest.mark.parametrize("chunk", RULES)
@pytest.mark.parametrize("rows", ROWS)
def test_chunks_are_the_recurrence(rows, chunk):
    """Outputs, the last state and all gradients agree, whether or not documents end with a chunk."""
    ids = np.stack([segments(lengths) for lengths in ROWS[rows]])
    values = inputs(ids.shape[1])
    rng = np.random.default_rng(1)
    weights = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((B, ids.shape[1], N, V), (B, N, D, V)))
    (_, want), wanted = learn(values, weights, ids, by_token)
    (_, got), gradients = learn(values, weights, ids, RULES[chunk])
    for a, b in zip((*want, *wanted), (*got, *gradients), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1, np.abs(a).max()), rtol=0)


def test_chunks_are_those_of_transformers():
    values = inputs(150)
    got = jax.jit(gated_delta_rule)(*values, np.ones((B, 150), np.int32))
    *own, state = map(torch.tensor, values)
    want = torch_chunk_gated_delta_rule(*own, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-5, rtol=0)


def test_a_document_does_not_change_the_next_one_by_a_bit():
    """Neither its values nor the decay that it has gathered reach the next document, in the same chunk or a later one."""
    ids = np.stack([segments([20, 100]), segments([70, -3, 47])])
    one, two = inputs(120), inputs(120, seed=1)
    late = np.arange(120) >= np.array([[20], [73]])
    two = [np.where(late.reshape(2, 120, *(1,) * (a.ndim - 2)), a, b) for a, b in zip(one[:5], two[:5], strict=True)]
    rule = jax.jit(gated_delta_rule)
    (a, last), (b, other) = rule(*one, ids), rule(*two, one[5] * 2, ids)
    np.testing.assert_array_equal(np.asarray(a)[late], np.asarray(b)[late])
    np.testing.assert_array_equal(last, other)
    assert np.abs(np.asarray(a) - np.asarray(b))[~late & (ids != 0)].max() > 0.1


def test_one_token_at_a_time():
    q, k, v, g, beta, state = inputs(5)
    ids = np.ones((B, 5), np.int32)
    rule = jax.jit(gated_delta_rule)
    want, last = rule(q, k, v, g, beta, state, ids)
    for t in range(5):
        own = (x[:, t : t + 1] for x in (q, k, v, g, beta))
        y, state = rule(*own, state, ids[:, :1])
        np.testing.assert_allclose(y[:, 0], want[:, t], atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)
    own = (x[:, :1] for x in (q, k, v, g, beta))
    np.testing.assert_array_equal(rule(*own, last, 0 * ids[:, :1])[1], last)  # padding


def test_repeated_tokens_lose_no_digits():
    """The same key again and again, at full strength and without decay: powers of the system would reach 1e18."""
    a = np.tril(np.ones((64, 64), np.float32), -1)
    want = np.linalg.inv(np.eye(64) + a.astype(np.float64))
    np.testing.assert_allclose(jax.jit(unit_lower_inverse)(a), want, atol=1e-6)
    rng = np.random.default_rng(0)
    a = np.tril(rng.normal(size=(3, 64, 64)), -1).astype(np.float32) * 0.3
    want = np.linalg.inv(np.eye(64) + a.astype(np.float64))
    np.testing.assert_allclose(jax.jit(unit_lower_inverse)(a), want, atol=1e-5 * np.abs(want).max())


def test_the_gradient_of_the_inverse():
    a, weights = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32) * 0.3
    got = jax.jit(jax.grad(lambda a: jnp.sum(unit_lower_inverse(jnp.tril(a, -1)) * weights)))(a)
    want = jax.jit(jax.grad(lambda a: jnp.sum(jnp.linalg.inv(jnp.eye(16) + jnp.tril(a, -1)) * weights)))(a)
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


convolve = jax.jit(causal_conv)


@pytest.mark.parametrize("rows", ROWS)
def test_convolution(rows):
    """A document alone has the outputs of `torch.nn.functional.conv1d`, and the last inputs are remembered."""
    ids = np.stack([segments(lengths) for lengths in ROWS[rows]])
    rng, t = np.random.default_rng(0), ids.shape[1]
    x, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((B, t, 5), (4, 5), (5,)))
    y, last = map(np.asarray, convolve(x, weight, np.zeros((B, 3, 5), np.float32), ids, bias))
    for row in range(B):
        for document in range(1, ids.max() + 1):
            own = np.flatnonzero(ids[row] == document)
            if len(own):
                part = torch.tensor(x[row, own].T[None])
                kernel = torch.tensor(weight.T[:, None])
                want = torch.nn.functional.conv1d(part, kernel, torch.tensor(bias), padding=3, groups=5)[0, :, : len(own)]
                np.testing.assert_allclose(y[row, own], want.numpy().T, atol=1e-5)
        end = np.flatnonzero(ids[row])[-1] + 1 if ids[row].any() else 0
        np.testing.assert_array_equal(last[row], np.concatenate([np.zeros((3, 5)), x[row]])[end : end + 3])
