"""Tests what layers remember: models in which each layer remembers something else decode as they read whole texts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybrid import HYBRID, SHARING, make
from oracle import assert_cached_is_uncached, context, paged, tokens

from ftjax.config import Config, PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from ftjax.errors import UserError
from ftjax.methods import method_of
from ftjax.models.nn.cache import Cache, Layout
from ftjax.models.nn.memory import ConvState, KeysValues, RecurrentState, Shared
from ftjax.train.setup import refuse_packing


def test_one_array_for_each_record_and_a_place_for_each_layer():
    model, _ = make(HYBRID)
    cache = jax.eval_shape(lambda: Cache.empty(Layout(model.memories), 3, 16, jnp.bfloat16))
    arrays = zip(cache.layout.keys_values, cache.keys, cache.values, strict=True)
    shapes = {record: (k.shape, v.shape) for record, k, v in arrays}
    assert shapes == {
        KeysValues(2, 8, 8): ((3, 3, 16, 2, 8), (3, 3, 16, 2, 8)),
        KeysValues(1, 12, 6, "wide"): ((2, 3, 16, 1, 12), (2, 3, 16, 1, 6)),
    }
    states = {record: (a.shape, a.dtype) for record, a in zip(cache.layout.states, cache.states, strict=True)}
    assert states == {
        ConvState(24, 1, "inputs"): ((2, 3, 1, 24), jnp.bfloat16),
        RecurrentState((4, 8, 8)): ((2, 3, 4, 8, 8), jnp.float32),
        ConvState(24, 3): ((2, 3, 3, 24), jnp.bfloat16),
    }
    wide = KeysValues(1, 12, 6, "wide")
    assert [cache.layout.place(wide, layer) for layer in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 1]
    assert [int(cache.layout.place(wide, jnp.int32(layer))) for layer in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 1]


def test_layers_of_one_kind_are_found_without_a_table():
    one = (KeysValues(2, 8, 8),)
    layer = jnp.int32(3)
    assert Layout((one,) * 5).place(one[0], layer) is layer


def test_keys_that_nobody_wrote_are_not_shared():
    with pytest.raises(AssertionError, match="layer 0 shares"):
        Layout(((Shared("x"),), (KeysValues(1, 2, 2, "x"),))).groups  # noqa: B018


def test_records_that_would_be_mistaken_for_one_another_are_refused():
    with pytest.raises(AssertionError, match="two of one record"):
        Layout(((ConvState(4, 3), ConvState(4, 3)),)).groups  # noqa: B018
    assert len(Layout(((ConvState(4, 3, "k"), ConvState(4, 3, "v")),)).states) == 2
    with pytest.raises(AssertionError, match="one size"):
        Layout(((KeysValues(1, 2, 2),), (KeysValues(1, 4, 4),), (Shared(),))).named("")


@pytest.mark.parametrize("choice", [HYBRID, SHARING], ids=["hybrid", "sharing"])
def test_cached_is_uncached(choice):
    """Several tokens at once and one by one, with padding after some, each row at its own pace."""
    model, params = make(choice)
    portions = ((9, 2), (1, 1), (0, 1), (1, 0), (2, 9), (9, 9), (1, 1), (3, 4))
    assert_cached_is_uncached(model, params, tokens(2, 27), portions, 48)


def test_layers_that_share_train_as_they_are():
    """Values passed between layers survive recomputation, with the same gradients."""
    model, params = make(SHARING, trainable=True)
    ids = tokens(2, 12)
    weights = np.random.default_rng(1).normal(size=(2, 12, 96)).astype(np.float32)

    def loss(params, remat):
        ctx = context(ids, remat=remat)
        module = model.bind(params)
        hidden, cache, _ = module.hidden(jnp.asarray(ids), ctx)
        assert cache is None
        return jnp.sum(module.unembed(hidden, ctx) * weights)

    want, *recomputed = (jax.jit(jax.grad(loss), static_argnums=1)(params, kind) for kind in ("none", "full", "dots"))
    keys = next(path for path in params if path.endswith("wide_block.mix.k.weight"))
    assert np.abs(want[keys]).min(axis=(1, 2)).max() > 0
    for got in recomputed:
        for path in want:
            np.testing.assert_allclose(got[path], want[path], atol=1e-4 * np.abs(want[path]).max(), rtol=0, err_msg=path)


def test_a_row_that_starts_anew_begins_with_nothing():
    """A row that is reused keeps no state of its predecessor, finite or not; pages that are cleared hold zeros."""
    cache = paged(make(HYBRID)[0], 3, 8)
    cache = jax.tree.map(lambda x: np.asarray(x) if x.dtype == np.int32 else np.full(x.shape, np.nan, x.dtype), cache)

    @jax.jit
    def reused(cache):
        rows = jnp.array([2, 9])
        part = cache.of(rows, jnp.zeros(2, jnp.int32), cache.table[:2])
        return part, cache.join(rows, part).cleared(cache.table[2:])

    part, back = jax.device_get(reused(cache))
    assert all(not state.any() for state in part.states)
    assert all(np.isfinite(state[:, 2]).all() and np.isnan(state[:, :2]).all() for state in back.states)
    for leaf in (*back.keys, *back.values):
        clean = np.isfinite(leaf).all(axis=(1, 3, 4, 5))[0]
        assert np.flatnonzero(clean).tolist() == sorted(np.asarray(cache.table[2]).tolist())
    assert back.layout == cache.layout


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig, PTuningConfig])
def test_virtual_tokens_are_refused_where_layers_differ(kind):
    (model, params), method = make(HYBRID), kind(num_virtual_tokens=2)
    with pytest.raises(UserError, match="one size in every layer"):
        method_of(method).attach(model.bind(params), method)


def test_a_layer_that_goes_on_over_documents_does_not_pack():
    model, _ = make(HYBRID)
    values = {"model": {"path": "m"}, "method": {"name": "full"}}
    packed, alone = (
        Config.model_validate({**values, "data": {"train": "t.jsonl", "packing": packing}}) for packing in (True, False)
    )
    refuse_packing(packed, model)
    other = replace(model, memories=(*model.memories, (RecurrentState((2,), restarts=False),)))
    refuse_packing(alone, other)
    with pytest.raises(UserError, match="packing: false"):
        refuse_packing(packed, other)
