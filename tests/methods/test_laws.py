"""Tests properties of every registered method.

The reference is PEFT, for methods whose files it reads. A method that is not in VARIANTS is tried with its defaults.
"""

import json
from functools import cache

import jax
import numpy as np
import pytest
import torch
from oracle import (
    ONE,
    Case,
    assert_cached_is_uncached,
    hf_logits,
    load,
    logits,
    make_hf,
    one_device,
    peer_training,
    tokens,
    write_merged,
)
from processes import ALL
from tiny_run import make_batch, make_config, run_steps
from tiny_tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM

from ftjax.hub.adapter.peft import attach_adapter, load_adapter, start_adapter, write_adapter
from ftjax.methods import METHODS, method_named, method_of
from ftjax.train.setup import compile_steps, prepare

FAMILIES = [
    Case("llama", "llama", {"attention_bias": True, "head_dim": 12}),
    Case("gpt2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}),
    *[Case("qwen3", "qwen3", {"head_dim": 12})] * ALL,
]
LLAMA = FAMILIES[0]
SHAPE = 2, 20  # of most texts, so that tests share programs
FEWER = FAMILIES if ALL else FAMILIES[:1]  # the way a family stores its projections should not matter
VARIANTS: dict[str, dict[str, dict]] = {
    "lora": {"lora": {"r": 4, "lora_alpha": 8}, "dora": {"r": 4, "lora_alpha": 8, "use_dora": True}},
    "prefix_tuning": {
        "prefix": {"num_virtual_tokens": 5},
        "projected": {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 12},
    },
    "prompt_tuning": {
        "prompt": {"num_virtual_tokens": 5},
        "text": {"num_virtual_tokens": 5, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Once upon a time"},
    },
    "p_tuning": {"p_tuning": {"num_virtual_tokens": 5, "encoder_hidden_size": 12}},
}
VIRTUAL = {"prefix", "projected", "prompt", "text", "p_tuning"}
MOVES_AT_ONCE = {*VIRTUAL, "seq_bn", "double_seq_bn"}  # methods that do not promise to start from the base

NAMES = {
    variant: {"name": method, **values} for method in METHODS for variant, values in VARIANTS.get(method, {method: {}}).items()
}
ADAPTERS = [name for name, values in NAMES.items() if method_named(values["name"]).adapter]


def in_peft(name: str) -> bool:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return any(
        method_named(NAMES[name]["name"]).reads({"peft_type": kind}) for kind in map(str.upper, PEFT_TYPE_TO_CONFIG_MAPPING)
    )


PEFT = [name for name in ADAPTERS if in_peft(name)]


ONLY_LLAMA = {"projected", "text", "p_tuning"}  # on the other families they equal `prefix` and `prompt`


def on(families, names):
    """Try a test with these methods on these families."""
    meeting = [(case, name) for case in families for name in names if case is LLAMA or name not in ONLY_LLAMA]
    return pytest.mark.parametrize("base, name", meeting, indirect=["base"], ids=[f"{case}-{name}" for case, name in meeting])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function from the name of a family to (transformers' model, its folder), made once."""

    @cache
    def of(name: str):
        folder = tmp_path_factory.mktemp(name)
        save_tokenizer(folder)
        return make_hf(next(case for case in FAMILIES if case.name == name), folder), folder

    return of


@pytest.fixture
def base(request, bases):
    return bases(request.param.name)


def their_logits(hf, ids):
    """Return PEFT's logits of the text, without those of virtual tokens."""
    return hf_logits(hf, ids)[:, -ids.shape[1] :]


def config_of(folder, name: str):
    return make_config(folder, method=NAMES[name]).method


def started(folder, name: str, noise: float = 0.0, seed: int = 0):
    """Return `(config, model, parameters)` with the method's own initial values, or with noise on what trains."""
    config = config_of(folder, name)
    method = method_of(config)
    model, params = load(folder, lambda root: method.attach(root, config))
    if method.adapter:
        params |= start_adapter(model, params, config, one_device(), seed, lambda text: [5, 6, 7])
    rng = np.random.default_rng(seed)
    for path, spec in model.trainable.items() if noise else ():
        value = np.array(params[path])
        for piece in spec.pieces():
            part = value[piece.index]
            value[piece.index] = part + rng.normal(size=part.shape).astype(np.float32) * noise
        params[path] = jax.device_put(value, params[path].sharding)
    return config, model, params


def peft_model(folder, adapter, trainable: bool = False):
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter, is_trainable=trainable)


@on(FAMILIES, [name for name in ADAPTERS if name not in MOVES_AT_ONCE])
def test_starts_from_the_base(base, name):
    hf, folder = base
    _, model, params = started(folder, name)
    ids = tokens(*SHAPE)
    np.testing.assert_allclose(logits(model, params, ids), hf_logits(hf, ids), atol=1e-4, rtol=0)


BESIDE_PEERS = [name for name in PEFT if name != "lora" and (ALL or name not in ONLY_LLAMA)]  # test_ten_steps_of_the_peer


@on(FEWER, [name for name in NAMES if ALL or name not in BESIDE_PEERS])
def test_only_its_own_moves(base, name):
    setup = prepare(make_config(base[1], method=NAMES[name], optimizer={"weight_decay": 0.1}), ONE)
    only_its_own_moves(setup, [make_batch(8, 32, 96, seed) for seed in (0, 1)])


def only_its_own_moves(setup, batches) -> list:
    """Assert that moments and gradients exist for what trains alone, and that the base is what it was; return the metrics."""
    before = {path: np.array(leaf) for path, leaf in {**setup.frozen, **setup.params}.items()}
    assert set(setup.params) == set(setup.model.trainable) and not set(setup.params) & set(setup.frozen)
    trained = sum(leaf.size for leaf in setup.params.values())
    moments = jax.tree.leaves(jax.eval_shape(compile_steps(setup, 10)[2].init, setup.params))
    assert sum(leaf.size for leaf in moments if leaf.ndim) == 2 * trained
    metrics, after = run_steps(setup, batches)
    for path in setup.frozen:
        np.testing.assert_array_equal(setup.frozen[path], before[path])
    still = [path for path, value in after.items() if np.array_equal(value, before[path])]
    assert not still, f"no gradient reaches {still}"
    return metrics


@on(FAMILIES, PEFT)
def test_ours_in_peft(base, name, tmp_path):
    """PEFT loads ftjax's folder with the same logits and number of weights, and ftjax reads it back unchanged."""
    hf, folder = base
    config, model, params = started(folder, name, 0.3)
    write_adapter(tmp_path, model, params, config, str(folder))
    ids = tokens(*SHAPE)
    got = logits(model, params, ids)
    np.testing.assert_allclose(got, their_logits(peft_model(folder, tmp_path), ids), atol=1e-4, rtol=0)
    assert np.abs(got - hf_logits(hf, ids)).max() > 1e-2, "the adapter has no effect, so nothing was compared"
    again, values = load(folder, lambda root: attach_adapter(root, tmp_path))
    values |= load_adapter(again, tmp_path, one_device())
    np.testing.assert_allclose(logits(again, values, ids), got, atol=1e-5, rtol=0)


# Fields that the configurations of these methods share in PEFT 0.13.2, and their own fields
OLDER = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "revision", "task_type"}
VIRTUAL_OLDER = {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}
OWN_OLDER = {
    "lora": {
        "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "layer_replication", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config", "megatron_core",
        "modules_to_save", "r", "rank_pattern", "runtime_config", "target_modules", "use_dora", "use_rslora",
    },
    "ia3": {"fan_in_fan_out", "feedforward_modules", "init_ia3_weights", "modules_to_save", "target_modules"},
    "prefix_tuning": {*VIRTUAL_OLDER, "encoder_hidden_size", "prefix_projection"},
    "prompt_tuning": {
        *VIRTUAL_OLDER, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path",
    },
    "p_tuning": {
        *VIRTUAL_OLDER, "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type",
    },
}  # fmt: skip


@on(FAMILIES, PEFT)
def test_older_peft_knows_every_key(base, name, tmp_path):
    """An older PEFT would refuse a folder for an unknown key, even at its default."""
    config, model, params = started(base[1], name)
    write_adapter(tmp_path, model, params, config, "base")
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())) <= OLDER | OWN_OLDER[NAMES[name]["name"]]


