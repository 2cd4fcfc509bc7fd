"""Tests training a part of the model: by pattern, the last layers, norms and biases."""

import dataclasses

import jax
import numpy as np
import pytest
from oracle import ONE, Case, folders, hf_logits, load, logits, make_hf, one_device, tokens, write_merged
from processes import ALL
from tiny_run import make_batch, make_config, run_steps
from transformers import AutoModelForCausalLM

from ftjax import tree
from ftjax.config import FullConfig
from ftjax.errors import UserError
from ftjax.methods import method_of
from ftjax.models.model import Model
from ftjax.train.remat import saved_bytes
from ftjax.train.setup import Design, prepare
from ftjax.train.step import Runtime

CASES = {
    "llama": Case("llama", "llama", {"num_hidden_layers": 4, "attention_bias": True}),
    "gpt2": Case("gpt2", "gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 64}),
    "qwen3_moe": Case("qwen3-moe", "qwen3_moe", {
        "num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "moe_intermediate_size": 16, "head_dim": 8,
    }),
}  # fmt: skip
LAYERS_OF = {"llama": "model.layers", "gpt2": "transformer.h", "qwen3_moe": "model.layers"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return folders(CASES, tmp_path_factory)


def trained_names(folder, **method) -> set[str]:
    model, _ = attach(folder, **method)
    return {piece.name for spec in model.trainable.values() for piece in spec.pieces()}


def attach(folder, **method) -> tuple[Model, dict]:
    config = FullConfig(**method)
    return load(folder, lambda root: method_of(config).attach(root, config))


def hf_names(folder) -> list[str]:
    return [name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()]


@pytest.mark.parametrize("name", CASES)
def test_what_trains(bases, name):
    """Names are those of transformers; the experts of all families are one tensor per layer."""
    folder, layers = bases(name), LAYERS_OF[name]
    every = set(hf_names(folder))
    assert trained_names(folder) == every
    depth = 1 + max(int(n.split(f"{layers}.")[1].split(".")[0]) for n in every if layers in n)
    last = {n for n in every if n.startswith(f"{layers}.{depth - 1}.")}
    assert trained_names(folder, last_layers=1) == last
    embedding = {n for n in every if "wte" in n or "embed_tokens" in n}
    assert trained_names(folder, last_layers=1, train=["wte|embed_tokens"]) == last | embedding
    assert trained_names(folder, freeze=[rf"\.[0-{depth - 2}]\."]) == {n for n in every if layers not in n} | last
    biases = {n for n in every if n.endswith("bias")}
    norms = {n for n in every if "norm" in n or ".ln_" in n}
    assert trained_names(folder, train=["norms"]) == norms
    if biases:
        assert trained_names(folder, train=["norms", "biases"]) == norms | biases
        assert trained_names(folder, train=["biases"], freeze=["norms"]) == biases - norms


WAYS = [
    ("llama", {"train": [r"layers\.[13]\.mlp", r"layers\.0\.self_attn\.q_proj\.weight", "lm_head"]},
     r"layers\.[13]\.mlp|layers\.0\.self_attn\.q_proj\.weight|lm_head"),
    ("gpt2", {"train": [r"h\.0\.", "wte"]}, r"h\.0\.|wte"),
    ("qwen3_moe", {"last_layers": 2, "freeze": ["norms"]}, r"layers\.[12]\.(?!.*norm)"),
]  # fmt: skip
WAYS = WAYS if ALL else WAYS[:1]


@pytest.mark.parametrize("name, method, pattern", WAYS, ids=[way[0] for way in WAYS])
def test_training_is_full_training_whose_other_updates_are_left_out(bases, name, method, pattern):
    """The same weights after two steps as with every gradient taken and a learning rate of zero for the rest; the Llama's
    parts over eight devices, and all of it on one."""
    folder, batches = bases(name), [make_batch(8, 16, 96, seed) for seed in range(2)]
    settings = {"adam_epsilon": 1e-3, "max_grad_norm": None}
    rest = {**settings, "groups": [{"pattern": pattern}, {"pattern": ".", "learning_rate": 0.0}]}
    mesh, devices = ({"fsdp": 4, "tensor": 2}, None) if name == "llama" else ({"fsdp": 1}, ONE)
    part = prepare(make_config(folder, method={"name": "full", **method}, optimizer=settings, mesh=mesh), devices)
    whole = prepare(make_config(folder, method={"name": "full"}, optimizer=rest), ONE)
    got, want = after(part, batches), after(whole, batches)
    moved = {piece.name for spec in part.model.trainable.values() for piece in spec.pieces()}
    start = after(whole, [])
    assert moved < start.keys()
    for key, value in start.items():
        np.testing.assert_allclose(got[key], want[key], atol=2e-5, err_msg=key)
        assert (np.abs(got[key] - value).max() > 1e-6) == (key in moved), key


def after(setup, batches) -> dict[str, np.ndarray]:
    """Return all weights by Hugging Face name after training on the batches."""
    params = {**setup.frozen, **jax.tree.map(jax.numpy.copy, setup.params)}
    if batches:
        params |= run_steps(dataclasses.replace(setup, params=tree.split(params, setup.params.__contains__)[0]), batches)[1]
    return {
        piece.name: np.asarray(params[path])[piece.index] for path, spec in setup.model.specs.items() for piece in spec.pieces()
    }


def test_written_as_the_same_model(bases, tmp_path):
    """Layers that were stacked separately are written in their order."""
    model, params = attach(bases("qwen3_moe"), train=[r"layers\.[02]\.", "norms"])
    rng = np.random.default_rng(0)
    for path, spec in model.trainable.items():
        params[path] = params[path] + rng.normal(size=spec.shape).astype(np.float32) * 0.1
    write_merged(tmp_path, model, params, FullConfig(), bases("qwen3_moe"))
    ids = tokens(2, 20)
    got = logits(model, params, ids)
    np.testing.assert_allclose(got, hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), atol=1e-4, rtol=0)
    plain, weights = load(bases("qwen3_moe"))
    assert np.abs(got - logits(plain, weights, ids)).max() > 1e-2


def test_layers_before_the_first_trained_one_keep_nothing(tmp_path):
    """Frozen layers at the bottom need no memory for a backward pass, nor moments."""
    kept = {}
    for depth in (2, 6):
        folder = tmp_path / str(depth)
        make_hf(Case("deep", "llama", {"num_hidden_layers": depth}), folder)
        for method in ({"last_layers": 1}, {"last_layers": 1, "train": ["embed_tokens"]}):
            model, _ = attach(folder, **method)
            made = Design(make_config(folder), one_device(), model, Runtime())
            kept[depth, len(method)] = saved_bytes(made.loss_fn, Runtime(), model.trainable, model.frozen, "none", (2, 16))
    assert kept[2, 1] == kept[6, 1]
    assert kept[2, 2] < kept[6, 2], "a trained embedding has the layers above it in its backward pass"


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"train": ["nothing"]}, ["method.train", "nothing", "mlp.up_proj"]),
        ({"freeze": ["q_prj"]}, ["method.freeze", "q_prj"]),
        ({"train": ["("]}, ["method.train", "regular expression"]),
        ({"last_layers": 5}, ["last_layers", "5", "4 layers"]),
        ({"freeze": ["."]}, ["nothing to train"]),
    ],
)
def test_refused(bases, method, says):
    with pytest.raises(UserError) as error:
        attach(bases("llama"), **method)
    for word in says:
        assert word in str(error.value)


def test_a_model_without_biases(tmp_path):
    make_hf(Case("llama", "llama"), tmp_path)
    with pytest.raises(UserError, match="'biases' matches no parameter"):
        attach(tmp_path, train=["biases"])
