"""A few tokens of a batch at a time, where the activations of all of them would take too much memory.

Legend: B batch, T length, C tokens of a chunk, E embed.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.mesh import constrain, fitting, parts, sharding
from ftjax.models.context import Context
from ftjax.models.gathered import fully_sharded, gathered
from ftjax.models.param import Row

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

    That is where layers are recomputed (`remat: full`) and their weights are cut over the devices: the hidden activations
    of the feed-forward layer, wider than any others, are then most of what a layer needs. Weights are gathered once for all
    chunks, and nothing is computed more often than by a layer that is recomputed as a whole.
    """
    count = _count(layer, x, ctx)
    if count == 1:
        return layer.all_at_once(x, ctx)
    structure, state = nnx.split(layer)
    variables, tree = jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, nnx.Variable))

    def run(weights: list[nnx.Variable], x: jax.Array) -> jax.Array:
        """All chunks, with gathered weights."""
        whole = jax.tree.unflatten(tree, weights)

        def chunk(number, x):
            dropout = None if ctx.dropout is None else jax.random.fold_in(ctx.dropout, number)
            return nnx.merge(structure, whole).all_at_once(x, replace(ctx, dropout=dropout, whole_weights=True))

        def body(_, scanned):
            return None, constrain(jax.checkpoint(chunk, prevent_cse=False)(*scanned), "batch", "length", None)

        _, y = jax.lax.scan(body, None, (jnp.arange(count), chunks(x, -(-x.shape[1] // count))))
        return joined(y, x.shape[1])

    if _trains_own_weights(layer):
        y = _each_device(run, variables, x)
    else:
        y = run([_whole(variable, x.dtype) for variable in variables], x)
    return constrain(y, "batch", "length", None)


def _each_device(run: Callable, variables: list[nnx.Variable], x: jax.Array) -> jax.Array:
    """`run` by each device for its own rows, so that a trained weight's gradient is summed over the chunks there first and
    reduced over the devices once; left to the partitioner it is reduced for each chunk."""
    mesh = jax.sharding.get_abstract_mesh()
    values = [variable.get_value() for variable in variables]
    names = [variable.row.axes[-value.ndim :] for variable, value in zip(variables, values, strict=True)]
    places = [sharding(mesh, "", value.shape, axes).spec for value, axes in zip(values, names, strict=True)]
    rows = sharding(mesh, "", x.shape, ("batch", "length", None)).spec

    def local(values: list[jax.Array], x: jax.Array) -> jax.Array:
        weights = []
        for variable, value, place in zip(variables, values, places, strict=True):
            value = value.astype(x.dtype) if value.ndim > 1 else value
            for dimension, over in enumerate(place):
                value = jax.lax.all_gather(value, over, axis=dimension, tiled=True) if over else value
            weights.append(variable.replace(value))
        return run(weights, x)

    return jax.shard_map(local, mesh=mesh, in_specs=(places, rows), out_specs=rows, check_vma=False)(values, x)


def _count(layer: nnx.Module, x: jax.Array, ctx: Context) -> int:
    """Into how many chunks a batch `[B, T, E]` goes."""
    if ctx.remat not in ("full", "offload") or not fully_sharded():
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    rows = _rows(layer)
    if any(row.name not in PLAIN or row.quantization for row in rows):
        return 1
    alone = mesh.size == parts(mesh.shape, "batch") and x.shape[0] % mesh.size == 0  # a device has rows for itself
    # Beside an adapter they go at once: its dropout differs from row to row, and each device would draw the same.
    if _trains_own_weights(layer) and (not alone or any(row.adapter for row in rows)):
        return 1
    tokens = x.shape[0] * x.shape[1] // parts(mesh.shape, "batch", "length")
    count = max(1, tokens // CHUNK)
    return count if x.shape[1] % (count * _parts(x.shape[1])) == 0 else 1


def _rows(layer: nnx.Module) -> list[Row]:
    """What is known of each of its parameters."""
    return [variable.row for _, variable in nnx.iter_graph(layer) if isinstance(variable, nnx.Param)]


def _trains_own_weights(layer: nnx.Module) -> bool:
    """Whether weights of the model itself are trained here, not adapters alone."""
    return any(row.trainable and not row.adapter for row in _rows(layer))


def _whole(variable: nnx.Variable, dtype) -> nnx.Variable:
    """A weight gathered from all devices, for matrix products in `dtype`; vectors as they are."""
    value = variable.get_value()
    if not isinstance(variable, nnx.Param) or value.ndim < 2:
        return variable
    return variable.replace(gathered(value.astype(dtype), variable.row.axes[-value.ndim :]))
