"""Tests the state space of Mamba-2 in chunks against the recurrence that defines it, and against transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from packed import ROWS, segments
from transformers.models.bamba.modeling_bamba import mamba2_chunk_scan

from ftjax.models.nn.recurrence import recur
from ftjax.models.nn.ssd import state_space

B, K, N, H, D = 2, 2, 6, 8, 10


def inputs(t: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x, state = rng.normal(size=(B, t, N, D)), rng.normal(size=(B, N, H, D))
    b, c = rng.normal(size=(2, B, t, K, H))
    step, rate = np.exp(rng.normal(size=(B, t, N)) - 1), -np.exp(rng.normal(size=N))
    return tuple(value.astype(np.float32) for value in (x, b, c, step, rate, state))


def by_token(x, b, c, step, rate, state, ids):
    """Compute the recurrence as its definition says."""

    def token(state, own):
        x, b, c, step = own
        state = jnp.exp(step * rate)[..., None, None] * state + jnp.einsum("bnh,bnd,bn->bnhd", b, x, step)
        return state, jnp.einsum("bnhd,bnh->bnd", state, c)

    b, c = (jnp.repeat(value, N // K, axis=2) for value in (b, c))
    return recur(token, state, (x, b, c, step), ids)


def in_float64(x, b, c, step, rate, state, ids) -> tuple[np.ndarray, np.ndarray]:
    """Compute the recurrence in NumPy, one number of a token at a time."""
    x, b, c, step, rate, state = (value.astype(np.float64) for value in (x, b, c, step, rate, state))
    y = np.zeros(x.shape)
    for row in range(B):
        document = ids[row, 0]
        for t in np.flatnonzero(ids[row]):
            if t and ids[row, t] not in (0, document):
                state[row] = 0
            document = ids[row, t]
            for n in range(N):
                own, group = state[row, n], n // (N // K)
                own *= np.exp(step[row, t, n] * rate[n])
                own += step[row, t, n] * np.outer(b[row, t, group], x[row, t, n])
                y[row, t, n] = c[row, t, group] @ own
    return y, state


@partial(jax.jit, static_argnames="compute")
def learn(values, weights, ids, compute):
    """Return `((loss, (outputs, last state)), gradients)`."""
    real = (ids != 0).astype(jnp.float32)[..., None, None]

    def total(*values):
        y, state = compute(*values, ids)
        return jnp.sum(y * real * weights[0]) + jnp.sum(state * weights[1]), (y * real, state)

    return jax.value_and_grad(total, argnums=range(6), has_aux=True)(*values)


SPACES = {chunk: partial(state_space, chunk=chunk) for chunk in (16, 64)}


@pytest.mark.parametrize("chunk", SPACES)
@pytest.mark.parametrize("rows", ROWS)
def test_chunks_are_the_recurrence(rows, chunk):
    """Outputs, the last state and all gradients agree, whether or not documents end with a chunk."""
    ids = np.stack([segments(lengths) for lengths in ROWS[rows]])
    values, rng = inputs(ids.shape[1]), np.random.default_rng(1)
    weights = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((B, ids.shape[1], N, D), (B, N, H, D)))
    (_, exact), wanted = learn(values, weights, ids, by_token)
    (_, got), gradients = learn(values, weights, ids, SPACES[chunk])
    for a, b in zip((*in_float64(*values, ids), *exact, *wanted), (*got, *got, *gradients), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * max(1, np.abs(a).max()), rtol=0)


def test_chunks_are_those_of_transformers():
    x, b, c, step, rate, state = values = inputs(150)
    got = jax.jit(state_space)(*values, np.ones((B, 150), np.int32))
    x, b, c, step, rate, state = map(torch.tensor, values)
    want = mamba2_chunk_scan(
        x, step, rate, b, c, 32, initial_states=state.transpose(-1, -2), return_final_states=True, dt_softplus=False
    )
    for a, b in zip(got, (want[0], want[1].transpose(-1, -2)), strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-5 * float(b.abs().max()), rtol=0)


def test_a_document_does_not_change_the_next_one_by_a_bit():
    """Neither its values nor the decay that it has gathered reach the next document, in the same chunk or a later one; nor do
    gradients go back."""
    ids = np.stack([segments([20, 100]), segments([70, -3, 47])])
    one, two = inputs(120), inputs(120, seed=1)
    late = np.arange(120) >= np.array([[20], [73]])
    two = [np.where(late.reshape(2, 120, *(1,) * (a.ndim - 2)), a, b) for a, b in zip(one[:4], two[:4], strict=True)]
    compute = jax.jit(state_space)
    (a, last), (b, other) = compute(*one, ids), compute(*two, one[4], one[5] * 2, ids)
    np.testing.assert_array_equal(np.asarray(a)[late], np.asarray(b)[late])
    np.testing.assert_array_equal(last, other)
    assert np.abs(np.asarray(a) - np.asarray(b))[~late & (ids != 0)].max() > 0.1
    weights = late[..., None, None].astype(np.float32)
    *tokens, state = jax.jit(jax.grad(lambda *own: jnp.sum(state_space(*own, ids)[0] * weights), argnums=(0, 1, 3, 5)))(*one)
    for gradient in tokens:
        assert not np.asarray(gradient)[~late].any() and np.asarray(gradient)[late].any()
    assert not np.asarray(state).any()


def test_one_token_at_a_time():
    x, b, c, step, rate, state = inputs(5)
    ids = np.ones((B, 5), np.int32)
    compute = jax.jit(state_space)
    want, last = compute(x, b, c, step, rate, state, ids)
    for t in range(5):
        own = (value[:, t : t + 1] for value in (x, b, c, step))
        y, state = compute(*own, rate, state, ids[:, :1])
        np.testing.assert_allclose(y[:, 0], want[:, t], atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)
    own = (value[:, :1] for value in (x, b, c, step))
    np.testing.assert_array_equal(compute(*own, rate, last, 0 * ids[:, :1])[1], last)  # padding
