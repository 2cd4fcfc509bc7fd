"""Tests `ftjax merge-adapters`: the weighted sum of updates, in ftjax and in PEFT."""

import json

import numpy as np
import pytest
import torch
from oracle import Case, hf_logits, load, logits, make_hf, one_device, tokens
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ftjax.cli import app
from ftjax.hub.adapter.peft import attach_adapter, load_adapter

PARTS = {
    "a": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "b": {"r": 3, "lora_alpha": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "c": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write a base model and adapters with PEFT."""
    home = tmp_path_factory.mktemp("adapters")
    make_hf(Case("llama", "llama"), home / "base")
    torch.manual_seed(0)
    for name, settings in PARTS.items():
        model = get_peft_model(fresh(home), PeftLoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(home / name)
    return home


def fresh(home):
    return AutoModelForCausalLM.from_pretrained(home / "base")


def merge(home, *arguments):
    return CliRunner().invoke(app, ["merge-adapters", *arguments])


def test_the_sum_of_updates(made, tmp_path):
    """The sum agrees with weights merged by PEFT, W + 0.7 (Wa - W) - 0.3 (Wb - W) + 2 (Wc - W), and in both tools' reading."""
    weights = {"a": 0.7, "b": -0.3, "c": 2.0}
    done = merge(made, *(f"{made / name}={weight}" for name, weight in weights.items()), "--out", str(tmp_path / "sum"))
    assert done.exit_code == 0, done.output
    want = fresh(made)
    start = {name: value.clone() for name, value in want.state_dict().items()}
    for name, weight in weights.items():
        merged = PeftModel.from_pretrained(fresh(made), made / name).merge_and_unload().state_dict()
        for key, value in want.state_dict().items():
            value += weight * (merged[key] - start[key])
    ids = tokens(2, 20)
    expected = hf_logits(want, ids)
    theirs = PeftModel.from_pretrained(fresh(made), tmp_path / "sum")
    np.testing.assert_allclose(hf_logits(theirs, ids), expected, atol=1e-4, rtol=0)
    model, params = load(made / "base", lambda root: attach_adapter(root, tmp_path / "sum"))
    params |= load_adapter(model, tmp_path / "sum", one_device())
    np.testing.assert_allclose(logits(model, params, ids), expected, atol=1e-4, rtol=0)
    assert np.abs(expected - hf_logits(fresh(made), ids)).max() > 1e-2
    saved = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert saved["r"] == saved["lora_alpha"] == 4 + 3 + 2 and not saved["rank_pattern"]
    assert not list(tmp_path.glob(".*"))


def test_as_peft_adds_them_up(made, tmp_path):
    """The products of B and A are those of `add_weighted_adapter` with `cat`."""
    done = merge(made, f"{made / 'c'}=0.25", f"{made / 'c'}=0.5", "--out", str(tmp_path / "sum"))
    assert done.exit_code == 0, done.output
    theirs = PeftModel.from_pretrained(fresh(made), made / "c", adapter_name="c")
    theirs.load_adapter(made / "c", adapter_name="d")
    theirs.add_weighted_adapter(["c", "d"], [0.25, 0.5], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    ours = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    state = theirs.state_dict()
    for name in (key for key in ours if key.endswith("lora_A.weight")):
        a, b = (state[name.replace(".lora_A.", f".lora_{part}.sum.")] for part in "AB")
        got = ours[name.replace("lora_A", "lora_B")] @ ours[name]
        np.testing.assert_allclose(got, (b @ a).numpy(), atol=1e-5, err_msg=name)
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        ({}, ["{a}=0.7", "{b}"], "expected FOLDER=WEIGHT"),
        ({}, ["{a}=nan", "{b}=1"], "expected FOLDER=WEIGHT"),
        ({}, ["{a}=0.7"], "two adapters"),
        ({}, ["{a}=0.7", "{base}=1"], "adapter_config.json"),
        ({"base_model_name_or_path": "other"}, ["{a}=0.7", "{x}=1"], "different models"),
        ({"use_dora": True}, ["{a}=0.7", "{x}=1"], None),
    ],
)
def test_refused(made, tmp_path, change, arguments, says):
    if change:
        (tmp_path / "x").mkdir()
        for file in (made / "c").iterdir():
            if file.is_file():
                (tmp_path / "x" / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
        (tmp_path / "x" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    folders = {name: str(made / name) for name in ("a", "b", "base")} | {"x": str(tmp_path / "x")}
    done = merge(made, *(one.format(**folders) for one in arguments), "--out", str(tmp_path / "out"))
    assert done.exit_code == 2 and (says is None or says in " ".join(done.output.split())), done.output
    assert not (tmp_path / "out").exists()
