"""Tests that stochastic rounding is right on average, and that moments in few bits follow those in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax.train.moments import scale_by_held_adam
from ftjax.train.rounding import to_bfloat16, to_steps


def test_bfloat16_on_average():
    """Each number becomes one of its two neighbours, more often the nearer one."""
    x = jnp.asarray([1.0, 1.001, -1.006, 3e-20, 0.0, 1.5], jnp.float32)
    drawn = jax.vmap(lambda salt: to_bfloat16(x, salt).astype(jnp.float32))(jnp.arange(4000))
    drawn = np.asarray(drawn).astype(np.float64)
    np.testing.assert_allclose(drawn.mean(axis=0), x, rtol=2e-4)
    down = np.asarray(x).view(np.uint32) & 0xFFFF0000
    for column, low in zip(drawn.T, down, strict=True):
        assert set(column) <= {float(np.uint32(bits).view(np.float32)) for bits in (low, low + 0x10000)}
    assert set(drawn[:, 0]) == {1.0} and len(set(drawn[:, 1])) == 2
    odd = to_bfloat16(jnp.asarray([jnp.inf, -jnp.inf, jnp.nan]), jnp.int32(3))
    assert odd[0] == jnp.inf and odd[1] == -jnp.inf and jnp.isnan(odd[2])


def test_steps_on_average():
    x = jnp.asarray([0.0, 0.25, -3.7, 126.999], jnp.float32)
    drawn = np.asarray(jax.vmap(lambda salt: to_steps(x, salt))(jnp.arange(4000)))
    np.testing.assert_allclose(drawn.mean(axis=0), x, atol=0.03)
    assert set(drawn[:, 0]) == {0} and set(drawn[:, 2]) == {-4, -3}


@pytest.mark.parametrize("dtype, off", [("bfloat16", 0.06), ("int8", 0.3)])
def test_moments_follow_float32(dtype, off):
    """400 updates have the same gradients, whose sizes span a factor of a thousand within a row. Rounded to nearest, the second
    moment in bfloat16 would not change at all."""
    rng = np.random.default_rng(0)
    sizes = np.repeat(np.logspace(-3, 0, 4), 256).astype(np.float32)[None]
    params = {"w": jnp.zeros((1, 1024)), "norm": jnp.zeros(300), "scalar": jnp.zeros(())}
    held, exact = scale_by_held_adam(0.9, 0.999, 1e-8, dtype), optax.scale_by_adam(0.9, 0.999, 1e-8)
    states, updates = [held.init(params), exact.init(params)], [jax.jit(held.update), jax.jit(exact.update)]
    for _ in range(400):
        grads = {name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for name, leaf in params.items()}
        grads["w"] *= sizes
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            (got, states[0]), (want, states[1]) = (update(grads, s) for update, s in zip(updates, states, strict=True))
    for name in ("w", "norm"):
        error = np.sqrt(np.mean(np.square(got[name] - want[name])) / np.mean(np.square(want[name])))
        assert error < off, (name, error)
    assert states[0].mu["w"].dtype == dtype and states[0].nu["w"].shape == (1, 1024)
