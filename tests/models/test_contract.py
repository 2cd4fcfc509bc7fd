"""Tests the promises of a root module (`ftjax.models.causal_lm.CausalLM`) for every family, against transformers' model."""

import copy
import inspect
from typing import get_origin, get_type_hints

import jax
import pytest
from cases import CASES
from oracle import Case, context, hf_config, make_hf, tokens

from ftjax.config import LoraConfig, PrefixTuningConfig
from ftjax.hub.load import positions_of
from ftjax.methods import method_of
from ftjax.models.causal_lm import CausalLM
from ftjax.models.classifier import classifier_config
from ftjax.models.facts import complete_config
from ftjax.models.model import Model, build_module
from ftjax.models.nn.rope import longest_text


def config_of(case: Case) -> dict:
    return complete_config(hf_config(case).to_dict(), case.name)


def test_a_configuration_leaves_its_case_alone():
    """transformers completes nested values in place; the next test of a case would see other fields."""
    before = copy.deepcopy(CASES)
    for case in CASES:
        hf_config(case)
    assert before == CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_root_keeps_the_contract(case):
    root = build_module(config_of(case))
    assert isinstance(root, CausalLM)
    for name in ("sizes", "embedding", "output", "ignored", "carried", "ropes", "notes", "max_positions"):
        value, kind = getattr(root, name), get_type_hints(CausalLM)[name]
        plain = int | None if name == "max_positions" else get_origin(kind) or kind
        assert isinstance(value, plain), name
    for name in ("hidden", "unembed"):
        promised, kept = (inspect.signature(getattr(one, name)).parameters for one in (CausalLM, root))
        assert [*kept] == [*promised][1:]  # without self


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes_are_those_of_transformers(case, tmp_path):
    hf = make_hf(case, tmp_path)
    config, module = hf.config.get_text_config(), dict(hf.named_modules())
    model = Model.of(build_module(config_of(case)), config_of(case))
    sizes, rows = model.sizes, hf.get_input_embeddings().weight
    assert (sizes.layers, sizes.heads) == (config.num_hidden_layers, config.num_attention_heads)
    assert (sizes.vocab, sizes.embed) == tuple(rows.shape)
    # GPT-2 and GPT-NeoX have a key for each query.
    attentions = [
        part
        for name, part in module.items()
        if (name.endswith(".self_attn") and "vision" not in name) or (name.endswith(".mixer") and hasattr(part, "q_proj"))
    ]
    one = attentions[0] if attentions else None
    size = getattr(one, "head_dim", getattr(one, "qk_head_dim", None))  # latent attention has the latter
    heads = sizes.heads if one is None else max(layer.num_key_value_heads for layer in config.per_layer_config)
    assert (sizes.kv_heads, sizes.head_dim) == (heads, sizes.embed // sizes.heads if one is None else size)
    assert module[model.embedding.module] is hf.get_input_embeddings() and model.embedding.shape == tuple(rows.shape)
    if not hf.config.tie_word_embeddings:
        head = "embed_out" if case.model_type == "gpt_neox" and model.output not in module else model.output
        assert module[head] is hf.get_output_embeddings()
    else:
        assert model.output == model.embedding.module


@pytest.mark.parametrize("case", CASES, ids=str)
def test_positions_are_what_the_model_is_made_for(case):
    config = hf_config(case).get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    want = config.max_position_embeddings
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type") == "dynamic":
            want = max(want, int(config.max_position_embeddings * rope["factor"]))
        elif rope.get("factor") and rope.get("original_max_position_embeddings"):
            want = max(want, int(rope["original_max_position_embeddings"] * rope["factor"]))
    assert build_module(config_of(case)).sizes.positions == want


def test_positions_are_read_without_weights(tmp_path):
    case = next(case for case in CASES if case.name == "llama-yarn")
    hf_config(case).save_pretrained(tmp_path)
    assert positions_of(str(tmp_path)) == 64
    assert positions_of(str(tmp_path / "none")) is None


def test_yarn_stretches_a_length_that_config_json_left_as_it_was():
    """Qwen 2.5's advice for long texts adds `rope_parameters` and leaves `max_position_embeddings` unchanged."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    assert longest_text(yarn, 32768) == 131072
    assert longest_text({"full_attention": yarn, "sliding_attention": {"rope_type": "default"}}, 32768) == 131072
    assert longest_text({"rope_type": "default", "rope_theta": 1e6}, 32768) == 32768


@pytest.mark.parametrize("method", [LoraConfig(target_modules="all-linear"), PrefixTuningConfig(num_virtual_tokens=3)], ids=str)
def test_a_method_changes_no_size(method):
    case = next(case for case in CASES if case.model_type == "gpt2")
    root = build_module(config_of(case))
    sizes = root.sizes
    method_of(method).attach(root, method)
    model = Model.of(root, config_of(case))
    assert model.sizes == sizes and model.embedding.shape == (sizes.vocab, sizes.embed)
    taken = getattr(method, "num_virtual_tokens", 0)
    assert model.max_positions == sizes.positions - taken


def test_a_classifier_keeps_the_contract():
    root = build_module(classifier_config(config_of(CASES[0]), ["a", "b", "c"], 0))
    assert isinstance(root, CausalLM) and root.output == "score"
    model = Model.of(root, {})
    params = {path: spec.abstract for path, spec in model.specs.items()}
    hidden, ctx = jax.ShapeDtypeStruct((1, model.sizes.embed), "float32"), context(tokens(1, 1))
    assert jax.eval_shape(lambda params, x: model.bind(params).unembed(x, ctx), params, hidden).shape == (1, 3)
