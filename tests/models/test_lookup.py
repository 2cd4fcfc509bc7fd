"""Tests lookups in a table that is sharded over a mesh: the same values and gradients, without gathering the table."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ftjax.config import MeshConfig
from ftjax.mesh import make_mesh, spec
from ftjax.models.nn.lookup import rows_of

V, E, B, T = 64, 32, 8, 8
MESHES = [
    {"fsdp": 8}, {"fsdp": 1, "tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2}, {"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 1, "sequence": 4},
]  # fmt: skip


@pytest.mark.parametrize("axes", [("vocab", "embed"), (None, "embed"), ("vocab", "rank")])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows(sizes, axes):
    table, weights = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(V, E), (B, T, E)]))
    ids = jax.random.randint(jax.random.key(2), (B, T), 0, V)

    def total(table, ids):
        return jnp.sum(rows_of(table, axes, ids, jnp.float32) * weights)

    want = jax.value_and_grad(total)(table, ids)
    mesh = make_mesh(MeshConfig(**sizes))
    placed = jax.device_put(table, NamedSharding(mesh, spec(axes)))
    tokens = jax.device_put(ids, NamedSharding(mesh, spec(("batch", "length"))))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(total)).lower(placed, tokens).compile()
    value, gradient = found(placed, tokens)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, want[1], atol=1e-5)
    assert gradient.sharding.is_equivalent_to(placed.sharding, 2), "the gradient lies as its table"
    gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", found.as_text())
    assert set(gathered) <= {"s32"}, "ids only"


def test_a_batch_that_does_not_divide():
    """A batch may have one row, such as a prompt to answer."""
    table = jax.random.normal(jax.random.key(0), (V, E))
    ids = jnp.arange(5, dtype=jnp.int32)[None]
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        got = jax.jit(lambda table, ids: rows_of(table, ("vocab", "embed"), ids, jnp.bfloat16))(table, ids)
    np.testing.assert_array_equal(got, table[ids].astype(jnp.bfloat16))
