"""Tests that values too large for float16 are refused by name, before infinities are written or computed with."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import ONE, Case, load, make_hf, one_device
from safetensors.numpy import load_file, save_file
from tiny_tokenizer import save_tokenizer

from ftjax.config import Config, FullConfig
from ftjax.config.load import save_config
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import start_adapter, write_adapter
from ftjax.hub.export import export
from ftjax.hub.load import load_base, open_model
from ftjax.hub.output import write_output
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.methods import method_of
from ftjax.models.model import Model, build_module
from ftjax.train.setup import prepare

NAME = "model.layers.1.mlp.up_proj.weight"
SAYS = rf"{NAME}: 2 of [\d,]+ values, up to 7e\+04, are beyond what float16 holds \(65504\)"


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    make_hf(Case("llama", "llama"), folder)
    save_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    weights[NAME][3, 4:6] = -7e4, 6.6e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config(base, dtype, **method):
    model = {"path": str(base), "dtype": dtype, "compute_dtype": "float32"}
    return Config.model_validate({"model": model, "method": method, "data": {"train": "x.jsonl"}})


def test_a_whole_model(base, tmp_path):
    """The folder is not created for float16; in bfloat16 the same model is written."""
    model, params = load(base, lambda root: method_of(FullConfig()).attach(root, FullConfig()))
    tokenizer = load_tokenizer(config(base, "float16", name="full").model)
    with pytest.raises(UserError, match=SAYS):
        write_output(tmp_path / "final", config(base, "float16", name="full"), model, params, tokenizer, base, step=1)
    assert [one.name for one in tmp_path.iterdir()] == ["base"]
    write_output(tmp_path / "final", config(base, "bfloat16", name="full"), model, params, tokenizer, base, step=1)


def test_a_run_that_could_not_be_saved(base):
    """Weights that train are held in float32; what is too large for the result is said before the first update."""
    with pytest.raises(
        UserError, match=r"model\.dtype: float16 .*model\.layers\.\S+\.mlp\.up_proj\.weight has some up to 7e\+04"
    ):
        prepare(config(base, "float16", name="full"), ONE)
    prepare(config(base, "bfloat16", name="full"), ONE)


def test_a_merged_model(base, tmp_path):
    settings = config(base, "float16", name="lora", r=2)
    model, params = load(base, lambda root: method_of(settings.method).attach(root, settings.method))
    params |= start_adapter(model, params, settings.method, one_device(), 0, None)
    (tmp_path / "run" / "final").mkdir(parents=True)
    write_adapter(tmp_path / "run" / "final", model, params, settings.method, str(base))
    save_config(settings, tmp_path / "run" / "config.yaml")
    with pytest.raises(UserError, match=SAYS):
        export(tmp_path / "run", tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


def test_loading(base):
    facts, source = open_model(base)
    model = Model.of(build_module(facts), facts)
    with pytest.raises(UserError, match=SAYS):
        load_base(model, source, one_device(), jnp.float16, str(base))
    loaded = load_base(model, source, one_device(), jnp.bfloat16, str(base))
    assert all(np.isfinite(np.asarray(value, np.float32)).all() for value in loaded.values())
