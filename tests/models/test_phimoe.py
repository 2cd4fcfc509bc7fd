"""Tests what only Phi-3.5-MoE has: a router with two choices, and a factor on RoPE that depends on the length of a text."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES
from oracle import load, make_hf
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from ftjax.errors import UserError
from ftjax.models.phimoe import SparseMixer

CASE = next(case for case in CASES if case.name == "phimoe")


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 2.0])
def test_choices_and_weights_are_those_of_transformers(jitter):
    """Rivals that are close share the weight with the choice; negative scores and equal ones are among them."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1, 64, 6)).astype(np.float32)
    scores[0, :8] *= 0.05
    scores[0, 8:16] -= 4
    scores[0, 16, 1:] = scores[0, 16, 0]
    router = SparseMixer(6, 6, jitter)
    router.weight.set_value(jnp.eye(6, dtype=jnp.float32))
    _, chosen, weights = router(jnp.asarray(scores))
    want, which = sparsemixer(torch.tensor(scores[0]), jitter, training=False)
    np.testing.assert_array_equal(chosen[0], which.numpy())
    np.testing.assert_allclose(weights[0], want.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts_per_tok": 3}, "chooses two experts"),
        ({"tie_word_embeddings": True}, "a tied output has no bias"),
        ({"rope_parameters": {
            "rope_type": "linear", "rope_theta": 500.0, "factor": 2.0, "short_mscale": 1.0, "long_mscale": 1.0,
            "original_max_position_embeddings": 16,
        }}, "rope_type 'linear' of this phimoe model is not supported"),
    ],
)  # fmt: skip
def test_what_the_family_cannot_express_is_refused(values, message, tmp_path):
    make_hf(CASE, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_noise_of_training_is_a_note_and_factors_of_rope_are_none(tmp_path):
    make_hf(CASE, tmp_path)
    notes = load(tmp_path)[0].notes
    assert len(notes) == 1 and "router_jitter_noise = 0.2" in notes[0]
