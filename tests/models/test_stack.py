"""Tests stacked layers against the same layers one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ftjax.models.nn.context import Context
from ftjax.models.nn.param import param, specs
from ftjax.models.nn.stack import Stack, segments


@pytest.mark.parametrize(
    ("kinds", "cut"),
    [
        ("aaaa", [(0, 1, 4)]),
        ("abababab", [(0, 2, 4)]),
        ("abcabcabca", [(0, 3, 3), (9, 1, 1)]),
        ("baaaaa", [(0, 1, 1), (1, 1, 5)]),
        ("aaaabbbb", [(0, 1, 4), (4, 1, 4)]),
        ("aaaaabaaaaabaa", [(0, 6, 2), (12, 1, 2)]),
        ("a", [(0, 1, 1)]),
    ],
)
def test_segments(kinds, cut):
    assert [tuple(segment) for segment in segments(tuple(kinds))] == cut


class Block(nnx.Module):
    """Computes `x -> tanh(x * weight + kind)`, and a statistic."""

    def __init__(self, trainable: bool, extra: bool):
        self.weight = param((3,), (None,), "weight", trainable=trainable)
        self.shift = param((3,), (None,), "shift") if extra else None

    def __call__(self, x, ctx, kind, layer, cache):
        shift = 0 if self.shift is None else self.shift[...]
        return jnp.tanh(x * self.weight[...] + kind + shift), cache, {"sum": jnp.sum(x) + jnp.asarray(layer, x.dtype)}


def by_hand(x, weights, shifts, kinds):
    total = 0.0
    for layer, kind in enumerate(kinds):
        total += jnp.sum(x) + layer
        x = jnp.tanh(x * weights[layer] + kind + shifts.get(layer, 0))
    return x, total


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    ("kinds", "choice"),
    [
        ((1, 2, 1, 2, 1), None),
        ((1, 1, 1, 1), None),
        ((1, 1, 2, 1, 1), ("dense", "sparse", "sparse", "dense", "sparse")),
        ((1, 2, 1, 2, 1, 2, 1), ("dense", "sparse", "sparse", "dense", "sparse", "sparse", "dense")),
        ((0,) * 5, ("dense", "sparse", "sparse", "sparse", "sparse")),
        ((0,) * 3, ("sparse",) * 3),
    ],
)
def test_stack_is_its_layers_one_by_one(kinds, choice, remat, trainable):
    rng = np.random.default_rng(0)
    blocks = {"dense": Block(trainable, False), "sparse": Block(trainable, True)}
    stack = Stack(blocks, kinds, choice) if choice else Stack(blocks["dense"], kinds)
    weights = rng.normal(size=(len(kinds), 3)).astype(np.float32)
    extra = [layer for layer, name in enumerate(choice or ()) if name == "sparse"]
    shifts = {layer: rng.normal(size=3).astype(np.float32) for layer in extra}
    root = nnx.Dict(layers=stack)
    for path, spec in specs(root).items():
        numbers = [int(piece.name.split(".")[1]) for piece in spec.pieces()]  # layers.{number}.weight
        table = weights if path.endswith("weight") else shifts
        node = root
        for part in path.split("."):
            node = node[part] if isinstance(node, nnx.Dict) else getattr(node, part)
        node.set_value(jnp.asarray(np.stack([table[number] for number in numbers])))
    graphdef, state = nnx.split(stack)
    ctx = Context(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32), remat=remat)

    def run(state, x):
        x, _, aux = nnx.merge(graphdef, state)(x, ctx)
        return jnp.sum(x**2) + aux["sum"], (x, aux["sum"])

    def loop(weights, x):
        x, total = by_hand(x, weights, shifts, kinds)
        return jnp.sum(x**2) + total

    x = jnp.asarray(rng.normal(size=3), jnp.float32)
    (_, (y, total)), gradient = jax.jit(jax.value_and_grad(run, argnums=1, has_aux=True))(state, x)
    want, want_total = by_hand(x, weights, shifts, kinds)
    np.testing.assert_allclose(y, want, rtol=1e-5)
    np.testing.assert_allclose(total, want_total, rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(loop, argnums=1)(weights, x), rtol=1e-4)
