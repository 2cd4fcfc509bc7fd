"""Meshes, and sizes that do not divide."""

import jax
import pytest

from ftjax.config import MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import make_mesh, sharding


def test_open_axis_takes_the_rest():
    shape = make_mesh(MeshConfig(data=2, tensor=2)).shape
    assert (shape["data"], shape["fsdp"], shape["tensor"]) == (2, 2, 2)


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 4}, {"fsdp": 4, "tensor": 4}])
def test_sizes_that_do_not_use_the_devices(sizes):
    with pytest.raises(UserError, match="8 device"):
        make_mesh(MeshConfig(**sizes))


def test_uneven_size_names_parameter_axis_and_what_works():
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8), jax.devices())
    with pytest.raises(UserError) as error:
        sharding(mesh, "model.layers.block.mlp.up_proj.weight", (5, 172, 64), ("layers", "mlp", "embed"))
    for word in ("up_proj", "'mlp'", "172", "tensor=8", "1, 2, 4"):
        assert word in str(error.value)
