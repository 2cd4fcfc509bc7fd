"""Stack layers along axis 0 and run them with scans, so that compile time does not grow with depth."""

import dataclasses
import functools
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ftjax.models.nn.bfloat16 import at, rounded
from ftjax.models.nn.cache import Cache, Handed, Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.gathered import fully_sharded
from ftjax.models.nn.memory import Memory, declared
from ftjax.models.nn.param import variables
from ftjax.models.nn.remat import BLOCK_INPUT, REMAT_POLICIES


class Segment(NamedTuple):
    """Layers `start` to `start + width * repeats`, whose kinds repeat with period `width`."""

    start: int
    width: int
    repeats: int


def segments(kinds: tuple[Hashable, ...]) -> tuple[Segment, ...]:
    """Split the layers greedily into the longest segments with a repeating pattern.

    For example, 26 layers with a global one after every five local ones become 4 repetitions of six, then 2 of one.
    """
    found, start, total = [], 0, len(kinds)
    while start < total:
        best = Segment(start, 1, 1)
        for width in range(1, (total - start) // 2 + 1):
            end = start + width
            while end < total and kinds[end] == kinds[end - width]:
                end += 1
            repeats = (end - start) // width
            if repeats > 1 and width * repeats > best.width * best.repeats:
                best = Segment(start, width, repeats)
        found.append(best)
        start += best.width * best.repeats
    return tuple(found)


@jax.tree_util.register_pytree_node_class
class Separate(tuple):
    """A stacked array as one array per layer, for programs that call the layers one by one.

    On a CPU a scan copies each layer's weights out of their stack before it multiplies by them, which takes longer than the
    product itself where there are few tokens.
    """

    def tree_flatten(self):
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(leaves)


def is_separate(leaf) -> bool:
    return isinstance(leaf, Separate)


class Stack(nnx.Module):
    """A stack of `len(kinds)` layers, whose parameters have a leading `layers` axis.

    A kind holds the static properties that differ between layers (a window, a RoPE base). The block is called as
    `block(x, ctx, kind, layer, cache) -> (x, cache, aux)`, where aux is summed over the layers: a scalar or a pytree of arrays
    (a router's statistics) with the same structure in every layer.

    Layers with different parameters are stacked separately: `block` is then a dict of blocks, and `choice` has the name of each
    layer's block. Block `name` becomes the attribute `<name>_block`; a single block is `block`.
    """

    def __init__(
        self,
        block: nnx.Module | Mapping[str, nnx.Module],
        kinds: tuple[Hashable, ...],
        choice: tuple[str, ...] | None = None,
    ):
        self.kinds = tuple(kinds)
        blocks = {f"{name}_block": module for name, module in block.items()} if choice else {"block": block}
        self.choice = tuple(f"{name}_block" for name in choice) if choice else ("block",) * len(kinds)
        assert len(self.choice) == len(self.kinds), "one block for each layer"
        for name, module in blocks.items():
            count = self.choice.count(name)
            if not count:
                continue
            for _, variable in variables(module):
                value, row = variable.get_value(), variable.row
                variable.set_value(jax.ShapeDtypeStruct((count, *value.shape), value.dtype))
                variable.set_metadata("row", dataclasses.replace(row, axes=("layers", *row.axes)))
            setattr(self, name, module)

    def layers_of(self, name: str) -> tuple[int, ...]:
        """Return the layers of the model that are stacked in this block."""
        return tuple(layer for layer, chosen in enumerate(self.choice) if chosen == name)

    @property
    def memories(self) -> tuple[tuple[Memory, ...], ...]:
        """Memory records of each layer, for decoding."""
        blocks = {name: declared(getattr(self, name)) for name in set(self.choice)}
        return tuple(blocks[name] for name in self.choice)

    def part(self, groups: tuple[str, ...]) -> None:
        """Stack layers of different groups separately, in place; the model must be abstract.

        If only some layers are trained, these and the frozen ones are then in separate arrays, so that frozen layers have
        neither gradients nor moments, and those before the first trained layer have no backward pass.

        Args:
            groups: group name of each layer; block `<name>_block` becomes `<name>_<group>_block`.
        """
        choice = list(self.choice)
        for name in sorted(set(self.choice)):
            layers = self.layers_of(name)
            found = sorted({groups[layer] for layer in layers})
            if len(found) == 1:
                continue
            whole = getattr(self, name)
            delattr(self, name)
            for group in found:
                members = [layer for layer in layers if groups[layer] == group]
                block, own = nnx.clone(whole), f"{name.removesuffix('block')}{group}_block"
                for _, variable in variables(block):
                    value = variable.get_value()
                    variable.set_value(jax.ShapeDtypeStruct((len(members), *value.shape[1:]), value.dtype))
                setattr(self, own, block)
                for layer in members:
                    choice[layer] = own
        self.choice = tuple(choice)

    def __call__(self, x: jax.Array, ctx: Context, cache: Memories = None):
        """Run all layers and return `(x, cache, aux)`."""
        if any(map(is_separate, jax.tree.leaves(nnx.state(self), is_leaf=is_separate))):
            return self._one_by_one(x, ctx, cache)
        found = segments(tuple(zip(self.choice, self.kinds, strict=True)))
        # A scan over part of an array copies that part, and one over bfloat16 casts all of it on a CPU. So in these cases
        # frozen parameters are indexed instead of scanned over, which needs no copy; unless all activations are saved for the
        # backward pass, which would then save the indexed parameters too.
        decoding = cache is not None
        may_index = ctx.remat != "none" or decoding

        def scanned(_, variable: nnx.Variable) -> bool:
            value = variable.get_value()
            costly = len(found) > 1 or (isinstance(value, jax.Array) and rounded(value.dtype))
            return variable.row.trainable or not (costly and may_index)

        split = {name: nnx.split(getattr(self, name), scanned, ...) for name in sorted(set(self.choice))}
        if fully_sharded():
            split = {name: (structure, _cast(own, ctx.dtype), whole) for name, (structure, own, whole) in split.items()}
        keys = None if ctx.dropout is None else jax.random.split(ctx.dropout, len(self.kinds))
        carry = (x, cache if decoding else Handed.start(self.memories, *ctx.segment_ids.shape, ctx.dtype))
        auxes = []
        for segment in found:
            carry, aux = self._run(segment, split, keys, ctx, carry)
            auxes.append(aux)
        x, remembered = carry
        return x, remembered if decoding else None, _sum(auxes)

    def _one_by_one(self, x: jax.Array, ctx: Context, cache: Memories):
        """Decode with layers whose parameters are `Separate`; return `(x, cache, aux)`."""
        split = {name: nnx.split(getattr(self, name)) for name in sorted(set(self.choice))}
        ctx = replace(ctx, rope=_kept(ctx.rope, ctx.positions))
        auxes = []
        for layer, (name, kind) in enumerate(zip(self.choice, self.kinds, strict=True)):
            structure, states = split[name]
            own = self.choice[:layer].count(name)
            state = jax.tree.map(lambda leaf, own=own: leaf[own], states, is_leaf=is_separate)
            one = replace(ctx, own_input=None if ctx.own_input is None else ctx.own_input[layer])
            x, cache, aux = nnx.merge(structure, state)(x, one, kind, layer, cache)
            auxes.append(aux)
        return x, cache, _sum(auxes)

    def _run(self, segment: Segment, split: dict, keys, ctx: Context, carry: tuple):
        """Run the layers of a segment on `carry = (x, cache)`; return what they carry on, and the sum of their aux."""
        start, width, repeats = segment
        chosen = self.choice[start : start + width]
        end = start + width * repeats
        before = {name: self.choice[:start].count(name) for name in chosen}

        def grouped(name: str, leaf: jax.Array) -> jax.Array:
            """Return the segment's part of a parameter, as `[repeats, layers of this block per period, ...]`."""
            inside, count = self.choice[start:end].count(name), chosen.count(name)
            leaf = leaf if inside == leaf.shape[0] else leaf[before[name] : before[name] + inside]
            return leaf.reshape(repeats, count, *leaf.shape[1:]) if count > 1 else leaf

        def body(carry, scanned):
            states, keys, inputs, group = scanned
            auxes = []
            for i, name in enumerate(chosen):
                number, count = chosen[:i].count(name), chosen.count(name)

                def run(x, cache, state, whole, keys, inputs, i=i, name=name, number=number, count=count):
                    # Index inside the recomputed function: the backward pass then saves the stacked parameters
                    # themselves, not a copy for every layer.
                    state = jax.tree.map(lambda leaf: leaf[number], state) if count > 1 else state
                    own_layer = before[name] + group * count + number
                    whole = jax.tree.map(lambda leaf: at(leaf, own_layer), whole)
                    block = nnx.merge(split[name][0], state, whole)
                    own = replace(
                        ctx,
                        dropout=None if keys is None else keys[i],
                        own_input=None if inputs is None else inputs[i],
                    )
                    if ctx.remat == "offload":
                        x = checkpoint_name(x, BLOCK_INPUT)
                    return block(x, own, self.kinds[start + i], start + group * width + i, cache)

                x, cache = carry
                if ctx.remat != "none" and not isinstance(cache, Cache):
                    # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier of
                    # prevent_cse is only needed for layers outside a scan.
                    run = jax.checkpoint(run, policy=REMAT_POLICIES[ctx.remat], prevent_cse=repeats == 1)
                x, cache, aux = run(x, cache, states[name], split[name][2], keys, inputs)
                carry = x, cache
                auxes.append(aux)
            return carry, _sum(auxes)

        states = {name: jax.tree.map(lambda leaf, n=name: grouped(n, leaf), split[name][1]) for name in set(chosen)}

        def by_period(leaf: jax.Array | None) -> jax.Array | None:
            """Return the segment's part of what each layer has one of, as `[repeats, width, ...]`."""
            return None if leaf is None else leaf[start:end].reshape(repeats, width, *leaf.shape[1:])

        scanned = (states, by_period(keys), by_period(ctx.own_input), jnp.arange(repeats))
        if repeats == 1:
            states, keys, inputs, _ = jax.tree.map(lambda leaf: leaf[0], scanned)
            return body(carry, (states, keys, inputs, 0))
        carry, auxes = jax.lax.scan(body, carry, scanned)
        return carry, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), auxes)


