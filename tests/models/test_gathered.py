"""Tests reductions of gradients into each device's shard."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models.nn import gathered


@pytest.mark.parametrize("dimension", [0, 1])
def test_a_reduction_by_halves_is_the_reduction(monkeypatch, dimension):
    """With whole numbers, for which the order of additions does not matter, both give the same gradient."""
    mesh = jax.make_mesh((1, 8), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = np.random.default_rng(0).integers(-9, 9, (8, 16, 32)).astype(np.float32)  # one array for each device
    part = jnp.zeros((8, *[size // 8 if axis == dimension else size for axis, size in enumerate(x.shape[1:])]))

    def each(x, part):
        whole, pull = jax.vjp(lambda part: gathered.joined_parts(part, ("fsdp",), dimension), part[0])
        assert whole.shape == x.shape[1:]
        return gathered.reduced_parts(x[0], "fsdp", dimension)[None], pull(x[0])[0][None]

    for halves in (False, True):
        monkeypatch.setattr(gathered, "_by_halves", lambda *_, halves=halves: halves)
        run = jax.shard_map(each, mesh=mesh, in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp"), check_vma=False)
        for found in jax.jit(run)(x, part):
            np.testing.assert_array_equal(found, np.stack(np.split(x.sum(0), 8, dimension)))


@pytest.mark.parametrize(
    ("kind", "size", "part", "halves"),
    [
        ("TPU v5 lite", 16, 256, True),
        ("TPU v5 lite", 16, 128, False),
        ("TPU v5 lite", 8, 512, False),
        ("TPU v6 lite", 64, 256, True),
        ("TPU v5", 8, 512, True),
        ("TPU v5", 4, 512, False),
        ("cpu", 16, 256, False),
        ("NVIDIA H100 80GB HBM3", 16, 256, False),
    ],
)
def test_where_reductions_go_by_halves(kind, size, part, halves):
    """They are used where libtpu was seen to emit all-reduces: squares and cubes of chips, never on other devices."""
    mesh = SimpleNamespace(abstract_device=SimpleNamespace(device_kind=kind))
    assert gathered._by_halves(mesh, size, part) == halves
