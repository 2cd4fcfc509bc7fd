"""Tests decoding on a CPU with one array per layer: the same answers, in the memory of the stacked weights."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate.engines import LLAMA, generator_of
from oracle import load, make_hf, one_device, tokens

from ftjax.config import MeshConfig
from ftjax.generate import separate
from ftjax.generate.paged import PagedBatch, Room
from ftjax.generate.separate import Layers
from ftjax.mesh import make_mesh
from ftjax.models.nn.quantise import quantise

PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (7, 24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("llama")
    make_hf(LLAMA, found)
    return found


def test_layers_share_the_memory_of_their_stack(folder, monkeypatch):
    monkeypatch.setattr(separate, "WORTH", 0)
    model, params = load(folder)
    params = jax.tree.map(jnp.copy, params)  # memory of XLA's own, which a program can take over
    layers_of = Layers(model, params, one_device())
    found = layers_of.of(params)
    assert found.keys() == {path for path, spec in model.specs.items() if spec.stacked}
    shared = 0
    for path, layers in found.items():
        first, each = params[path].unsafe_buffer_pointer(), params[path].nbytes // len(layers)
        np.testing.assert_array_equal(np.stack(layers), jnp.copy(params[path]))  # the stack itself would keep a view
        shared += [layer.unsafe_buffer_pointer() for layer in layers] == [first + each * at for at in range(len(layers))]
    assert shared, "no layer is in the memory of its stack"
    path = next(iter(found))
    del layers, found, layers_of
    at = params[path].unsafe_buffer_pointer()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(params[path])
    assert after.unsafe_buffer_pointer() == at, "a stack whose layers are gone is donated as before"


def test_small_models_and_several_devices_keep_their_stacks(folder, monkeypatch):
    model, params = load(folder)
    assert Layers(model, params, one_device()).of(params) == {}
    monkeypatch.setattr(separate, "WORTH", 0)
    mesh = make_mesh(MeshConfig(tensor=2, data=4))
    model, params = load(folder, mesh=mesh)
    assert Layers(model, params, mesh).of(params) == {}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_layers_answer_alike(folder, quantization, monkeypatch):
    generator = generator_of(*load(folder, partial(quantise, kind=quantization)))
    expected = generator.generate(PROMPTS, max_new_tokens=12, logprobs=True)
    monkeypatch.setattr(separate, "WORTH", 0)
    found = generator.generate(PROMPTS, max_new_tokens=12, logprobs=True)
    for mine, other in zip(found, expected, strict=True):
        assert mine.tokens == other.tokens
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-5)


def test_the_program_that_decodes(folder, monkeypatch):
    """XLA swaps the factors of products back, and merges sines and cosines into each layer, unless it is kept from it."""
    monkeypatch.setattr(separate, "WORTH", 0)
    generator = generator_of(*load(folder))
    batch = PagedBatch(generator.engine, generator.params, Room.fit(generator.engine, rows=2, context=64))
    batch.open()
    _, turn = batch.turn([], 1, False, {}, batch.widths[0], 2)
    with jax.set_mesh(generator.engine.mesh):
        text = batch._programs.decode.lower(batch.decode_params, batch._state, turn).compile().as_text()
    assert text.count(" cosine(") == 1
    vocab = generator.model.sizes.vocab
    assert f"f32[{vocab},2]" in "".join(re.findall(r"f32\S* dot\(", text))
    assert f"f32[2,{vocab}]" not in "".join(re.findall(r"f32\S* dot\(", text))
