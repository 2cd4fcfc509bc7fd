"""Tests that exchanges wait for each other on CPUs, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ftjax.config import MeshConfig
from ftjax.mesh import make_mesh
from ftjax.models.nn.in_turn import in_turn


def bodies(jaxpr):
    """Yield a jaxpr and those inside it."""
    yield jaxpr
    for one in jaxpr.eqns:
        for value in one.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from bodies(inner)


def exchanges_behind(jaxpr) -> list[int]:
    """Return, for each exchange in order, how many exchanges it depends on."""
    behind, found = {}, []
    for one in jaxpr.eqns:
        before = set().union(*(behind.get(var, set()) for var in one.invars if not hasattr(var, "val")))
        if one.primitive.name == "all_to_all":
            found.append(len(before))
            before = before | {len(found)}
        behind.update(dict.fromkeys(one.outvars, before))
    return found


def test_each_waits_for_the_one_before():
    mesh = make_mesh(MeshConfig(fsdp=1, expert=2), jax.devices()[:2])
    exchange = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
    rows = PartitionSpec("expert")

    @partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    def three(x):
        return sum(in_turn(exchange, x, 2 * x, 3 * x))

    x = jnp.arange(8.0)
    with jax.set_mesh(mesh):
        forward = jax.make_jaxpr(three)(x)
        backward = jax.make_jaxpr(lambda x, y: jax.vjp(three, x)[1](y))(x, x)
        value, pull = jax.vjp(three, x)
        assert (value == 6 * jnp.array([0, 1, 4, 5, 2, 3, 6, 7.0])).all() and (pull(value)[0] == 36 * x).all()
    counts = [found for jaxpr in (forward, backward) for body in bodies(jaxpr.jaxpr) if (found := exchanges_behind(body))]
    assert counts and all(found == list(range(len(found))) for found in counts), counts
    assert sum(map(len, counts)) == 3 + 6
