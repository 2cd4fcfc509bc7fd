"""Tests layers of Mamba-2: limits of its steps, and rows, heads and tokens over devices."""

import numpy as np
import pytest
from oracle import Case, hf_logits, load, logits, make_hf, packed_gradients, tokens

from ftjax.config import MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import make_mesh

SIZES = {
    "num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 4, "rms_norm_eps": 1e-3,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("limits", [(0.0, 0.6), (1.5, 4.0)], ids=str)
def test_limits_of_the_steps(limits, tmp_path):
    """Steps are bounded as in transformers' passes over whole rows, and config.json keeps a limit that JSON has no word for."""
    make_hf(Case("bamba", "bamba", SIZES), tmp_path / "free")
    hf = make_hf(Case("bamba", "bamba", {**SIZES, "time_step_limit": limits}), tmp_path / "limited")
    ids = tokens(1, 20)
    got = logits(*load(tmp_path / "limited"), ids)
    np.testing.assert_allclose(got, hf_logits(hf, ids), atol=1e-4, rtol=0)
    assert np.abs(got - logits(*load(tmp_path / "free"), ids)).max() > 1e-2


def test_groups_that_do_not_divide_the_heads_are_refused(tmp_path):
    with pytest.raises(UserError, match="8 heads of Mamba-2 in 3 groups"):
        make_hf(Case("bamba", "bamba", {**SIZES, "mamba_n_groups": 3}), tmp_path)
        load(tmp_path)


@pytest.mark.parametrize("groups", [2, 4])
def test_gradients_on_a_mesh_are_those_of_one_device(groups, tmp_path):
    """Over four devices, each has two of eight heads: those of a whole group, or half of a group that another has too."""
    make_hf(Case("bamba", "bamba", {**SIZES, "mamba_n_groups": groups}), tmp_path)
    want, wanted = packed_gradients(tmp_path)
    got, found = packed_gradients(tmp_path, make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)  # a sum of 6,432 terms of either sign, which may nearly cancel
    for path, gradient in wanted.items():
        np.testing.assert_allclose(found[path], gradient, atol=1e-3 * np.abs(gradient).max(), rtol=0, err_msg=path)
        assert np.abs(gradient).max() > 0, path


def test_heads_that_do_not_divide_are_refused(tmp_path):
    make_hf(Case("bamba", "bamba", {**SIZES, "mamba_n_heads": 2}), tmp_path)
    with pytest.raises(
        UserError, match=r"mesh\.sequence: 4 does not divide the 2 heads of Mamba-2, in 1 groups, .*choose one of 1, 2"
    ):
        packed_gradients(tmp_path, make_mesh(MeshConfig(fsdp=2, sequence=4)))
