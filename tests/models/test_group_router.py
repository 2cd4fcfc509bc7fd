"""Tests the routers that choose groups of experts, their correction bias, and what config.json may say of them."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from cases import CASES
from oracle import attach_full, hf_config, load, logits, make_hf, tokens, write_merged
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from ftjax.config import FullConfig, LoraConfig
from ftjax.errors import UserError
from ftjax.hub.model_folder import from_params, model_tensors, write_folder
from ftjax.methods import method_of
from ftjax.models.facts import complete_config
from ftjax.models.model import Model, build_module
from ftjax.models.nn.group_router import GroupRouter, Groups

CASE = next(case for case in CASES if case.name == "deepseek-v3")
BIAS = "e_score_correction_bias"


def config_of(**changes) -> dict:
    return {**complete_config(hf_config(CASE).to_dict(), CASE.name), **changes}


def test_the_correction_bias_stays_float32_in_a_bfloat16_model(tmp_path):
    """As in transformers, in memory and on disk, bit for bit."""
    make_hf(CASE, tmp_path / "float32")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path / "in")
    model, params = load(tmp_path / "in", dtype=jnp.bfloat16)
    assert {str(value.dtype) for path, value in params.items() if path.endswith(BIAS)} == {"float32"}
    (tmp_path / "out").mkdir()
    tensors = model_tensors(model, from_params(params), params, FullConfig(), ml_dtypes.bfloat16)
    write_folder(tmp_path / "out", model, tensors, "bfloat16", tmp_path / "in")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert want.keys() == got.keys() and any(name.endswith(BIAS) for name in want)
    for name in want:
        assert want[name].dtype == got[name].dtype and want[name].tobytes() == got[name].tobytes(), name


@pytest.mark.parametrize("method", [FullConfig(), FullConfig(train=["mlp"]), LoraConfig(modules_to_save=["mlp.gate"])], ids=str)
def test_no_method_trains_the_correction_bias(method):
    config = config_of()
    root = build_module(config)
    method_of(method).attach(root, method)
    model = Model.of(root, config)
    assert any(path.endswith("gate.weight") for path in model.trainable)
    assert not any(path.endswith(BIAS) for path in model.trainable)


def test_a_method_that_would_train_only_the_bias_says_so():
    with pytest.raises(UserError, match="matches no parameter"):
        method = FullConfig(train=[BIAS])
        method_of(method).attach(build_module(config_of()), method)


def test_the_bias_changes_the_choice_and_not_the_weights(tmp_path):
    """A large bias for three experts of kept groups makes all tokens choose them, with the weights of their scores."""
    hf = make_hf(CASE, tmp_path)
    for layer in hf.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[:] = torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0])
    hf.save_pretrained(tmp_path)
    _, params = load(tmp_path)
    path = next(path for path in params if path.endswith("gate.weight"))
    router = GroupRouter(32, 8, 3, scores="sigmoid", groups=Groups(4, 2, 2), normalise=True, scale=2.5, corrected=True)
    router.weight.set_value(params[path][0])
    router.e_score_correction_bias.set_value(params[path.replace("weight", BIAS)][0])
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    scores, chosen, weights = router(x)
    assert set(np.unique(chosen)) == {0, 1, 2}
    want = jnp.take_along_axis(jax.nn.sigmoid(scores), chosen, axis=-1)
    np.testing.assert_allclose(weights, 2.5 * want / want.sum(-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"n_group": 3}, {"n_group": None}, {"n_group": 8}, {"topk_group": 5}, {"topk_group": None}, {"topk_group": 1},
        {"num_experts_per_tok": None}, {"num_experts_per_tok": 5},
    ],
    ids=str,
)  # fmt: skip
def test_groups_that_cannot_be_are_refused(change):
    with pytest.raises(UserError, match="the groups must be of equal size"):
        build_module(config_of(**change))


@pytest.mark.parametrize(
    "change", [{"scoring_func": "softmax"}, {"topk_method": "greedy"}, {"moe_layer_freq": 2}, {"first_k_dense_replace": None}],
    ids=str,
)  # fmt: skip
def test_fields_of_the_original_code_mean_what_they_say_or_are_refused(change):
    [(name, value)] = change.items()
    with pytest.raises(UserError, match=f"{name} = {value!r}"):
        build_module(config_of(**change))
    same = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "seq_aux": True, "aux_loss_alpha": 0.1}
    build_module(config_of(**same, ep_size=1))


def test_layers_that_predict_further_tokens_are_kept(tmp_path):
    """They change no logits, and an export has them bit for bit."""
    make_hf(CASE, tmp_path)
    ids = tokens(1, 9)
    want = logits(*load(tmp_path), ids)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    more = {name.replace("layers.3.", "layers.4."): value for name, value in tensors.items() if "layers.3." in name}
    more |= {"model.layers.4.eh_proj.weight": np.zeros((32, 64), np.float32)}
    save_file(tensors | more, file)
    np.testing.assert_array_equal(logits(*load(tmp_path), ids), want)
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", *load(tmp_path), FullConfig(), tmp_path)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.tobytes() for name, value in written.items()} == {
        name: value.tobytes() for name, value in (tensors | more).items()
    }
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(UserError, match=r"not part of this model: model\.layers\.4\.eh_proj"):
        load(tmp_path)


def test_full_fine_tuning_leaves_the_bias_frozen_and_loads_it(tmp_path):
    make_hf(CASE, tmp_path)
    model, params = load(tmp_path, attach_full)
    assert set(params) == set(model.trainable) | {path for path in params if path.endswith(BIAS)}