def _sum(auxes: list):
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), auxes)


def memories(root: nnx.Module) -> tuple[tuple[Memory, ...], ...]:
    """Return the memory records of each layer of a model, in order."""
    [stack] = (node for _, node in nnx.iter_graph(root) if isinstance(node, Stack))
    return stack.memories


def _cast(state: nnx.State, dtype) -> nnx.State:
    """Cast the trained matrices of all layers to the dtype of their matrix products.

    XLA would cast them all before the loop anyway. With the cast here, the scan also stacks their gradients in that dtype, not
    in the dtype of the master weights. A layer's gradient is computed in it, so this adds no rounding.
    """

    def cast(variable):
        row = variable.row if isinstance(variable, nnx.Param) else None
        if row is None or row.adapter or not row.trainable:
            return variable
        if not {"embed"} < {*row.axes} & {"embed", "heads", "kv_heads", "mlp"}:  # cast matrices of Linear and of experts
            return variable
        value = variable.get_value()
        return variable.replace(value.astype(dtype)) if value.dtype.itemsize > jnp.dtype(dtype).itemsize else variable

    return jax.tree.map(cast, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _kept(rope, positions: jax.Array):
    """Return the angles of RoPE, in memory: XLA would compute their sines and cosines again for each layer and head.

    It merges what is cheap by its count into each use, through barriers too, but not what a branch returns.
    """
    return jax.lax.cond(jnp.max(positions) < 0, lambda rope: jax.tree.map(jnp.zeros_like, rope), lambda rope: rope, rope)
