"""Tests bfloat16 on CPUs: products are those that are taken in float32, and no whole stack of weights is cast or copied."""

from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import ONE, Case, make_hf, one_device
from tiny_run import make_batch, make_config, run_steps

from ftjax.config import Config
from ftjax.models.facts import complete_config
from ftjax.models.nn import bfloat16
from ftjax.models.nn.bfloat16 import rows_at
from ftjax.models.nn.layers import project
from ftjax.train.setup import compile_steps, design, prepare


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)], ids=["x", "weight", "both"])
def test_products_are_rounded_once(conv1d, trained):
    """Values and gradients are those of float32, rounded."""
    rng = np.random.default_rng(0)
    shapes = [(2, 5, 12), (12, 20) if conv1d else (20, 12), (2, 5, 20)]
    x, weight, d_y = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    def gradients(kind):
        values = [x.astype(kind), weight.astype(kind)]

        def of(*chosen):
            given = dict(zip(trained, chosen, strict=True))
            return project(*(given.get(i, value) for i, value in enumerate(values)), conv1d=conv1d)

        y, pull = jax.vjp(of, *(values[i] for i in trained))
        return y, *pull(d_y.astype(kind))

    want = gradients(jnp.float32)
    with jax.set_mesh(one_device()):
        got = jax.jit(partial(gradients, jnp.bfloat16))()
    for one, other in zip(got, want, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.bfloat16).astype(jnp.float32), rtol=1 / 128)


LAYERS = ["full_attention", "full_attention", "sliding_attention"]  # a scan over two layers, and one by itself


def test_updates_are_those_without_it(tmp_path, monkeypatch):
    make_hf(Case("gemma", "gemma3_text", {"num_hidden_layers": 3, "layer_types": LAYERS, "head_dim": 8}), tmp_path)
    config, batches = make_config(tmp_path), [make_batch(4, 16, 96, seed) for seed in (0, 1)]
    model = config.model.model_copy(update={"dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": "dots"})
    config, found = config.model_copy(update={"model": model}), []
    for own in (True, False):
        if not own:
            monkeypatch.setattr(bfloat16, "on_cpu", lambda: False)
        metrics, _ = run_steps(prepare(config, ONE), batches)
        found.append([float(value) for one in metrics for value in (one.loss, one.grad_norm)])
    assert found[0] != found[1], "the same products were taken"
    np.testing.assert_allclose(found[0], found[1], rtol=0.02)


def test_weights_are_neither_cast_nor_copied(monkeypatch):
    """A step takes less memory beside the weights than half of them."""
    facts = complete_config({
        "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }, "here")  # fmt: skip
    config = Config.model_validate({
        "model": {"path": "none", "remat": "dots"}, "method": {"name": "lora", "r": 1}, "training": {"global_batch_size": 1},
        "data": {"train": "none", "max_length": 16},
    })  # fmt: skip

    def memory() -> float:
        """Return the step's temporaries over the bytes of the frozen weights."""
        mesh = one_device()
        with jax.set_mesh(mesh):
            plan = design(config, facts, mesh)
            step, _, optimizer, _ = compile_steps(plan, 1)
            inputs = plan.abstract_inputs(optimizer)
            temporaries = step.lower(*inputs).compile().memory_analysis().temp_size_in_bytes
        return temporaries / sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(inputs[1]))

    assert memory() < 0.5
    monkeypatch.setattr(bfloat16, "on_cpu", lambda: False)
    if version("jaxlib").startswith("0.10."):  # later versions cast nothing here
        assert memory() > 1, "otherwise it would need no care"


def test_rows_of_a_table():
    rng = np.random.default_rng(0)
    table, ids = jnp.asarray(rng.normal(size=(11, 4)), jnp.bfloat16), jnp.asarray([[3, 10, 0], [3, 11, 5]], jnp.int32)
    want, pull = jax.vjp(lambda table: rows_at(table, ids), table)
    with jax.set_mesh(one_device()):
        got, pull_there = jax.vjp(jax.jit(lambda table: rows_at(table, ids)), table)
        [gradient] = pull_there(jnp.ones_like(got))
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
    assert jnp.isnan(got[1, 1]).all()
    np.testing.assert_array_equal(gradient.astype(jnp.float32), pull(jnp.ones_like(want))[0].astype(jnp.float32))
