"""Tests LoRA against PEFT, in both directions."""

import json

import jax
import numpy as np
import pytest
import torch
from oracle import Case, hf_logits, load, logits, make_hf, one_device, tokens, write_merged
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model

from ftjax.config import LoraConfig
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import attach_adapter, load_adapter, start_adapter, write_adapter
from ftjax.hub.export import write_portable
from ftjax.hub.load import init_params
from ftjax.methods import lora

VARIANTS = {
    "all-linear": {},
    "list": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "regex": {"target_modules": r".*\.1\.(self_attn\.(q|o)_proj|mlp\.up_proj)", "r": 3, "lora_alpha": 6},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 4},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"], "r": 2, "lora_alpha": 4,
        "rank_pattern": {"k_proj": 5, r"layers\.1\.mlp\.down_proj": 1}, "alpha_pattern": {"layers.0.self_attn.q_proj": 32},
    },
    "layers": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    "layers-pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "saved-layer": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1.mlp", "norm"]},
    "exclude": {"exclude_modules": ["v_proj"]},
    "biases": {"bias": "all", "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "some-biases": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4, "use_rslora": True},
    "saved": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [61, 7, 94, 5]},
    "two-tables": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [61, 7], "lm_head": [94, 3, 5]}},
    "tied-embedding": {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True, "r": 4},
    "tied-saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied-saved-output": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tied-target-output": {"target_modules": r".*q_proj|lm_head", "ensure_weight_tying": True, "r": 4},
    "tied-tokens-twice": {
        "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [61, 7], "lm_head": [61, 7]},
    },
    "tied-tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [61, 7, 94, 5]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return make_hf(Case("llama", "llama", {"attention_bias": True}), folder), folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    return make_hf(Case("tied", "llama", {"tie_word_embeddings": True}), folder), folder


