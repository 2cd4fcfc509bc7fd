"""Tests that adapters made by PEFT load as in PEFT: grown vocabularies, tied outputs, names, and options that match nothing."""

import json
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import Case, hf_logits, logits, make_hf, one_device, tokens
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftjax.config import LoraConfig
from ftjax.errors import UserError
from ftjax.generate.load import load
from ftjax.hub.adapter.peft import write_adapter
from ftjax.hub.tokenizer.ends import generation_config
from ftjax.methods.lora import from_saved
from ftjax.models.facts import read_config, read_object

CASES = {
    "llama": Case("llama", "llama", {"attention_bias": True}),
    "tied": Case("tied", "llama", {"tie_word_embeddings": True}),
    "gpt2": Case("gpt2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}),
    "neox": Case("neox", "gpt_neox", {"tie_word_embeddings": True}),
}
NEW = [96, 97]  # ids of the tokens that a vocabulary of 98 adds to its base


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_hf(CASES[name], made[name])
        return made[name]

    return of


def fresh(base, rows=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def adapter(base, folder, rows=None, **settings):
    """Write an adapter folder with PEFT, with noise on all trained weights; return it with the logits of PEFT's model."""
    values = {"target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM", **settings}
    warnings.simplefilter("ignore")  # PEFT warns about most of these options
    model = get_peft_model(fresh(base, rows), PeftLoraConfig(**values)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def ours(base, folder, ids, merge=False):
    loaded = load(str(base), folder, one_device(), jnp.dtype(jnp.float32), merge=merge)
    return logits(loaded.model, loaded.params, ids)


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


EMBED, HEAD = "embed_tokens", "lm_head"
GROWN = {
    "saved-both": ("llama", {"modules_to_save": [EMBED, HEAD]}),
    "saved-head": ("tied", {"modules_to_save": [HEAD]}),
    "saved-embedding": ("tied", {"modules_to_save": [EMBED]}),
    "saved-apart": ("tied", {"modules_to_save": [EMBED, HEAD]}),
    "saved-as-one": ("tied", {"modules_to_save": [HEAD], "ensure_weight_tying": True}),
    "rows": ("llama", {"trainable_token_indices": [*NEW, 5]}),
    "rows-tied": ("tied", {"trainable_token_indices": [*NEW, 5]}),
    "rows-same": ("tied", {"trainable_token_indices": {EMBED: NEW, HEAD: NEW}}),
    "rows-apart": ("tied", {"trainable_token_indices": {EMBED: [*NEW, 5], HEAD: NEW}}),
    "rows-of-head": ("tied", {"trainable_token_indices": {HEAD: NEW}}),
    "neither": ("tied", {}),
    "update-of-head": ("tied", {"target_modules": ["q_proj", HEAD]}),
    "update-of-embedding": ("tied", {"target_modules": ["q_proj", EMBED]}),
    "update-of-both": ("tied", {"target_modules": rf".*\.(q_proj|{EMBED})|{HEAD}"}),
    "update-as-one": ("tied", {"target_modules": ["q_proj", HEAD], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("name", ["saved-both", "saved-apart", "update-of-both"])
def test_a_vocabulary_without_the_padding_of_its_base(bases, name, tmp_path):
    """`resize_token_embeddings(len(tokenizer))` cuts off rows where a model has more than its tokenizer has tokens."""
    kind, settings = GROWN[name]
    theirs, ids = adapter(bases(kind), tmp_path, 90, **settings), tokens(2, 20) % 90
    for merge in (False, True):
        np.testing.assert_allclose(ours(bases(kind), tmp_path, ids, merge), hf_logits(theirs, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [None, 98], ids=["as-it-was", "grown"])
@pytest.mark.parametrize("name", GROWN)
def test_embeddings_and_outputs(bases, name, rows, tmp_path):
    """Logits equal those of PEFT's model, unmerged and merged, whichever copies of a module the file has."""
    kind, settings = GROWN[name]
    if rows is None:
        settings = json.loads(json.dumps(settings).replace("96", "7").replace("97", "9"))
    theirs = adapter(bases(kind), tmp_path, rows, **settings)
    ids = tokens(2, 20)
    ids[:, 3:5] = NEW if rows else ids[:, 3:5]
    want = hf_logits(theirs, ids)
    for merge in (False, True):
        np.testing.assert_allclose(ours(bases(kind), tmp_path, ids, merge), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "settings"), [
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}),
    ("neox", {"target_modules": ["query_key_value", "embed_out"]}),
    ("neox", {"target_modules": ["query_key_value"], "modules_to_save": ["embed_out"]}),
])  # fmt: skip
def test_other_names_of_tied_outputs(bases, kind, settings, tmp_path):
    theirs, ids = adapter(bases(kind), tmp_path, **settings), tokens(2, 20)
    np.testing.assert_allclose(ours(bases(kind), tmp_path, ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)


def test_new_rows_without_the_table(bases, tmp_path):
    """PEFT writes a file of the new rows alone if it cannot look up the base's configuration."""
    model = get_peft_model(fresh(bases("tied"), 98), PeftLoraConfig(
        target_modules=["q_proj"], trainable_token_indices=NEW, task_type="CAUSAL_LM"
    )).eval()  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].add_(0.5)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    ids = tokens(2, 20)
    ids[:, 3:5] = NEW
    np.testing.assert_allclose(ours(bases("tied"), tmp_path, ids), hf_logits(model, ids), atol=1e-4, rtol=0)


AS_PEFT = {
    "layers_pattern": ({"layers_pattern": "layers", "layers_to_transform": [1]}, None),
    "whole module of a layer": ({"modules_to_save": ["layers.1.mlp"]}, None),
    "no such target": ({"target_modules": ["q_proj", "query"]}, "'query'"),
    "no such layer": ({"layers_to_transform": [1, 9]}, "[9] do not exist"),
    "no such module to save": ({"modules_to_save": ["norms_"]}, "'norms_'"),
    "no such rank": ({"rank_pattern": {"k_proj": 4}}, "rank_pattern: 'k_proj'"),
    "untied": ({"ensure_weight_tying": True, "target_modules": ["q_proj"]}, "does not tie them"),
    "two ranks": ({"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 4, "q_proj": 3}}, None),
}


@pytest.mark.parametrize("name", AS_PEFT)
def test_options_as_peft_reads_them(bases, name, tmp_path, capsys):
    """Options without effect cause a note."""
    settings, note = AS_PEFT[name]
    theirs, ids = adapter(bases("llama"), tmp_path, **settings), tokens(2, 20)
    np.testing.assert_allclose(ours(bases("llama"), tmp_path, ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == bool(note) and all(note in line and "method." not in line for line in said), said


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj"], None])
def test_fewer_updates_than_targets(bases, targets, tmp_path, capsys):
    """As in PEFT, updates that the file lacks start at zero."""
    theirs, ids = adapter(bases("llama"), tmp_path), tokens(2, 20)
    edit(tmp_path, target_modules=targets)
    np.testing.assert_allclose(ours(bases("llama"), tmp_path, ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)
    assert targets is None or "holds no update of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["default", "mine"])
def test_names_with_the_adapters_own(bases, name, tmp_path):
    theirs, ids = adapter(bases("llama"), tmp_path, modules_to_save=["norm"], use_dora=True), tokens(2, 20)
    file = tmp_path / "adapter_model.safetensors"
    ends = {"lora_A.": f"lora_A.{name}.", "lora_B.": f"lora_B.{name}.", "_vector": f"_vector.{name}.weight"}
    ends["norm.weight"] = f"norm.modules_to_save.{name}.weight"

    def renamed(key):
        return next((key.replace(a, b) for a, b in ends.items() if a in key), key)

    save_file({renamed(key): value for key, value in load_file(file).items()}, file)
    np.testing.assert_allclose(ours(bases("llama"), tmp_path, ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)
    save_file({**load_file(file), "base_model.model.x.lora_A.other.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match=f"several adapters .{name}, other."):
        ours(bases("llama"), tmp_path, ids)


SET = {
    "layer_replication": [[1, 2], [0, 1]], "use_qalora": True, "lora_bias": True, "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 2}, "use_bdlora": {"nblocks": 2},
    "kasa_config": {}, "monteclora_config": {}, "megatron_config": {"a": 1}, "some_future_scale": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("key", SET)
def test_what_is_set_and_not_understood(bases, key, tmp_path):
    """The option is refused by name: ignoring it would give another model."""
    adapter(bases("llama"), tmp_path)
    edit(tmp_path, **{key: SET[key]})
    with pytest.raises(UserError, match=rf"adapter_config\.json asks for {key} = ") as error:
        ours(bases("llama"), tmp_path, tokens(1, 8))
    assert "method." not in str(error.value)


def test_what_is_at_its_default(bases, tmp_path):
    theirs, ids = adapter(bases("llama"), tmp_path), tokens(2, 20)
    edit(
        tmp_path, layer_replication=None, qalora_group_size=16, use_qalora=False, megatron_core="megatron.core",
        loftq_config={}, peft_version="0.99", a_future_config=None, layers_pattern=[], revision="main", runtime_config={"a": 1},
        lora_bias=False, auto_mapping={"base_model_class": "x"},
        fan_in_fan_out=True, init_lora_weights="eva", eva_config={"rho": 2.0},
    )  # fmt: skip
    np.testing.assert_allclose(ours(bases("llama"), tmp_path, ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"r": 0}, "r = 0"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"target_modules": "*q_proj"}, "not a regular expression"),
        ({"target_modules": ["query"]}, "matches no linear layer"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = olora"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path = 5"),
        ({"modules_to_save": 5}, "modules_to_save = 5"),
        ({"trainable_token_indices": ["a"]}, r"trainable_token_indices.*'a'"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices.*-1"),
    ],
)
def test_folders_that_cannot_be_read(bases, values, says, tmp_path):
    adapter(bases("llama"), tmp_path)
    edit(tmp_path, **values)
    with pytest.raises(UserError, match=rf"{tmp_path}.*adapter_config\.json.*{says}|{says}") as error:
        ours(bases("llama"), tmp_path, tokens(1, 8))
    assert "adapter_config.json" in str(error.value) and "method." not in str(error.value)


@pytest.mark.parametrize("text", ['{"a": ' * 3000, f'{{"r": {"9" * 5000}}}'], ids=["deep", "long"])
def test_json_that_python_does_not_read(bases, text, tmp_path):
    base = shutil.copytree(bases("tied"), tmp_path / "base")
    for name in ("adapter_config.json", "generation_config.json", "tokenizer_config.json", "config.json"):
        folder = tmp_path / "adapter" if name.startswith("adapter") else base
        if folder.name == "adapter":
            adapter(base, folder)
        kept = (folder / name).read_text() if (folder / name).exists() else "{}"
        (folder / name).write_text(text)
        reading = {
            "adapter_config.json": lambda folder: ours(base, folder, tokens(1, 8)),
            "generation_config.json": generation_config,
            "tokenizer_config.json": lambda folder: read_object(folder / "tokenizer_config.json"),
            "config.json": read_config,
        }
        with pytest.raises(UserError, match=f"{name}.*not valid JSON"):
            reading[name](folder)
        (folder / name).write_text(kept)


def test_single_experts(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    make_hf(Case("mixtral", "mixtral", {"num_local_experts": 2}), base)
    adapter(base, folder)
    file, name = folder / "adapter_model.safetensors", "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2"
    save_file({**load_file(file), f"{name}.lora_A.weight": torch.ones(2, 48), f"{name}.lora_B.weight": torch.ones(32, 2)}, file)
    edit(folder, target_modules=["q_proj", "w2"])
    with pytest.raises(UserError, match=r"single experts \(w2 of each\), which is not supported"):
        ours(base, folder, tokens(1, 8))


def test_training_goes_on_from_a_copy_of_the_output(bases, tmp_path):
    """The result is what PEFT reads: an output of its own, beside the embedding to which the base ties it."""
    first, second = tmp_path / "first", tmp_path / "second"
    theirs, ids = adapter(bases("tied"), first, modules_to_save=[HEAD]), tokens(2, 20)
    loaded = load(str(bases("tied")), first, one_device(), jnp.dtype(jnp.float32), merge=False)
    settings = from_saved(LoraConfig(adapter_path=str(first)), json.loads((first / "adapter_config.json").read_text()))
    second.mkdir()
    write_adapter(second, loaded.model, loaded.params, settings, str(bases("tied")))
    again = PeftModel.from_pretrained(fresh(bases("tied")), second)
    np.testing.assert_allclose(hf_logits(again, ids), hf_logits(theirs, ids), atol=1e-5, rtol=0)
