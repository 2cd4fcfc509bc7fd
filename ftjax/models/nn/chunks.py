"""Compute layers in chunks of tokens or hidden units to reduce activation memory.

Legend: B batch, T length, C tokens of a chunk, E embed.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from ftjax.mesh import constrain, fitting, parts, sharding
from ftjax.models.nn.context import Context
from ftjax.models.nn.gathered import gathered, in_order, joined_parts
from ftjax.models.nn.remat import is_trained, memory_is_short

CHUNK = 2048  # tokens per device and chunk of a feed-forward layer
HIDDEN = 1024  # maximum hidden units per chunk of a feed-forward layer with trained weights
PLAIN = {"weight", "bias", "lora_A.weight", "lora_B.weight"}  # parameters that are applied to each token independently


def chunks(x: Shaped[Array, "B T *of"], length: int) -> Shaped[Array, "chunks B C *of"]:
    """Split rows into T / C chunks; each device's part of T is padded with zeros at its end.

    Args:
        length: C, the tokens of a chunk on all devices that T is sharded over.
    """
    b, t, *rest = x.shape
    devices = _parts(t)
    each = -(-length // devices)
    x = x.reshape(b, devices, t // devices, *rest)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % each)) + ((0, 0),) * len(rest))
    x = x.reshape(b, devices, -1, each, *rest)
    return jnp.moveaxis(x, 2, 0).reshape(-1, b, devices * each, *rest)


def joined(found: Shaped[Array, "chunks B C *of"], t: int) -> Shaped[Array, "B {t} *of"]:
    """Invert `chunks`."""
    n, b, c, *rest = found.shape
    devices = _parts(t)
    x = jnp.moveaxis(found.reshape(n, b, devices, c // devices, *rest), 0, 2)
    return x.reshape(b, devices, -1, *rest)[:, :, : t // devices].reshape(b, t, *rest)


def _parts(length: int) -> int:
    """Return the number of devices that a row is sharded over; a chunk takes tokens of each, so that no tokens move."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in fitting(mesh, "length", length) or ())


