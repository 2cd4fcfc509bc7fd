"""A few tokens, or a few hidden units, at a time, where the activations of all of them would take too much memory.

Legend: B batch, T length, C tokens of a chunk, E embed.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.mesh import constrain, fitting, parts, sharding
from ftjax.models.context import Context
from ftjax.models.gathered import gathered, in_order, joined_parts
from ftjax.models.kept import is_trained, memory_is_short

CHUNK = 2048  # tokens of one device that a feed-forward layer takes at a time
HIDDEN = 1024  # hidden units of it at a time, where its weights are trained
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
    """`layer.all_at_once(x [B, T, E], ctx)`; in parts where memory is short.

    That is where layers are recomputed (`remat: full`) and their weights are cut over the devices: the hidden activations
    of the feed-forward layer, wider than any others, are then most of what a layer needs. Nothing is gathered or computed
    more often than by a layer that is recomputed as a whole. The layer is three products with a hidden dimension between them.
    """
    if not memory_is_short(ctx):
        return layer.all_at_once(x, ctx)
    rows = [variable.row for _, variable in nnx.iter_graph(layer) if isinstance(variable, nnx.Param)]
    if any(row.name not in PLAIN or row.quantization for row in rows):
        return layer.all_at_once(x, ctx)
    run = _by_hidden if is_trained(layer) else _by_tokens
    return constrain(run(layer, x, ctx), "batch", "length", None)


def _by_tokens(layer: nnx.Module, x: jax.Array, ctx: Context) -> jax.Array:
    """A few tokens at a time, with frozen weights that are gathered once for all of them."""
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
    """A part of the hidden dimension at a time, by each device for its own rows.

    A part's weights are gathered for it, and their gradient is complete with it and goes back to the devices before the next
    is made; of weights that all chunks of tokens share, whole gradients would be alive until the last chunk. It is written as
    `shard_map` because the partitioner may turn such products into loops that pass parts of the result around. The parts are
    summed in the dtype of x, like those of tensor parallelism.
    """
    structure, state = nnx.split(layer)
    variables, tree = jax.tree.flatten(state, is_leaf=_is_variable)
    values = [variable.get_value() for variable in variables]
    names = [variable.row.axes[-value.ndim :] for variable, value in zip(variables, values, strict=True)]
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.size == parts(mesh.shape, "batch") and x.shape[0] % mesh.size == 0  # a device has rows for itself
    # A bias of the outputs would be added with each part; an adapter's narrow side does not go in parts.
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
            """Gathered, with its dimensions in their order again."""
            at = axes.index("mlp")
            for dimension, over in enumerate((place[at], *place[:at], *place[at + 1 :])):
                piece = joined_parts(piece, over, dimension) if over else piece
            return jnp.moveaxis(piece, 0, at)

        def body(y, pieces):
            return y + jax.checkpoint(part, prevent_cse=False)(x, pieces), None

        # Hidden units first, so that a gradient is hidden units by outputs: the other way round XLA would hold the gradient
        # of the layer's outputs in a second layout.
        turned = [jnp.moveaxis(value, axes.index("mlp"), 0) for value, axes in zip(values, names, strict=True)]
        turned = [value.astype(x.dtype) if value.ndim > 1 else value for value in turned]
        pieces = [value.reshape(count, -1, *value.shape[1:]) for value in turned]
        return in_order(jax.lax.scan(body, jnp.zeros_like(x), pieces)[0])

    return jax.shard_map(local, mesh=mesh, in_specs=(places, rows), out_specs=rows, check_vma=False)(values, x)


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _whole(variable: nnx.Variable, dtype) -> nnx.Variable:
    """A weight gathered from all devices, for matrix products in `dtype`; vectors as they are.

    A trained one (an adapter's) in float32: its gradient is a sum over chunks.
    """
    value = variable.get_value()
    if not isinstance(variable, nnx.Param) or value.ndim < 2:
        return variable
    dtype = jnp.float32 if variable.row.trainable else dtype
    return variable.replace(gathered(value.astype(dtype), variable.row.axes[-value.ndim :]))
