"""Tests gated DeltaNets on a mesh: rows, heads and tokens over devices give the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from oracle import attach_full, context, load, make_hf, tokens

from ftjax.config import MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import make_mesh

CASE = next(case for case in CASES if case.name == "qwen3.5")  # two key heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    make_hf(CASE, folder)
    return folder


def gradients(folder, mesh=None):
    """Return the loss and the gradients of all weights for packed rows with padding."""
    model, params = load(folder, attach_full, mesh=mesh)
    ids = tokens(4, 24)
    segments = np.array([[1] * 9 + [2] * 13 + [0] * 2, [0] * 3 + [1] * 21, [1] * 24, [0] * 24], np.int32)
    weights = np.random.default_rng(1).normal(size=(4, 24, 96)).astype(np.float32) * (segments != 0)[..., None]

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        ctx = context(ids, segments)
        module = model.bind(params)
        return jnp.sum(module.unembed(module.hidden(jnp.asarray(ids), ctx)[0], ctx) * weights)

    with jax.set_mesh(mesh or make_mesh(MeshConfig(), jax.devices()[:1])):
        return jax.device_get(loss(params))


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2}], ids=str)
def test_gradients_on_a_mesh_are_those_of_one_device(sizes, folder):
    want, wanted = gradients(folder)
    got, found = gradients(folder, make_mesh(MeshConfig(**sizes)))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for path, gradient in wanted.items():
        np.testing.assert_allclose(found[path], gradient, atol=1e-3 * np.abs(gradient).max(), rtol=0, err_msg=path)
        assert np.abs(gradient).max() > 0, path


def test_heads_that_do_not_divide_are_refused(folder):
    with pytest.raises(UserError, match=r"mesh\.sequence: 4 does not divide the 2 key heads .*choose one of 1, 2"):
        gradients(folder, make_mesh(MeshConfig(fsdp=2, sequence=4)))
