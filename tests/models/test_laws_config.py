"""Tests that every field of a config.json has the effect it has in transformers, or is refused (T22).

The fields come from transformers' own configuration classes, so new ones are tried by themselves.
"""

import dataclasses
import json
import shutil
from functools import cache

import numpy as np
import pytest
from cases import CASES, ONE_OF_EACH
from oracle import TINY, eager_logits, hf_logits, load, load_hf, logits, make_hf, tokens
from processes import ALL
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ftjax.errors import UserError
from ftjax.models.composite import TEXT
from ftjax.models.facts import complete_config
from ftjax.models.model import build_module
from ftjax.models.registry import FAMILIES

# Fields of every configuration class (names, labels, outputs of a call) that do not affect the model.
COMMON = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"model_type"}
CARRIED = {  # of parts of a composite model that are not run
    "audio_config", "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_config",
    "vision_feature_layer",
}  # fmt: skip
INSIDE = {"rms_norm_eps", "vocab_size"}  # fields of a text model that is tried by itself: these show that it is read there too
BREAKS = {"text_config.rope_parameters.mrope_section"}  # transformers' code fails for other numbers of sections

# Fields that change no logits in transformers, in any family ...
NO_EFFECT = {
    "attention_dropout", "bos_token_id", "eos_token_id", "initializer_range", "output_attentions", "pad_token_id", "use_cache",
}  # fmt: skip
# ... and in one family: `max_position_embeddings` matters to some types of RoPE only; with layer types, windows are set by
# `layer_types`; the rest concerns dropout, a classification head, or the loss.
NO_EFFECT_IN = {
    "bamba": {"mamba_chunk_size", "max_position_embeddings", "num_logits_to_keep"},
    "deepseek_v2": {"head_dim", "max_position_embeddings", "output_router_logits", "pretraining_tp", "qk_head_dim"},
    "deepseek_v3": {
        "max_position_embeddings", "num_nextn_predict_layers", "output_router_logits", "pretraining_tp", "qk_head_dim",
    },
    "falcon_h1": {"mamba_chunk_size", "mamba_expand", "max_position_embeddings", "num_logits_to_keep"},
    "gemma": {"max_position_embeddings"},
    "gemma2": {"max_position_embeddings"},
    "gemma3_text": {
        "attn_logit_softcapping", "max_position_embeddings", "sliding_window_pattern", "_sliding_window_pattern",
    },
    "glm4": {"max_position_embeddings"},
    "glm4_moe": {"max_position_embeddings", "num_nextn_predict_layers", "output_router_logits"},
    "glm4_moe_lite": {"max_position_embeddings", "output_router_logits", "pretraining_tp", "qk_head_dim"},
    "gpt2": {
        "attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout",
        "summary_proj_to_labels", "summary_type", "summary_use_proj",
    },
    "gpt_neox": {"classifier_dropout", "hidden_dropout", "is_decoder", "max_position_embeddings"},
    "gpt_oss": {"hidden_act", "max_position_embeddings", "output_router_logits", "router_aux_loss_coef"},
    "granite": {"max_position_embeddings"},
    "gemma3": {"boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image"},
    "gemma4": {
        "audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_index", "eoi_token_id", "image_token_id", "video_token_id",
    },
    "gemma4_text": {"max_position_embeddings"},
    "gemma4_unified": {
        "audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_index", "eoi_token_id", "image_token_id", "video_token_id",
    },
    "gemma4_unified_text": {"max_position_embeddings"},
    "lfm2": {"block_multiple_of", "max_position_embeddings"},  # the first gives this width, or other weights
    "lfm2_moe": {"max_position_embeddings", "output_router_logits"},
    "granitemoehybrid": {"mamba_chunk_size", "max_position_embeddings", "output_router_logits", "router_aux_loss_coef"},
    "granitemoe": {"max_position_embeddings", "output_router_logits", "router_aux_loss_coef"},
    "llama": {"max_position_embeddings", "pretraining_tp"},
    "llama4": {"boi_token_index", "eoi_token_index", "image_token_index"},
    "llama4_text": {
        "interleave_moe_layer_step", "max_position_embeddings", "no_rope_layer_interval", "output_router_logits",
        "router_aux_loss_coef", "router_jitter_noise",
    },
    "ministral3": {"max_position_embeddings"},
    "mistral3": {"image_token_index"},
    "qwen3_vl": {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"},
    "ministral": {"max_position_embeddings"},
    "mistral": {"max_position_embeddings"},
    "mixtral": {"max_position_embeddings", "output_router_logits", "router_aux_loss_coef"},
    "nemotron_h": {
        "attention_bias", "chunk_size", "expand", "hidden_dropout", "mamba_proj_bias", "mamba_ssm_cache_dtype",
        "max_position_embeddings", "moe_shared_expert_overlap", "mtp_layers_block_type", "n_shared_experts",
        "num_logits_to_keep", "num_nextn_predict_layers", "output_router_logits", "rescale_prenorm_residual",
        "residual_in_fp32", "sliding_window", "time_step_floor", "time_step_limit", "time_step_max", "use_mamba_kernels",
    },
    "olmo_hybrid": {
        "linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min",
        "max_position_embeddings",
    },
    "olmo2": {"max_position_embeddings"},
    "olmo3": {"max_position_embeddings"},
    "olmoe": {"max_position_embeddings", "output_router_logits", "router_aux_loss_coef"},
    "phimoe": {
        "input_jitter_noise", "max_position_embeddings", "original_max_position_embeddings", "output_router_logits",
        "router_aux_loss_coef",
    },
    "phi3": {"embd_pdrop", "partial_rotary_factor", "resid_pdrop"},
    "qwen2": {"max_position_embeddings", "max_window_layers"},
    "qwen3": {"max_position_embeddings", "max_window_layers"},
    "qwen3_5": {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"},
    "qwen3_5_moe": {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"},
    "qwen3_5_moe_text": {"max_position_embeddings", "output_router_logits", "router_aux_loss_coef"},
    "qwen3_5_text": {"max_position_embeddings"},
    "qwen3_next": {"max_position_embeddings", "output_router_logits", "router_aux_loss_coef"},
    "qwen3_moe": {"max_position_embeddings", "output_router_logits", "router_aux_loss_coef"},
    "smollm3": {"max_position_embeddings", "no_rope_layer_interval", "use_sliding_window"},
}  # fmt: skip


# Fields that have a default in transformers' modules too, that must be off, or that transformers' class turns
# into another field.
MAY_BE_MISSING = {
    "add_cross_attention", "full_attn_idxs", "head_dim", "router_jitter_noise", "use_bidirectional_attention",
    "use_sliding_window", "z_loss_coefficient",
}  # fmt: skip
OTHER_WORD = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}


def others(name, value):
    """Return other values for a field, legal ones if there are any."""
    if name in ("hidden_act", "hidden_activation", "activation_function"):
        return ["relu", "quick_gelu"]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2 or 3, value // 2 if value > 1 and value % 2 == 0 else value + 1]
    if isinstance(value, float):
        return [value * 1.5 + 0.25]
    if isinstance(value, list):
        first = [OTHER_WORD.get(value[0]) or others(name, value[0])[0]] if value else []
        return [[*first, *value[1:]], value[1:]] + (
            [["chunked_attention", *value[1:]]] if value and value[0] in OTHER_WORD else []
        )
    return [5, 12, True, "tanh"] if value is None else ["something-else"]


def changes(stored):
    """Yield `(what is changed, config.json with that change)`; fields inside a dict one by one."""
    for name in sorted(set(stored) - COMMON - CARRIED - {"_name_or_path"}):
        for label, value in inner_changes(name, stored[name]):
            yield label, {**stored, name: value}


def inner_changes(name, value):
    if not isinstance(value, dict):
        yield from ((name, other) for other in others(name, value))
        return
    yield f"{name}.twist", {**value, "twist": 0.5}
    alone = not ALL and name == TEXT and value["model_type"] in FAMILIES
    for key, inner in value.items():
        if key in COMMON or key == "_name_or_path" or (alone and key not in INSIDE):
            continue
        yield from ((f"{name}.{label}", {**value, key: other}) for label, other in inner_changes(key, inner))


# The case with most of its family's features on, if it is not the first one.
RICHEST = {"deepseek_v2": "deepseek-v2-groups", "qwen3_moe": "qwen3-moe-dense-first"}
TRIED = [next((c for c in CASES if c.name == RICHEST.get(case.model_type)), case) for case in ONE_OF_EACH]


# Plain layers; latents, groups of experts and YaRN; layers of several kinds, with a RoPE each
DIFFERENT = [case for case in TRIED if ALL or case.model_type in ("llama", "deepseek_v3", "gemma4_text")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function from a case to (its folder, transformers' model), made once."""

    @cache
    def of(name: str):
        folder = tmp_path_factory.mktemp("hf")
        return folder, make_hf(next(case for case in TRIED if case.name == name), folder)

    return of


@pytest.fixture(params=TRIED, ids=str)
def family(request, made):
    return made(request.param.name)


def fields_of(model_type):
    """Return the fields of a configuration class as in config.json."""
    kind = CONFIG_MAPPING[model_type]
    return {kind.attribute_map.get(field.name, field.name) for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("case", DIFFERENT, ids=str)
def test_every_field_means_what_it_means_in_transformers(case, made, tmp_path):
    """With any one field changed, the model is refused or gives transformers' logits."""
    folder, hf = made(case.name)
    ids = tokens(1, 24, vocab=TINY["vocab_size"])
    base = eager_logits(*load(folder), ids)
    stored = hf.config.to_dict()
    declared = fields_of(stored["model_type"])
    assert declared <= set(stored) | COMMON, "a field that is not written to config.json cannot be tried here"
    same = load(folder)[0]
    wrong, without, with_effect, refused = [], set(), set(), set()
    for name, config in changes(stored):
        if name in BREAKS or (name in with_effect and not ALL):  # what one value has shown, others of a field repeat
            continue
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        try:
            model, params = load(tmp_path / "model")
        except UserError:
            refused.add(name)
            continue
        alike = model.graphdef == same.graphdef and model.specs == same.specs  # then there is nothing to run
        ours = base if alike else eager_logits(model, params, ids)
        theirs = hf_logits(load_hf(tmp_path / "model"), ids)
        if not np.abs(ours - theirs).max() <= 1e-4:
            wrong.append(name)
        (without if alike or np.array_equal(ours, base) else with_effect).add(name)
    assert not wrong, f"with these fields changed, the logits are not those of transformers: {wrong}"
    without = {name for name in without - with_effect if "." not in name}
    own = NO_EFFECT_IN[stored["model_type"]]
    assert without - NO_EFFECT - own == set(), "changed, these fields make no difference, which nobody has said yet"
    assert own - without == set(), "these fields make a difference, or are refused"
    assert "vocab_size" in {name.rpartition(".")[2] for name in refused}


def test_facts_have_no_defaults(family):
    """A field that changes the model must not be missing from a completed config.json."""
    folder, hf = family
    stored = hf.config.to_dict()
    config = complete_config(stored, str(folder))
    silent = NO_EFFECT | NO_EFFECT_IN[stored["model_type"]] | COMMON | CARRIED | MAY_BE_MISSING
    declared = fields_of(stored["model_type"])
    forgiven = []
    for name in sorted(declared - silent):
        try:
            build_module({key: value for key, value in config.items() if key != name})
        except UserError:
            continue
        forgiven.append(name)
    assert forgiven == [], "the model is built without these"


def test_unknown_field_is_refused(family, tmp_path):
    folder, hf = family
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**hf.config.to_dict(), "attention_twist": 0.5}))
    with pytest.raises(UserError, match=r"attention_twist = 0\.5"):
        load(tmp_path / "model")


def test_unsupported_type_lists_the_families(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(UserError) as error:
        load(tmp_path)
    for word in ("'bert'", *FAMILIES):
        assert word in str(error.value)


def test_old_folders_keep_their_rope(tmp_path):
    """`rope_theta` and `rope_scaling`, as transformers 4 wrote them, mean the same as `rope_parameters`."""
    from cases import LLAMA3_ROPE
    from oracle import Case

    make_hf(Case("llama3.1", "llama", {"rope_parameters": LLAMA3_ROPE}), tmp_path)
    ids = tokens(1, 30)
    want = logits(*load(tmp_path), ids)
    stored = json.loads((tmp_path / "config.json").read_text())
    rope = stored.pop("rope_parameters")
    stored |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    np.testing.assert_array_equal(logits(*load(tmp_path), ids), want)
    del stored["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert np.abs(logits(*load(tmp_path), ids) - want).max() > 1e-3