@on(FAMILIES, PEFT)
def test_theirs_in_ours(base, name, tmp_path):
    """A folder that PEFT writes from ftjax's configuration gives the same logits and number of weights."""
    from peft import PeftConfig, get_peft_model

    _, folder = base
    config, model, params = started(folder, name)
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", model, params, config, str(folder))
    settings = PeftConfig.from_pretrained(tmp_path / "ours")
    settings.inference_mode = False
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = tokens(*SHAPE)
    again, values = load(folder, lambda root: attach_adapter(root, tmp_path / "theirs"))
    values |= load_adapter(again, tmp_path / "theirs", one_device())
    np.testing.assert_allclose(logits(again, values, ids), their_logits(theirs, ids), atol=1e-4, rtol=0)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(spec.size for spec in model.trainable.values()) == trained


@on(FAMILIES, ADAPTERS)
def test_merged_or_refused(base, name, tmp_path):
    _, folder = base
    config, model, params = started(folder, name, 0.2)
    method = method_of(config)
    if method.merged is None:
        assert method.no_merge
        return
    write_merged(tmp_path, model, params, config, folder)
    ids = tokens(*SHAPE)
    plain, weights = load(tmp_path)
    np.testing.assert_allclose(logits(plain, weights, ids), logits(model, params, ids), atol=1e-5, rtol=1e-5)


