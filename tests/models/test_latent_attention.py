"""Tests latent attention: what its cache holds, decoding with an adapter, and values of another size than keys."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from oracle import assert_cached_is_uncached, context, hf_config, load, make_hf, one_device, tokens
from processes import ALL

from ftjax.config import LoraConfig, MeshConfig, PrefixTuningConfig
from ftjax.errors import UserError
from ftjax.hub.load import init_params
from ftjax.mesh import make_mesh
from ftjax.methods import method_of
from ftjax.models.facts import complete_config
from ftjax.models.model import build_module
from ftjax.models.nn.attention import attend
from ftjax.models.nn.cache import Cache, Layout
from ftjax.models.nn.layer_types import Pattern

CASE = next(case for case in CASES if case.name == "deepseek-v3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    make_hf(CASE, folder)
    return folder


def test_the_cache_holds_a_latent_and_one_key(folder):
    model, _ = load(folder)
    cache = jax.eval_shape(lambda: Cache.empty(Layout(model.memories), 3, 20, jnp.bfloat16))
    assert [k.shape for k in cache.keys] == [(4, 3, 20, 1, 8)]
    assert [v.shape for v in cache.values] == [(4, 3, 20, 1, 16)]


def test_an_adapter_decodes_as_it_reads(folder):
    """Decoding step by step uses the matrix of `kv_b_proj` with its adapter."""
    config = LoraConfig(r=4, target_modules=["kv_b_proj", "q_b_proj"])
    model, params = load(folder, lambda root: method_of(config).attach(root, config))
    params |= init_params({path: spec for path, spec in model.specs.items() if spec.row.adapter}, one_device(), 0)
    rng = np.random.default_rng(0)
    for path, spec in model.trainable.items():
        params[path] = jnp.asarray(rng.normal(size=spec.shape) * 0.3, jnp.float32)
    assert_cached_is_uncached(model, params, tokens(2, 14), ((9, 7), (1, 1), (1, 1), (1, 1), (2, 4)), 24)


@pytest.mark.parametrize("sizes", [{"sequence": 2, "fsdp": 4}, {"sequence": 2, "tensor": 2, "data": 2}], ids=str)
def test_kernels_on_several_devices(folder, sizes):
    """Kernels get values padded to the size of keys, also where tokens and heads are sharded."""
    ids = tokens(8, 16)

    def hidden(mesh, backend):
        model, params = load(folder, mesh=mesh)
        ctx = context(ids, attention=backend)
        with jax.set_mesh(mesh):
            return jax.jit(lambda params: model.bind(params).hidden(jnp.asarray(ids), ctx)[0])(params)

    want = hidden(one_device(), "xla")
    np.testing.assert_allclose(hidden(make_mesh(MeshConfig(**sizes)), "blockwise"), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("sizes", "backend"), [
    ((12, 8), "blockwise"), ((8, 12), "splash_interpreted"), *[((8, 12), "blockwise"), ((12, 8), "splash_interpreted")] * ALL,
], ids=str)  # fmt: skip
def test_kernels_take_values_of_another_size(backend, sizes):
    rng = np.random.default_rng(0)
    key, value = sizes
    q, k, v = (jnp.asarray(rng.normal(size=(2, 37, n, size)), jnp.float32) for n, size in ((4, key), (2, key), (2, value)))
    segments = jnp.asarray([np.repeat([1, 2, 0], [20, 15, 2]), np.repeat([1, 2], [30, 7])], jnp.int32)
    real = (segments > 0).astype(jnp.float32)[:, :, None, None]
    weight = jnp.asarray(rng.normal(size=(2, 37, 4, value)), jnp.float32) * real

    def loss(backend, *qkv):
        return jnp.sum(attend(*qkv, segments, segments, 0, Pattern(0.3), backend) * weight)

    @jax.jit
    def both(*qkv):
        return [jax.value_and_grad(partial(loss, name), (0, 1, 2))(*qkv) for name in ("xla", backend)]

    want, got = both(q, k, v)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


def test_virtual_tokens_are_refused_even_where_the_sizes_are_equal():
    config = make_config({"kv_lora_rank": 8, "qk_rope_head_dim": 8})
    method = PrefixTuningConfig(num_virtual_tokens=3)
    with pytest.raises(UserError, match="another kind of memory"):
        method_of(method).attach(build_module(config), method)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"v_head_dim": None}, "v_head_dim = None"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        build_module({**make_config({}), **change})


def make_config(values: dict) -> dict:
    return {**complete_config(hf_config(CASE).to_dict(), CASE.name), **values, "head_dim": 8}
