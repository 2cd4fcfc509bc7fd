"""Layers stacked on axis 0 and run by one scan, so that compile time does not grow with depth."""

import dataclasses
from collections.abc import Hashable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models.context import Context, KVCache
from ftjax.models.param import variables

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def period(kinds: tuple[Hashable, ...]) -> int:
    """The shortest pattern that repeats over the layers (its last repetition may be cut short)."""
    return next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))


class Stack(nnx.Module):
    """`len(kinds)` copies of a block, whose parameters get a leading `layers` axis.

    A kind is whatever static facts tell layers apart (a window, a RoPE base); the block is called as
    `block(x, ctx, kind, layer, cache) -> (x, cache, aux)`, where aux is a scalar such as a router's loss, summed over layers.
    Layers whose kinds repeat with a period P are scanned P at a time; what is left over is run after the scan.
    """

    def __init__(self, block: nnx.Module, kinds: tuple[Hashable, ...]):
        self.kinds = tuple(kinds)
        for _, variable in variables(block):
            value, row = variable.get_value(), variable.row
            variable.set_value(jax.ShapeDtypeStruct((len(kinds), *value.shape), value.dtype))
            variable.set_metadata("row", dataclasses.replace(row, axes=("layers", *row.axes)))
        self.block = block

    def __call__(self, x: jax.Array, ctx: Context, cache: KVCache | None = None) -> tuple[jax.Array, KVCache | None, jax.Array]:
        graphdef, state = nnx.split(self.block)
        total, width = len(self.kinds), period(self.kinds)
        whole = total // width * width
        keys = None if ctx.dropout is None else jax.random.split(ctx.dropout, total)

        def one(x, cache, aux, layer_state, key, layer, kind):
            def run(x, layer_state, key):
                block = nnx.merge(graphdef, layer_state)
                return block(x, replace(ctx, dropout=key), kind, layer, cache)

            if ctx.remat != "none" and cache is None:
                # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier that
                # prevent_cse adds is only needed for the layers that run outside of it.
                run = jax.checkpoint(run, policy=REMAT_POLICIES[ctx.remat], prevent_cse=isinstance(layer, int))
            x, cache, more = run(x, layer_state, key)
            return x, cache, aux + more

        def body(carry, scanned):
            states, key, first = scanned
            for i in range(width):
                pick = jax.tree.map(lambda leaf, i=i: leaf[i], (states, key))
                carry = one(*carry, *pick, first + i, self.kinds[i])
            return carry, None

        grouped = jax.tree.map(lambda leaf: leaf[:whole].reshape(whole // width, width, *leaf.shape[1:]), (state, keys))
        carry = (x, cache, jnp.float32(0))
        carry, _ = jax.lax.scan(body, carry, (*grouped, jnp.arange(0, whole, width)))
        for layer in range(whole, total):
            carry = one(*carry, *jax.tree.map(lambda leaf, i=layer: leaf[i], (state, keys)), layer, self.kinds[layer % width])
        return carry