@on(FEWER, ADAPTERS)
def test_packed_is_unpacked(base, name):
    """The method keeps documents of a row apart: two in a row give what each gives alone."""
    _, folder = base
    _, model, params = started(folder, name, 0.3)
    documents, filled = tokens(2, 8, seed=1), np.zeros((1, 4), np.int32)
    together = np.concatenate([*documents, filled[0]])[None].repeat(2, axis=0)
    segments = np.repeat([[1, 2, 0]] * 2, [8, 8, 4], axis=1).astype(np.int32)
    positions = np.stack([np.arange(20, dtype=np.int32) % 8] * 2)
    got = logits(model, params, together, segments=segments, positions=positions)
    alone = np.pad(documents, ((0, 0), (0, 12)))
    want = logits(model, params, alone, segments=np.where(segments == 1, 1, 0), positions=positions)[:, :8]
    np.testing.assert_allclose(got[0, :16].reshape(want.shape), want, atol=1e-5)


# What a method adds to each token is the same with a cache; virtual tokens are in it, as keys and values or as inputs.
CACHED = ADAPTERS if ALL else ["lora", "double_seq_bn", "prefix", "prompt"]


@on(FEWER, CACHED)
def test_cached_is_uncached(base, name):
    """Several tokens at a time through the KV cache, with padding after some, give the logits of the whole text at once."""
    _, folder = base
    _, model, params = started(folder, name, 0.3)
    portions = ((8, 7), (1, 1), (11, 12))
    assert_cached_is_uncached(model, params, tokens(*SHAPE), portions, 28, atol=2e-5)


def peer_losses(stories, setup, name: str, batches, adapter) -> tuple[list[float], int]:
    """Losses before each update and the number of trained weights: by the benchmarks' script; for virtual tokens, which
    PEFT trains from no file, by its steps here."""
    if name not in VIRTUAL:
        files = ["--model", str(stories), "--batches", str(batches), "--adapter", str(adapter)]
        want = peer_training(adapter, *files, "--lr", "1e-2")
        return want["loss"], want["trained"]
    from peft import PeftConfig, get_peft_model

    settings = PeftConfig.from_pretrained(adapter)
    settings.inference_mode, settings.prompt_tuning_init = False, "RANDOM"
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(stories), settings).train()
    with torch.no_grad():
        for key, parameter in theirs.prompt_encoder["default"].named_parameters():  # embedding.weight, transform.0.bias ...
            _, number, part = ["", *key.split(".")][-3:]
            ours = "embedding" if key == "embedding.weight" else f"{part}_{number}"
            parameter.copy_(torch.tensor(np.asarray(setup.params[f"virtual.{ours}"])))
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses, data = [], np.load(batches)
    for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
        ids, labels = torch.tensor(ids), torch.tensor(labels)
        loss = theirs(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, sum(parameter.numel() for parameter in trained)


@pytest.mark.parametrize("name", BESIDE_PEERS)  # LoRA is in test_step.py
def test_ten_steps_of_the_peer(stories, name, tmp_path):
    """PEFT from the same adapter on the same batches: ten losses within 1e-4, in float32."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 512, (2, 4, 32))[np.arange(10) % 2]
    labels = np.where(rng.random(ids.shape[1:]) < 0.6, ids, -100)
    labels[..., 0] = -100  # with virtual tokens as embeddings, PEFT's last one would predict it
    np.savez(tmp_path / "batches.npz", input_ids=ids, labels=labels)
    config = make_config(stories, method=NAMES[name], optimizer={"learning_rate": 1e-2}, global_batch_size=4)
    setup = prepare(config, ONE)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, setup.model, setup.params, config.method, str(stories))
    losses, trainable = peer_losses(stories, setup, name, tmp_path / "batches.npz", folder)
    shifted = np.concatenate([labels[..., 1:], np.full((10, 4, 1), -100)], axis=-1)
    ones = np.ones((4, 32), np.int32)
    batches = [
        {
            "tokens": ids[step].astype(np.int32), "targets": np.maximum(shifted[step], 0).astype(np.int32),
            "weights": (shifted[step] >= 0).astype(np.float32), "segment_ids": ones,
            "positions": np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32)),
        }
        for step in range(10)
    ]  # fmt: skip
    metrics = only_its_own_moves(setup, batches)
    np.testing.assert_allclose([float(m.loss) for m in metrics], losses, atol=1e-4)
    assert losses[8] < losses[0] - 0.01, "nothing was learned, so nothing was compared"
    assert sum(spec.size for spec in setup.model.trainable.values()) == trainable
