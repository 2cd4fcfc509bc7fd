"""The projection of hidden states to the vocabulary, prepared for losses that apply it to a chunk of tokens at a time."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from ftjax.mesh import RULES, WEIGHT_AXES, constrain, spec
from ftjax.models.model import Model
from ftjax.models.nn.context import Context
from ftjax.models.nn.gathered import fully_sharded, gathered, in_order
from ftjax.objectives.loss import Arrange, Unembed, keep_sharding


class Projection(NamedTuple):
    """Inputs of `token_totals` and `token_logprobs`.

    Attributes:
        unembed: `(trained, hidden [B, C, E])` -> float32 logits `[B, C, V]`; closes over frozen parameters.
        trained: its trained parameters by path; empty if it is frozen.
        arrange: shards a chunk as the projection needs it.
    """

    unembed: Unembed
    trained: dict[str, jax.Array]
    arrange: Arrange


def projection(model: Model, trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], ctx: Context) -> Projection:
    """Prepare the projection of a model with these parameters, once for all chunks of a batch."""
    output, arrange = _sharded_output(model, {**frozen, **trainable})
    inside = {path: leaf for path, leaf in output.items() if path in trainable}
    outside = {path: jax.lax.stop_gradient(leaf) for path, leaf in trainable.items() if path not in inside}

    def unembed(inside, hidden):
        return model.bind({**frozen, **outside, **output, **inside}).unembed(hidden, ctx)

    return Projection(unembed, inside, arrange)


def beside(output: Projection) -> Projection:
    """Return a projection of `(hidden, values)` to `(logits, values)`, with differentiated values `[B, C]` for a loss."""

    def unembed(trained, given):
        hidden, values = given
        return output.unembed(trained, hidden), values

    def arrange(given, targets, weights):
        hidden, values = given
        hidden, (values, targets), weights = output.arrange(hidden, (values, targets), weights)
        return (hidden, values), targets, weights

    return Projection(unembed, output.trained, arrange)


def one_device() -> bool:
    """Return whether a batch is on one device, so that its tokens may be reordered and chunks skipped."""
    return jax.sharding.get_abstract_mesh().size <= 1


def _sharded_output(model: Model, params: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], Arrange]:
    """Shard the parameters of the projection along the vocabulary; return them and the sharding of its chunks.

    Every chunk needs the whole projection. If parameters are sharded along `fsdp` or `expert`, it is resharded along the
    vocabulary, once for all chunks, and each chunk's hidden states, which are much smaller, are gathered on every device of
    these axes; every device computes the logits of its part of the vocabulary. If the vocabulary does not divide, the
    projection is gathered, once.
    """
    specs = {path: spec for path, spec in model.specs.items() if path.startswith(f"{model.output}.")}
    own = {path: params[path] for path in specs}
    if not fully_sharded():
        return own, keep_sharding
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[name] for name in RULES["loss_vocab"])
    words = {size for spec in specs.values() for size, axis in zip(spec.shape, spec.row.axes, strict=True) if axis == "vocab"}
    divides = bool(words) and all(size % parts == 0 for size in words)

    def lay_out(path: str) -> jax.Array:
        if divides and specs[path].row.axes == ("vocab", "embed"):
            return _from_embed_to_vocab(own[path])
        axes = [("loss_vocab" if axis == "vocab" and divides else axis) for axis in specs[path].row.axes]
        return constrain(own[path], *(None if axis == "embed" else axis for axis in axes))

    def arrange(hidden, targets, weights):
        def whole(x):
            return constrain(x, "batch", "length", *(None,) * (x.ndim - 2), without=WEIGHT_AXES)

        return gathered(hidden, ("batch", "length", None)), *jax.tree.map(whole, (targets, weights))

    return {path: lay_out(path) for path in own}, arrange if divides else keep_sharding


def _from_embed_to_vocab(weight: Float[Array, "V E"]) -> Float[Array, "V E"]:
    """Reshard from E to V along `fsdp` and `expert`; its gradient is resharded back."""

    def local(weight: jax.Array) -> jax.Array:
        return in_order(jax.lax.all_to_all(in_order(weight), WEIGHT_AXES, 0, 1, tiled=True))

    before, after = spec(("vocab", "embed")), spec(("loss_vocab", None))
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(local, mesh=mesh, in_specs=before, out_specs=after, check_vma=False)(weight)