def feed_forward(layer: nnx.Module, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
    """Return `layer.all_at_once(x, ctx)`, computed in chunks if memory is short.

    That is the case if layers are recomputed (`remat: full`) and their weights are sharded: the hidden activations of the
    feed-forward layer, the widest of all, then dominate the memory of a layer. Nothing is gathered or computed more often than
    if the layer is recomputed as a whole. The layer must consist of matrix products with a hidden dimension between them.
    """
    if not memory_is_short(ctx):
        return layer.all_at_once(x, ctx)
    rows = [variable.row for _, variable in nnx.iter_graph(layer) if isinstance(variable, nnx.Param)]
    if any(row.name not in PLAIN or row.quantization for row in rows):
        return layer.all_at_once(x, ctx)
    run = _by_hidden if is_trained(layer) else _by_tokens
    return constrain(run(layer, x, ctx), "batch", "length", None)


def _by_tokens(layer: nnx.Module, x: jax.Array, ctx: Context) -> jax.Array:
    """Compute the layer in chunks of tokens, with frozen weights that are gathered once for all chunks."""
    mesh = jax.sharding.get_abstract_mesh()
    count = x.shape[0] * x.shape[1] // parts(mesh.shape, "batch", "length") // CHUNK
    if count <= 1 or x.shape[1] % (count * _parts(x.shape[1])):
        return layer.all_at_once(x, ctx)
    structure, state = nnx.split(layer)
    whole = jax.tree.map(lambda variable: _whole(variable, x.dtype), state, is_leaf=_is_variable)

    def chunk(number, x):
        dropout = None if ctx.dropout is None else jax.random.fold_in(ctx.dropout, number)
        return nnx.merge(structure, whole).all_at_once(x, replace(ctx, dropout=dropout, whole_weights=True))

    def body(_, scanned):
        return None, constrain(jax.checkpoint(chunk, prevent_cse=False)(*scanned), "batch", "length", None)

    _, y = jax.lax.scan(body, None, (jnp.arange(count), chunks(x, -(-x.shape[1] // count))))
    return joined(y, x.shape[1])


def _by_hidden(layer: nnx.Module, x: jax.Array, ctx: Context) -> jax.Array:
    """Compute the layer in chunks of its hidden dimension, with each device processing its own rows.

    The weights of a chunk are gathered for it, and their gradient is complete after it and is reduced before the next chunk;
    with chunks of tokens, gradients of the whole weights would stay in memory until the last chunk. This uses `shard_map`
    because the partitioner may turn such products into loops that pass partial results around. Partial results are summed in
    the dtype of x, as in tensor parallelism.
    """
    structure, state = nnx.split(layer)
    variables, tree = jax.tree.flatten(state, is_leaf=_is_variable)
    values = [variable.get_value() for variable in variables]
    names = [variable.row.axes[-value.ndim :] for variable, value in zip(variables, values, strict=True)]
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.size == parts(mesh.shape, "batch") and x.shape[0] % mesh.size == 0  # rows are sharded over all devices
    # An output bias would be added once per chunk, and an adapter's rank dimension cannot be chunked.
    if not alone or not all("mlp" in axes for axes in names):
        return layer.all_at_once(x, ctx)
    hidden = values[0].shape[names[0].index("mlp")]
    least = -(-hidden // HIDDEN)
    count = next((count for count in range(least, 2 * least + 1) if hidden % count == 0), 1)
    if count == 1:
        return layer.all_at_once(x, ctx)
    places = [sharding(mesh, "", value.shape, axes).spec for value, axes in zip(values, names, strict=True)]
    rows = sharding(mesh, "", x.shape, ("batch", "length", None)).spec
    ctx = replace(ctx, whole_weights=True)

    def local(values: list[jax.Array], x: jax.Array) -> jax.Array:
        values, x = jax.tree.map(in_order, (values, x))

        def part(x, pieces):
            held = [variable.replace(whole(*each)) for variable, *each in zip(variables, pieces, names, places, strict=True)]
            return nnx.merge(structure, jax.tree.unflatten(tree, held)).all_at_once(x, ctx)

        def whole(piece, axes, place):
            """Return the gathered weight, with its dimensions in their original order."""
            at = axes.index("mlp")
            for dimension, over in enumerate((place[at], *place[:at], *place[at + 1 :])):
                piece = joined_parts(piece, over, dimension) if over else piece
            return jnp.moveaxis(piece, 0, at)

        def body(y, pieces):
            return y + jax.checkpoint(part, prevent_cse=False)(x, pieces), None

        # Put hidden units first, so that a gradient is hidden units by outputs: otherwise XLA would hold the gradient of the
        # layer's outputs in a second layout.
        moved = [jnp.moveaxis(value, axes.index("mlp"), 0) for value, axes in zip(values, names, strict=True)]
        moved = [value.astype(x.dtype) if value.ndim > 1 else value for value in moved]
        pieces = [value.reshape(count, -1, *value.shape[1:]) for value in moved]
        return in_order(jax.lax.scan(body, jnp.zeros_like(x), pieces)[0])

    return jax.shard_map(local, mesh=mesh, in_specs=(places, rows), out_specs=rows, check_vma=False)(values, x)


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _whole(variable: nnx.Variable, dtype) -> nnx.Variable:
    """Gather a weight from all devices, in `dtype`; vectors are returned unchanged.

    Trained weights (of an adapter) are gathered in float32, because their gradient is summed over chunks.
    """
    value = variable.get_value()
    if not isinstance(variable, nnx.Param) or value.ndim < 2:
        return variable
    dtype = jnp.float32 if variable.row.trainable else dtype
    return variable.replace(gathered(value.astype(dtype), variable.row.axes[-value.ndim :]))
