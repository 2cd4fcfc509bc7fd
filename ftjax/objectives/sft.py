"""Supervised fine-tuning: next-token cross-entropy on the tokens that carry weight.

One row of a batch, for the text "Hi there" (ids 12, 57) in a row of 4 after BOS (1), trained on "there" and EOS (2):

    tokens       1  12  57   2        targets     12  57   2   0
    weights      0   1   1   0        (weights[t] says whether targets[t], the token after tokens[t], is trained)
    positions    0   1   2   3        segment_ids  1   1   1   1
"""

import math
from collections.abc import Mapping

import jax

from ftjax.mesh import CUT, RULES, constrain, spec
from ftjax.models.context import Context
from ftjax.models.gathered import fully_sharded, gathered, in_order
from ftjax.models.model import Model
from ftjax.objectives.loss import Arrange, Measure, Sums, as_it_is, chunked_cross_entropy, cross_entropy, trained_first


def sums(
    model: Model,
    trainable: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    ctx: Context,
    loss_chunk: int,
    measure: Measure = cross_entropy,
) -> tuple[Sums, jax.Array]:
    """`(Sums, auxiliary loss)` of a batch `[B, T]`.

    Args:
        loss_chunk: tokens of the batch whose logits exist at one time.
        measure: of logits and the batch's targets.
    """
    module = model.bind({**frozen, **trainable})
    hidden, _, aux = module.hidden(batch["tokens"], ctx)
    output, arrange = output_projection(model, {**frozen, **trainable})
    inside = {path: leaf for path, leaf in output.items() if path in trainable}
    outside = {path: jax.lax.stop_gradient(leaf) for path, leaf in trainable.items() if path not in inside}

    def unembed(inside, h):
        return model.bind({**frozen, **outside, **output, **inside}).unembed(h, ctx)

    targets, weights = batch["targets"], batch["weights"]
    alone = jax.sharding.get_abstract_mesh().size <= 1
    if alone:
        hidden, targets, weights = trained_first(hidden, targets, weights)
    b, t = weights.shape
    length = min(t, max(1, loss_chunk // b))
    return chunked_cross_entropy(unembed, length, inside, hidden, targets, weights, arrange, alone, measure), aux


def output_projection(model: Model, params: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], Arrange]:
    """The parameters of the projection to the vocabulary, laid out for the loss, and how its chunks are.

    Every chunk of the loss needs the whole projection. Where parameters are cut along `fsdp` or `expert`, it is cut by words
    instead, once for all chunks, and each chunk's hidden states, which are much smaller, go to every device of these axes;
    every device computes the logits of its words. Where the words do not divide, the projection is gathered, once.
    """
    specs = {path: spec for path, spec in model.specs.items() if path.startswith(f"{model.output}.")}
    own = {path: params[path] for path in specs}
    if not fully_sharded():
        return own, as_it_is
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[name] for name in RULES["loss_vocab"])
    words = {size for spec in specs.values() for size, axis in zip(spec.shape, spec.row.axes, strict=True) if axis == "vocab"}
    divides = bool(words) and all(size % parts == 0 for size in words)

    def lay_out(path: str) -> jax.Array:
        if divides and specs[path].row.axes == ("vocab", "embed"):
            return _by_words(own[path])
        axes = [("loss_vocab" if axis == "vocab" and divides else axis) for axis in specs[path].row.axes]
        return constrain(own[path], *(None if axis == "embed" else axis for axis in axes))

    def arrange(hidden, targets, weights):
        rows = "batch", "length"
        return gathered(hidden, (*rows, None)), *(constrain(x, *rows, without=CUT) for x in (targets, weights))

    return {path: lay_out(path) for path in own}, arrange if divides else as_it_is


def _by_words(weight: jax.Array) -> jax.Array:
    """`[V, E]`, cut by E along `fsdp` and `expert`, is then cut by V; its gradient goes the same way back."""

    def local(weight: jax.Array) -> jax.Array:
        return in_order(jax.lax.all_to_all(in_order(weight), CUT, 0, 1, tiled=True))

    before, after = spec(("vocab", "embed")), spec(("loss_vocab", None))
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(local, mesh=mesh, in_specs=before, out_specs=after, check_vma=False)(weight)