def fresh(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def ours(folder, config, seed=0, noise=0.3):
    """Return ftjax's model with an adapter whose B matrices are random instead of zero."""
    model, params = load(folder, lambda root: lora.attach(root, config))
    new = start_adapter(model, params, config, one_device(), seed, lambda text: [])
    rng = np.random.default_rng(seed)
    for path, spec in model.trainable.items():
        start = np.array(new[path] if path in new else params[path])
        for piece in spec.pieces():
            start[piece.index] += rng.normal(size=piece.shape).astype(np.float32) * noise
        new[path] = jax.device_put(start, (new | params)[path].sharding)
    return model, {**params, **new}


@pytest.mark.parametrize("name", VARIANTS)
def test_ours_in_peft(base, tied, name, tmp_path, recwarn):
    """PEFT loads ftjax's folder with the same logits and no missing keys, and so does the merged model."""
    hf, folder = tied if name.startswith("tied") else base
    config = LoraConfig(**VARIANTS[name])
    model, params = ours(folder, config)
    write_adapter(tmp_path, model, params, config, str(folder))
    theirs = PeftModel.from_pretrained(fresh(folder), tmp_path)
    assert not [str(one.message) for one in recwarn if "missing" in str(one.message)]
    ids = tokens(2, 20)
    got = logits(model, params, ids)
    np.testing.assert_allclose(got, hf_logits(theirs, ids), atol=1e-4, rtol=0)
    assert np.abs(got - hf_logits(hf, ids)).max() > 1e-2, "the adapter has no effect, so nothing was compared"
    merged = tmp_path / "merged"
    merged.mkdir()
    write_merged(merged, model, params, config, folder)
    np.testing.assert_allclose(got, hf_logits(fresh(merged), ids), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", VARIANTS)
def test_theirs_in_ours(base, tied, name, tmp_path):
    """ftjax loads PEFT's folder with the same logits, and trains as many weights."""
    _, folder = tied if name.startswith("tied") else base
    values = {"target_modules": "all-linear", **VARIANTS[name]}
    theirs = get_peft_model(fresh(folder), PeftLoraConfig(task_type="CAUSAL_LM", **values)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path)
    ids = tokens(2, 20)
    model, params = load(folder, lambda root: attach_adapter(root, tmp_path))
    params |= load_adapter(model, tmp_path, one_device())
    np.testing.assert_allclose(logits(model, params, ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)
    trained = {p.data_ptr(): p.numel() for p in theirs.parameters() if p.requires_grad}  # tied weights occur twice
    assert sum(spec.size for spec in model.trainable.values()) == sum(trained.values())


def test_written_config_is_peft(base, tmp_path):
    """adapter_config.json is what PEFT writes for these settings: sorted keys, indent 2, inference mode."""
    _, folder = base
    config = LoraConfig(**VARIANTS["patterns"])
    model, params = ours(folder, config)
    write_adapter(tmp_path, model, params, config, "some/base")
    text = (tmp_path / "adapter_config.json").read_text()
    saved = json.loads(text)
    assert text == json.dumps(saved, indent=2, sort_keys=True) + "\n"
    assert saved["inference_mode"] is True and saved["base_model_name_or_path"] == "some/base"
    theirs = PeftLoraConfig.from_pretrained(tmp_path).to_dict()
    for key, value in saved.items():
        found = theirs[key]
        found = sorted(found) if isinstance(found, set) else getattr(found, "value", found)
        assert found == (sorted(value) if key == "target_modules" else value), key


def test_step_zero_is_the_base(base):
    """The start is the base model, as B is zero."""
    hf, folder = base
    config = LoraConfig(r=4)
    model, params = load(folder, lambda root: lora.attach(root, config))
    params |= init_params({p: s for p, s in model.specs.items() if s.row.adapter}, one_device(), 0)
    ids = tokens(1, 16)
    np.testing.assert_allclose(logits(model, params, ids), hf_logits(hf, ids), atol=1e-4, rtol=0)
    a = np.asarray(params["model.layers.block.mlp.down_proj.lora_A"])
    bound = 48**-0.5  # PEFT: kaiming_uniform(a=sqrt(5)) is U(+-1/sqrt(in))
    assert 0.8 * bound < np.abs(a).max() <= bound and abs(a.mean()) < 0.2 * bound


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_other_beginnings(base, kind):
    """Other initial values are distributed like PEFT's and keep the base model, for all ranks; another seed draws others."""
    hf, folder = base
    config = LoraConfig(r=16, rank_pattern={"k_proj": 4}, target_modules=["q_proj", "k_proj"], init_lora_weights=kind)
    model, params = load(folder, lambda root: lora.attach(root, config))
    new, other = (start_adapter(model, params, config, one_device(), seed, lambda text: []) for seed in (0, 1))
    ids = tokens(2, 20)
    np.testing.assert_allclose(logits(model, {**params, **new}, ids), hf_logits(hf, ids), atol=1e-4)
    torch.manual_seed(0)
    theirs = get_peft_model(fresh(folder), PeftLoraConfig(
        r=16, rank_pattern={"k_proj": 4}, target_modules=["q_proj", "k_proj"], init_lora_weights=kind
    )).state_dict()  # fmt: skip
    for path, value in new.items():
        for piece in model.specs[path].pieces():
            want = theirs[f"base_model.model.{piece.name}".replace(".weight", ".default.weight")].numpy()
            got = np.asarray(value[piece.index])
            assert got.shape == want.shape
            np.testing.assert_allclose(got.std(), want.std(), rtol=0.3, err_msg=piece.name)
            if want.any():
                assert np.abs(got - np.asarray(other[path][piece.index])).max() > 1e-3


def test_adapters_that_changed_their_base(base, tmp_path):
    """They are refused: PEFT changes the base again before adding them; alone, their tensors mean nothing."""
    config = PeftLoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(fresh(base[1]), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pissa, which changed the base model as well.*path_initial_model"):
        load(base[1], lambda root: attach_adapter(root, tmp_path))


def test_masters_are_float32(base):
    import jax.numpy as jnp

    _, folder = base
    model, params = load(folder, lambda root: lora.attach(root, LoraConfig(modules_to_save=["norm"])), dtype=jnp.bfloat16)
    assert params["model.norm.weight"].dtype == jnp.float32
    assert params["model.embed_tokens.weight"].dtype == jnp.bfloat16
    assert {spec.dtype for spec in model.trainable.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"target_modules": ["q_proj", "qkv"]}, ["'qkv'", "self_attn.q_proj"]),
        ({"target_modules": "nothing"}, ["nothing", "mlp.up_proj"]),
        ({"rank_pattern": {"v_prj": 2}}, ["rank_pattern", "v_prj"]),
        ({"rank_pattern": {"q_proj": 2, "self_attn.q_proj": 3}}, ["q_proj", "several"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, ["layers_to_transform", "7"]),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, ["layers_to_transform", "list"]),
        ({"modules_to_save": ["embd"]}, ["embd", "embed_tokens"]),
        ({"bias": "lora_only", "target_modules": ["up_proj"]}, ["bias: lora_only", "layers of target_modules have no biases"]),
        ({"bias": "all", "modules_to_save": ["q_proj"]}, ["bias: all and method.modules_to_save", "q_proj.bias", "once"]),
        ({"init_lora_weights": "orthogonal", "target_modules": ["embed_tokens"]}, ["orthogonal", "dense", "embed_tokens"]),
        ({"init_lora_weights": "orthogonal", "r": 3}, ["orthogonal needs an even rank, and model.layers.0.", " has 3"]),
        ({"init_lora_weights": "pissa", "r": 20}, ["k_proj has 16 singular values, fewer than its rank 20"]),
        ({"trainable_token_indices": [96, 4, 4]}, ["2 things", "[96] are no tokens", "0 to 95", "named twice"]),
        ({"trainable_token_indices": {"embd": [4]}}, ["'embd'", "embed_tokens", "lm_head"]),
        (
            {
                "trainable_token_indices": {"embed_tokens": [4], "lm_head": [4]},
                "target_modules": ["lm_head", "q_proj"],
                "modules_to_save": ["embed_tokens"],
            },
            ["2 things", "modules_to_save both train model.embed_tokens", "target_modules both train lm_head"],
        ),
        ({"ensure_weight_tying": True}, ["ensure_weight_tying", "this model does not tie them"]),
        (
            {"init_lora_weights": "pissa", "use_dora": True, "bias": "lora_only", "target_modules": ["up_proj"]},
            ["2 things", "pissa is exported", "bias: lora_only"],
        ),
        (
            {"target_modules": ["embed_tokens", "qkv"], "use_dora": True, "rank_pattern": {"q_proj": 2}},
            [
                "3 things",
                "\n- method.target_modules: no module is named 'qkv'",
                "\n- method.use_dora",
                "\n- method.rank_pattern",
            ],
        ),
    ],
)
def test_refused(base, config, says):
    with pytest.raises(UserError) as error:
        load(base[1], lambda root: lora.attach(root, LoraConfig(**config)))
    for word in says:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("option", "says"), [("modules_to_save", "method.name: full"), ("target_modules", "ensure_weight_tying")]
)
def test_tied_embedding_is_one(tied, option, says):
    with pytest.raises(UserError, match=f"ties.*{says}"):
        load(tied[1], lambda root: lora.attach(root, LoraConfig(**{option: ["embed_tokens"]})))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("some-biases", "trained biases .bias: lora_only"),
        ("embedding", "lora_embedding_A"),
        ("saved", "lm_head"),
        ("tokens", "trainable_tokens_delta"),
    ],
)
def test_not_portable(base, tmp_path, name, says):
    """Adapters with parts that vLLM and llama.cpp cannot read are refused."""
    config = LoraConfig(**VARIANTS[name])
    model, params = ours(base[1], config)
    write_adapter(tmp_path, model, params, config, str(base[1]))
    with pytest.raises(UserError, match=f"read plain LoRA only, and this adapter has .*{says}.*--merge folds it"):
        write_portable(tmp_path, tmp_path)


def test_frozen_embedding_of_the_file(base, tmp_path):
    """PEFT writes a frozen embedding next to its update; as in PEFT, the file's values count."""
    config = PeftLoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    theirs = get_peft_model(fresh(base[1]), config).eval()
    with torch.no_grad():
        theirs.get_input_embeddings().base_layer.weight.mul_(2)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    model, params = load(base[1], lambda root: attach_adapter(root, tmp_path))
    ids = tokens(2, 20)
    got = logits(model, {**params, **load_adapter(model, tmp_path, one_device())}, ids)
    np.testing.assert_allclose(got, hf_logits(theirs, ids), atol=1e-4, rtol=0)
