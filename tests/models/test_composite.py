"""Tests checkpoints whose text model is one part of several: the others are kept, and adapters fit the whole."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from cases import CASES
from oracle import hf_logits, load, load_hf, logits, make_hf, one_device, tokens, write_merged
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ftjax.config import FullConfig, LoraConfig, ModelConfig
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import CONFIG, WEIGHTS, write_adapter
from ftjax.hub.load import init_params, open_model
from ftjax.hub.vocabulary import with_new_tokens
from ftjax.methods import lora
from ftjax.models.composite import text_of
from ftjax.models.facts import complete_config
from ftjax.models.model import build_module

CASE = next(case for case in CASES if case.name == "qwen3.5-images")
ALONE = next(case for case in CASES if case.name == "qwen3.5")
MTP = {
    "mtp.fc.weight": np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16),
    "mtp.norm.weight": np.float32([0.1, 0.2, 0.3]),
}


def raw(folder) -> dict[str, tuple[str, bytes]]:
    """Return dtype and bytes of all tensors of a folder."""
    return {name: (str(t.dtype), t.tobytes()) for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a composite checkpoint with layers for further tokens, and the files of a processor."""
    folder = tmp_path_factory.mktemp("hf")
    make_hf(CASE, folder)
    file = folder / "model.safetensors"
    save_file({**load_file(file), **MTP}, file)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 2}')
    return folder


def test_other_parts_are_carried(folder, tmp_path):
    """A whole export has the names and bits of the base model's other parts, in their own dtypes, and changed text weights."""
    model, params = load(folder)
    path = next(path for path in params if path.endswith("in_proj_qkv.weight"))
    write_merged(tmp_path, model, {**params, path: params[path] * 2}, FullConfig(), folder)
    before, after = raw(folder), raw(tmp_path)
    assert before.keys() == after.keys() and {name.split(".")[0] for name in before} == {"model", "mtp"}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"model.language_model.layers.{n}.linear_attn.in_proj_qkv.weight" for n in range(3)}
    assert (tmp_path / "preprocessor_config.json").read_text() == '{"patch_size": 2}'
    theirs, ids = load_hf(tmp_path), tokens(1, 20)
    assert type(theirs).__name__ == "Qwen3_5ForConditionalGeneration"
    np.testing.assert_allclose(logits(*load(tmp_path), ids), hf_logits(theirs, ids), atol=1e-4)


def test_layers_for_further_tokens_are_carried_by_the_text_alone(tmp_path):
    make_hf(ALONE, tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    save_file({**load_file(file), **MTP}, file)
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", *load(tmp_path / "in"), FullConfig(), tmp_path / "in")
    assert raw(tmp_path / "out") == raw(tmp_path / "in")


def test_tensors_of_nothing_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "model.audio.weight": np.zeros(3, np.float32)}, file)
    with pytest.raises(UserError, match=r"not part of this model: model\.audio\.weight"):
        load(tmp_path / "model")


def test_an_adapter_is_what_peft_makes(folder, tmp_path):
    """Keys and targets are those of PEFT on the class that loads the whole checkpoint; no layer for images is among them."""
    config = LoraConfig(r=4)
    model, params = load(folder, lambda root: lora.attach(root, config))
    params |= init_params({path: spec for path, spec in model.specs.items() if spec.row.adapter}, one_device(), 0)
    write_adapter(tmp_path, model, params, config, str(folder))
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    theirs = get_peft_model(load_hf(folder), PeftConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    with safe_open(tmp_path / WEIGHTS, "numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert found == {name: tuple(value.shape) for name, value in get_peft_model_state_dict(theirs).items()}
    assert all("model.language_model.layers." in name for name in found)


def test_new_rows_of_the_vocabulary(folder, tmp_path):
    config, source = open_model(folder)
    config, source = with_new_tokens(ModelConfig(path=str(folder), pad_vocab_to_multiple_of=64), config, source)
    assert text_of(config)["vocab_size"] == config["text_config"]["vocab_size"] == 128 and "vocab_size" not in config
    assert source.shape("model.language_model.embed_tokens.weight") == (128, 32)
    assert build_module(config).sizes.vocab == 128


def test_an_unknown_text_model_lists_the_families(folder):
    config = complete_config(json.loads((folder / "config.json").read_text()), "x")
    config["text_config"] = {**config["text_config"], "model_type": "other_text"}
    with pytest.raises(UserError, match=r"'other_text' is not supported; supported families are .*qwen3_5_text"):
        build_module(config)


def test_a_gradient_reaches_the_text_alone(folder):
    """No parameter of another part exists on the devices."""
    model, params = load(folder)
    assert all(path.startswith("model.language_model.") for path in params) and model.carried == ("mtp.", "model.visual.")
    assert sum(x.size for x in jax.tree.leaves(params)) < sum(t.size for t in load_file(folder / "model.safetensors").values())
