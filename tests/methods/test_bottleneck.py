"""Tests bottleneck adapters against committed figures of the `adapters` library, and against the library itself if
installed."""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapterhub_reference import FAMILIES, KINDS, fill, fill_model, ids
from cases import ONE_OF_EACH
from oracle import ONE, context, load, logits, make_hf, one_device
from processes import ALL
from safetensors import safe_open
from tiny_run import make_batch, make_config, run_steps
from transformers import AutoConfig, AutoModelForCausalLM

from ftjax.errors import UserError
from ftjax.hub.adapter.peft import attach_adapter, load_adapter, write_adapter
from ftjax.hub.export import write_portable
from ftjax.hub.load import init_params
from ftjax.methods import method_named
from ftjax.train.setup import prepare

HERE = Path(__file__).parents[1]
GOLDEN = json.loads((HERE / "adapterhub_golden.json").read_text())
PYTHON = os.environ.get("FTJAX_ADAPTERS_PYTHON")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Write the models of the reference as folders."""
    made = {}

    def of(family):
        if family not in made:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
            fill_model(model)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return of


def ours(folder, kind):
    """Return ftjax's model with the adapter of the reference."""
    method = method_named(kind)
    config = method.config()
    model, params = load(folder, lambda root: method.attach(root, config))
    for path, spec in model.trainable.items():
        value = np.empty(spec.shape, np.float32)
        for piece in spec.pieces():
            value[piece.index] = fill(piece.name, piece.shape)
        params[path] = jax.device_put(value, one_device().devices.flat[0])
    return model, params, config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES if ALL else ["llama", "gpt2"])
def test_the_library_gives_the_same(bases, family, kind, tmp_path):
    """Logits, gradients and every key of the saved files agree; the folder loads again."""
    want, base = GOLDEN[family][kind], GOLDEN[family]["base"]
    model, params, config = ours(bases(family), kind)
    got, norms = last_logits_and_norms(model, params)
    np.testing.assert_allclose(got, want["logits"], atol=1e-4, rtol=0)
    assert np.abs(got - base).max() > 0.1, "the adapter has no effect, so nothing was compared"

    write_adapter(tmp_path, model, params, config, "")
    with safe_open(tmp_path / "adapter.safetensors", "numpy") as file:
        assert {name: list(file.get_slice(name).get_shape()) for name in file.keys()} == want["tensors"]
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved == want["config"]

    again, _ = load(bases(family), lambda root: attach_adapter(root, tmp_path))
    read = load_adapter(again, tmp_path, one_device())
    for path, value in read.items():
        np.testing.assert_array_equal(value, params[path])

    assert norms.keys() == want["norms"].keys()
    for name, value in norms.items():
        np.testing.assert_allclose(value, want["norms"][name], rtol=2e-4, atol=1e-5, err_msg=name)


def last_logits_and_norms(model, params) -> tuple[np.ndarray, dict[str, float]]:
    """Return the logits of each row's last token, and the norms of the gradients of the loss by tensor."""
    tokens = ids().astype(np.int32)
    ctx = context(tokens)

    def loss(trained):
        module = model.bind({**params, **trained})
        logits = module.unembed(module.hidden(jnp.asarray(tokens), ctx)[0], ctx)
        chances = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(chances, jnp.asarray(tokens)[:, 1:, None], axis=-1).mean(), logits[:, -1]

    grads, last = jax.jit(jax.grad(loss, has_aux=True))({path: params[path] for path in model.trainable})
    return np.asarray(last), {
        piece.name: float(np.linalg.norm(np.asarray(grads[path])[piece.index]))
        for path, spec in model.trainable.items()
        for piece in spec.pieces()
    }


@pytest.mark.sweep  # test_the_library_gives_the_same has its results
@pytest.mark.skipif(not PYTHON, reason="FTJAX_ADAPTERS_PYTHON names no Python with the `adapters` library")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_loads_the_folder(bases, family, kind, tmp_path):
    model, params, config = ours(bases(family), kind)
    write_adapter(tmp_path, model, params, config, "")
    command = [PYTHON, str(HERE / "adapterhub_reference.py"), "logits", family, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    got = logits(model, params, ids().astype(np.int32))[:, -1]
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), got, atol=1e-4, rtol=0)


OWN_BLOCKS = ("gemma", "gemma2", "gpt_neox", "granite", "mixtral", "olmo2")  # the other families take theirs from these


@pytest.mark.parametrize("case", [case for case in ONE_OF_EACH if case.model_type in OWN_BLOCKS], ids=str)
def test_every_block_has_the_places(case, tmp_path):
    """Each layer gets two bottlenecks, and each changes the result."""
    make_hf(case, tmp_path)
    method = method_named("double_seq_bn")
    model, params = load(tmp_path, lambda root: method.attach(root, method.config()))
    layers = model.config.get("num_hidden_layers", model.config.get("n_layer"))
    assert sum(1 for spec in model.trainable.values() for _ in spec.pieces()) == layers * 2 * 4
    params |= init_params({p: s for p, s in model.specs.items() if s.row.adapter}, one_device(), 0)
    tokens = np.arange(3, 13, dtype=np.int32)[None]
    ctx = context(tokens)
    hidden = jax.jit(lambda params: model.bind(params).hidden(jnp.asarray(tokens), ctx)[0])
    start = hidden(params)
    for place in {path.rpartition(".")[0] for path in model.trainable}:
        shift = np.linspace(-0.5, 0.5, 32, dtype=np.float32)  # a constant one would vanish in the next norm
        moved = hidden({**params, f"{place}.up_bias": params[f"{place}.up_bias"] + shift})
        assert np.abs(moved - start).max() > 1e-2, place


def test_it_trains(bases):
    """The parallel one starts from the base model, and the loss falls; dropout is drawn in training only."""
    setup = prepare(make_config(bases("llama"), method={"name": "par_bn", "dropout": 0.1}), ONE)
    assert "lm_head.weight" in setup.frozen
    start, params = load(bases("llama"))
    tokens = ids().astype(np.int32)
    base = logits(start, params, tokens)
    np.testing.assert_allclose(logits(setup.model, {**setup.frozen, **setup.params}, tokens), base, atol=1e-5)
    batch = make_batch(8, 16, 96)
    losses = [float(m.loss) for m in run_steps(setup, [batch] * 10)[0]]
    assert losses[-1] < losses[0] - 0.2


def test_refused(bases, tmp_path):
    method = method_named("seq_bn")
    with pytest.raises(UserError, match=r"non_linearity.*'step'.*relu"):
        load(bases("llama"), lambda root: method.attach(root, method.config(non_linearity="step")))
    model, params, config = ours(bases("llama"), "seq_bn")
    write_adapter(tmp_path, model, params, config, "")
    with pytest.raises(UserError, match="has seq_bn; leave it as it is"):
        write_portable(tmp_path, tmp_path / "out")
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value in (("leave_out", [0]), ("use_gating", True), ("scaling", "learned"), ("inv_adapter", "nice")):
        broken = {**saved, "config": {**saved["config"], key: value}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=key):
            load(bases("llama"), lambda root: attach_adapter(root, tmp_path))
