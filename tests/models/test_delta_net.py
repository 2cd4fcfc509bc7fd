"""Tests gated DeltaNets on a mesh: rows, heads and tokens over devices give the numbers of one device."""

import numpy as np
import pytest
from cases import CASES
from oracle import make_hf, packed_gradients

from ftjax.config import MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import make_mesh

CASE = next(case for case in CASES if case.name == "qwen3.5")  # two key heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    make_hf(CASE, folder)
    return folder


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 4, "sequence": 2}, marks=pytest.mark.sweep)], ids=str
)
def test_gradients_on_a_mesh_are_those_of_one_device(sizes, folder):
    want, wanted = packed_gradients(folder)
    got, found = packed_gradients(folder, make_mesh(MeshConfig(**sizes)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)  # a sum of 6,432 terms of either sign, which may nearly cancel
    for path, gradient in wanted.items():
        np.testing.assert_allclose(found[path], gradient, atol=1e-3 * np.abs(gradient).max(), rtol=0, err_msg=path)
        assert np.abs(gradient).max() > 0, path


def test_heads_that_do_not_divide_are_refused(folder):
    with pytest.raises(UserError, match=r"mesh\.sequence: 4 does not divide the 2 key heads .*choose one of 1, 2"):
        packed_gradients(folder, make_mesh(MeshConfig(fsdp=2, sequence=4)))
