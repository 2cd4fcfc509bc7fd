"""Tests which values a layer keeps for its backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ftjax.models.llama import LlamaAttention
from ftjax.models.nn.attention_splash import splash
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import RMSNorm
from ftjax.models.nn.param import variables
from ftjax.models.nn.remat import projected


def kept(f, *values) -> list[tuple[int, ...]]:
    """Return the shapes of the values that `f` keeps for its gradient."""
    found = []

    def run(*values):
        out, pull = jax.vjp(f, *values)
        found.extend(leaf.shape for leaf in jax.tree.leaves(pull))
        return out

    jax.eval_shape(run, *values)
    return found


def test_attention_keeps_its_result_as_the_next_product_reads_it():
    """It is kept once, by tokens, with one log-sum-exp per query."""
    b, t, n, h = 2, 256, 4, 16
    x = jnp.zeros((b, t, n, h), jnp.bfloat16)
    segments = jnp.ones((b, t), jnp.int32)
    shapes = kept(lambda q, k, v: splash(q, k, v, segments, None, Pattern(scale=1.0), interpret=True), x, x, x)
    assert shapes.count((b, t, n * h)) == 1
    assert shapes.count((b, n, t, h)) == 3  # queries, keys and values
    assert shapes.count((b, n, t)) == 1


@pytest.mark.parametrize("trained", [False, True])
def test_inputs_of_trained_projections_are_made_again(trained):
    """A recomputed layer with sharded weights keeps x but not its norm; the gradients are those of a layer that keeps both."""
    embed, heads, kv_heads, head_dim = 16, 4, 2, 6
    attention, norm = LlamaAttention(embed, heads, kv_heads, head_dim, bias=False), RMSNorm(embed, 1e-6)
    rng = np.random.default_rng(0)
    for module in (attention, norm):
        for _, variable in variables(module):
            variable.set_value(jnp.asarray(rng.normal(size=variable.get_value().shape), jnp.float32))
            variable.set_metadata("row", variable.row.__class__(**{**vars(variable.row), "trainable": trained}))
    x = jnp.asarray(rng.normal(size=(8, 10, embed)), jnp.float32)
    (structure, state), (normal, scale) = nnx.split(attention), nnx.split(norm)

    def run(remat, state, scale, x):
        ctx = Context(jnp.zeros((8, 10), jnp.int32), jnp.ones((8, 10), jnp.int32), remat=remat)
        return projected(nnx.merge(normal, scale), nnx.merge(structure, state), x, ctx)

    mesh = jax.make_mesh(
        (1, 8, 1, 1, 1), ("data", "fsdp", "expert", "tensor", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 5
    )
    with jax.set_mesh(mesh):
        shapes = {remat: kept(lambda *values, remat=remat: run(remat, *values), state, scale, x) for remat in ("full", "dots")}
        assert shapes["full"].count(x.shape) == 1 if trained else shapes["full"] == shapes["dots"]
        assert shapes["dots"].count(x.shape) > 1

        def loss(remat, *values):
            return sum(jnp.sum(part**2) for part in run(remat, *values))

        found, want = (
            jax.jit(jax.grad(lambda *values, remat=remat: loss(remat, *values), (0, 1, 2)))(state, scale, x)
            for remat in ("full", "dots")
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, want)
