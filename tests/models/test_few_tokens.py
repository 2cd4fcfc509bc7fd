"""Tests products with few tokens on a CPU: the weight is the left factor, and values and gradients are the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import one_device

from ftjax.models.nn import layers
from ftjax.models.nn.layers import project

IN, OUT = 24, 40


def arrays(tokens: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(tokens)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((tokens, 1, IN), (OUT, IN)))


def products(text: str) -> set[str]:
    """Return the shapes of the results of all products of a compiled program."""
    return set(re.findall(r"f32\[([\d,]+)\]\S* dot\(", text))


@pytest.mark.parametrize("tokens", [1, 5, layers.FEW, layers.FEW + 1])
def test_values_and_gradients(tokens):
    x, weight = arrays(tokens)
    with jax.set_mesh(one_device()):
        y, pull = jax.vjp(jax.jit(project), x, weight)
        d_x, d_weight = pull(jnp.cos(y))
    d_y = np.cos(np.asarray(y, np.float64))
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(weight).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x, d_y @ np.asarray(weight), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_weight, np.einsum("bto,bti->oi", d_y, x), rtol=1e-5, atol=1e-5)


def test_the_weight_is_the_left_factor_of_few_tokens():
    def compiled(tokens: int) -> str:
        with jax.set_mesh(one_device()):
            return jax.jit(lambda x, weight: project(x, weight) + 1).lower(*arrays(tokens)).compile().as_text()

    assert products(compiled(16)) == {f"{OUT},16"}
    assert products(compiled(layers.FEW + 1)) == {f"{layers.FEW + 1},{OUT}"}
