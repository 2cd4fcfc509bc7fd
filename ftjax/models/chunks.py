"""A few tokens of a batch at a time, where the activations of all of them would take too much memory.

Legend: B batch, T length, C tokens of a chunk, E embed.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.mesh import constrain, fitting, parts
from ftjax.models.context import Context
from ftjax.models.gathered import fully_sharded, gathered

CHUNK = 2048  # tokens of one device that a feed-forward layer takes at a time
PLAIN = {"weight", "bias", "lora_A.weight", "lora_B.weight"}  # parameters whose work is for each token alone


def chunks(x: jax.Array, length: int) -> jax.Array:
    """`[B, T, ...] -> [T / C, B, C, ...]`, padded with zeros at the end, of each device's part of T.

    Args:
        length: C on one device, where T lies on several.
    """
    b, t, *rest = x.shape
    devices = _parts(t)
    each = -(-length // devices)
    x = x.reshape(b, devices, t // devices, *rest)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % each)) + ((0, 0),) * len(rest))
    x = x.reshape(b, devices, -1, each, *rest)
    return jnp.moveaxis(x, 2, 0).reshape(-1, b, devices * each, *rest)


def joined(found: jax.Array, t: int) -> jax.Array:
    """The inverse of `chunks`."""
    n, b, c, *rest = found.shape
    devices = _parts(t)
    x = jnp.moveaxis(found.reshape(n, b, devices, c // devices, *rest), 0, 2)
    return x.reshape(b, devices, -1, *rest)[:, :, : t // devices].reshape(b, t, *rest)


def _parts(length: int) -> int:
    """Over how many devices the tokens of a row lie: a chunk takes some tokens of each, so that none has to move."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in fitting(mesh, "length", length) or ())


def feed_forward(layer: nnx.Module, x: jax.Array, ctx: Context) -> jax.Array:
    """`layer.all_at_once(x [B, T, E], ctx)`; a few tokens at a time where memory is short.

    That is where layers are recomputed (`remat: full`) and their frozen weights are cut over the devices: the hidden
    activations of the feed-forward layer, wider than any others, are then most of what a layer needs. Weights are gathered
    once for all chunks, and nothing is computed more often than by a layer that is recomputed as a whole.
    """
    count = _count(layer, x, ctx)
    if count == 1:
        return layer.all_at_once(x, ctx)
    structure, state = nnx.split(layer)
    state = jax.tree.map(lambda leaf: _whole(leaf, x.dtype), state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    ctx = replace(ctx, whole_weights=True)

    def chunk(number, x):
        dropout = None if ctx.dropout is None else jax.random.fold_in(ctx.dropout, number)
        return nnx.merge(structure, state).all_at_once(x, replace(ctx, dropout=dropout))

    def body(_, scanned):
        return None, constrain(jax.checkpoint(chunk, prevent_cse=False)(*scanned), "batch", "length", None)

    _, y = jax.lax.scan(body, None, (jnp.arange(count), chunks(x, -(-x.shape[1] // count))))
    return constrain(joined(y, x.shape[1]), "batch", "length", None)


def _count(layer: nnx.Module, x: jax.Array, ctx: Context) -> int:
    """Into how many chunks a batch `[B, T, E]` goes."""
    if ctx.remat not in ("full", "offload") or not fully_sharded():
        return 1
    rows = [variable.row for _, variable in nnx.iter_graph(layer) if isinstance(variable, nnx.Param)]
    # The gradient of a trained weight would be reduced over the devices once for each chunk; an adapter's is small.
    if any(row.name not in PLAIN or row.quantization or (row.trainable and not row.adapter) for row in rows):
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    tokens = x.shape[0] * x.shape[1] // parts(mesh.shape, "batch", "length")
    count = max(1, tokens // CHUNK)
    return count if x.shape[1] % (count * _parts(x.shape[1])) == 0 else 1


def _whole(variable: nnx.Variable, dtype) -> nnx.Variable:
    """A weight gathered from all devices, for matrix products in `dtype`; vectors as they are."""
    value = variable.get_value()
    if not isinstance(variable, nnx.Param) or value.ndim < 2:
        return variable
    return variable.replace(gathered(value.astype(dtype), variable.row.axes[-value.ndim :]))
