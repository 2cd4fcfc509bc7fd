"""FLOPs of training in closed form: the one definition of MFU that the loop and the plan share.

FLOPs per token, forward and backward (a multiply-add counts two):

    F = 4 N + 2 N_t + sum over layers of (12 W K + 3 R)  -  2 N_0 - sum over the layers below of (8 W K + 2 R)

    N    weights of the matrices that a token is multiplied with: 2 N forward, 2 N for the gradients of activations
    N_t  those of them that are trained: 2 N_t more for their own gradients
    N_0  those of the layers below the lowest one with anything trained, if the input's embedding is not: no gradient goes there
    W    heads x head size of a layer (if keys and values have different sizes, their mean)
    K    keys that a token sees, on average: of a document of T tokens (T + 1) / 2, within a window fewer
    R    FLOPs of a token's products with a layer's recurrent state, forward: `state_flops`, which its module declares

So full fine-tuning is 6 N and an adapter 4 N_base + 6 N_adapter, plus attention: scores and their sum with the values are 4 W
FLOPs per query and key forward, twice that backward, for the pairs that the causal mask, the window and the documents of a
packed row leave. The formula counts what the mathematics needs, not what is executed: the input embedding is a look-up and not
counted, nor are norms, biases, rotations, short convolutions, recomputation by remat, and what linear attention computes more
in chunks than token by token; of routed experts only those that a token uses are counted. (The lowest layer with trained
parameters counts as a whole, though no gradient flows to what comes before them in the layer.)

    MFU = F x tokens/s / (devices x peak of one)    (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)

Tokens are those that are not padding, trained or not. (On one device the loss skips the logits of most tokens that are not
trained: at most 4 x embed x vocab of F for each, which the convention counts all the same.)
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int

from ftjax.chips import chip_of
from ftjax.models.model import Model
from ftjax.models.nn.experts import ExpertMatrices
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import Embedding, LayerNorm, RMSNorm
from ftjax.models.nn.param import Piece, Spec
from ftjax.models.nn.short_convolution import ShortConvolution
from ftjax.models.nn.stack import Stack


class Chunk(NamedTuple):
    """View of a layer whose tokens see their chunk of a document; others see a window (int) or the whole text (None)."""

    size: int


View = int | Chunk | None


@dataclass(frozen=True)
class TrainFlops:
    """The terms of the formula above.

    Attributes:
        matrices: N.
        trained: N_t.
        attention: W of all layers with the same view, by that view: a window in tokens, a `Chunk`, or None for the whole text.
        below: N_0.
        attention_below: W of the layers below, like `attention`.
        states: R of all layers.
        states_below: R of the layers below.
        reference: N of other models that only read the tokens, at 2 N + 4 W K + R: a reference model, a teacher.
        reference_attention: their W, like `attention`.
        reference_states: their R.
        readers: what these models are.
    """

    matrices: float
    trained: float
    attention: dict[View, int]
    below: float = 0.0
    attention_below: dict[View, int] = field(default_factory=dict)
    states: float = 0.0
    states_below: float = 0.0
    reference: float = 0.0
    reference_attention: dict[View, int] = field(default_factory=dict)
    reference_states: float = 0.0
    readers: str = ""

    def per_token(self, length: float) -> float:
        """Return F in documents of `length` tokens."""
        return self._products + sum(width * _mean_keys(length, window) for window, width in self._widths.items())

    def of_batch(self, positions: Int[Array, "*rows T"], segment_ids: Int[Array, "*rows T"]) -> Float32[Array, ""]:
        """Return F of all real tokens of packed rows; positions count from each document's start."""
        real = segment_ids > 0
        keys = positions + 1

        def seen(view: View) -> jax.Array:
            if isinstance(view, Chunk):
                return seen_of(positions % view.size + 1)
            return seen_of(keys if view is None else jnp.minimum(keys, view))

        def seen_of(own: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(real, own, 0), dtype=jnp.float32)

        attention = sum((width * seen(window) for window, width in self._widths.items()), start=jnp.float32(0))
        return self._products * jnp.sum(real, dtype=jnp.float32) + attention

    @property
    def _products(self) -> float:
        """FLOPs per token of products with weights and recurrent states."""
        weights = 4.0 * self.matrices + 2.0 * self.trained - 2.0 * self.below + 2.0 * self.reference
        return weights + self._states

    @property
    def _states(self) -> float:
        return 3.0 * self.states - 2.0 * self.states_below + self.reference_states

    @property
    def _widths(self) -> dict[View, float]:
        """FLOPs of attention per key that a token sees, by view."""
        return {
            window: 12.0 * self.attention.get(window, 0)
            - 8.0 * self.attention_below.get(window, 0)
            + 4.0 * self.reference_attention.get(window, 0)
            for window in {**self.attention, **self.reference_attention}
        }

    def formula(self, length: int) -> str:
        """Return the formula with its numbers, for people."""
        attention = self.per_token(length) - self._products
        reference = f"+ 2 x {self.reference:.4g} of the {self.readers} " if self.reference else ""
        states = f"+ {self._states:.4g} recurrent states " if self._states else ""
        below = f"- 2 x {self.below:.4g} below the lowest trained layer " if self.below else ""
        return (
            f"{self.per_token(length):.4g} FLOPs per token = 4 x {self.matrices:.4g} weights + 2 x {self.trained:.4g} trained "
            f"{below}{reference}{states}+ {attention:.4g} attention (documents of {length} tokens)"
        )


def train_flops(model: Model, reference: Model | None = None, teacher: Model | None = None) -> TrainFlops:
    """Compute the terms for a model with its method.

    Args:
        reference, teacher: further models that read each token.
    """
    module = model.bind({path: spec.abstract for path, spec in model.specs.items()})
    nodes = {".".join(map(str, path)): node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)}
    # Parameters that a method adds to an embedding are looked up as well.
    tables = {f"{path.removesuffix('.base')}." for path, node in nodes.items() if isinstance(node, Embedding)}
    tables -= {f"{model.output}."}
    tables |= {f"{path}." for path, node in nodes.items() if isinstance(node, ShortConvolution)}
    experts = {
        f"{path}.experts.": (getattr(node, "gate", None) or node.router).top_k
        for path, node in nodes.items()
        if isinstance(getattr(node, "experts", None), ExpertMatrices)
    }

    def weights(spec: Spec) -> float:
        """Return the weights of one parameter that a token is multiplied with."""
        used = next((k for path, k in experts.items() if spec.path.startswith(path)), None)
        stacked = ("layers",) if used is None else ("layers", "experts")
        own = [axis for size, axis in zip(spec.shape, spec.row.axes, strict=True) if axis not in stacked and (axis or size > 1)]
        if len(own) < 2 or spec.row.name == "prompt_embeddings" or spec.path.startswith(tuple(tables)):
            return 0
        return spec.size if used is None else spec.size * used / spec.shape[spec.row.axes.index("experts")]

    counted = {path: weights(spec) for path, spec in model.specs.items()}
    lowest, places = _places(model, nodes)
    below = sum(
        count * sum(math.prod(piece.shape) for piece, at in places[path] if at < lowest) / model.specs[path].size
        for path, count in counted.items()
        if count
    )
    attention: Counter = Counter()
    attention_below: Counter = Counter()
    states = states_below = 0.0
    for path, stack in nodes.items():
        if isinstance(stack, Stack):
            widths = {  # of each block: modules with heads and a head size are attention
                name: sum(_width(n) for inner, n in nodes.items() if _is_attention(inner, n, f"{path}.{name}."))
                for name in set(stack.choice)
            }
            recurrent = {
                name: sum(n.state_flops for inner, n in nodes.items() if _has_state(inner, n, f"{path}.{name}."))
                for name in set(stack.choice)
            }
            for layer, (name, kind) in enumerate(zip(stack.choice, stack.kinds, strict=True)):
                pattern = kind if isinstance(kind, Pattern) else kind.pattern
                view = pattern.window if pattern.chunk is None else Chunk(pattern.chunk)
                attention[view] += widths[name]
                states += recurrent[name]
                if layer < lowest:
                    states_below += recurrent[name]
                    attention_below[view] += widths[name]
    trained = sum(count for path, count in counted.items() if model.specs[path].row.trainable)
    terms = dict(attention), below, dict(attention_below), states, states_below
    own = TrainFlops(sum(counted.values()), trained, *terms)
    readers = {
        name: train_flops(one) for name, one in (("reference model", reference), ("teacher", teacher)) if one is not None
    }
    others = readers.values()
    seen: Counter = Counter()
    for other in others:
        seen.update(other.attention)
    return replace(
        own, reference=sum(other.matrices for other in others), reference_attention=dict(seen),
        reference_states=sum(other.states for other in others), readers=" and the ".join(readers),
    )  # fmt: skip


def _places(model: Model, nodes: Mapping[str, nnx.Module]) -> tuple[int, dict[str, list[tuple[Piece, int]]]]:
    """Return `(the lowest layer with trained parameters, the layer of each tensor by its parameter's path)`.

    Layers count from 0; parameters before all of them are at -1, the final norm and the projection above them.
    """
    depth = sum(len(node.kinds) for node in nodes.values() if isinstance(node, Stack))
    embedding = model.embedding.path if model.embedding.row.trainable else None  # also if it is the projection as well

    def layer(spec: Spec, piece: Piece) -> int:
        if spec.stacked:
            return spec.layers[piece.index[0]] if spec.layers else piece.index[0]
        if spec.path == embedding:
            return -1
        if spec.path.startswith(f"{model.output}."):
            return depth + 1
        return depth if isinstance(nodes.get(spec.path.rpartition(".")[0]), RMSNorm | LayerNorm) else -1

    places = {path: [(piece, layer(spec, piece)) for piece in spec.pieces()] for path, spec in model.specs.items()}
    trained = [at for path in model.trainable for _, at in places[path]]
    return min(trained, default=-1), places


def train_flops_per_token(model: Model, length: float) -> float:
    """Return F of the module's docstring, for documents of `length` tokens."""
    return train_flops(model).per_token(length)


def peak_of(devices: list[jax.Device]) -> float | None:
    """Return the total bfloat16 FLOP/s of these devices; None if the table of chips does not have them."""
    chip = chip_of(devices[0].device_kind)
    return None if chip is None else sum(chip.peak * chip.share(device) for device in devices)


def _is_attention(path: str, node: nnx.Module, below: str) -> bool:
    return path.startswith(below) and hasattr(node, "heads") and hasattr(node, "head_dim")


def _has_state(path: str, node: nnx.Module, below: str) -> bool:
    return path.startswith(below) and hasattr(node, "state_flops")


def _width(node: nnx.Module) -> float:
    """Return heads x head size; the mean of both sizes if values have another one than keys."""
    return node.heads * (node.head_dim + getattr(node, "value_dim", node.head_dim)) / 2


def _mean_keys(length: float, window: View) -> float:
    """Return the mean over t = 1..T of min(t, window), or of the place of t in its chunk."""
    if isinstance(window, Chunk):
        whole, rest = divmod(length, window.size)
        return (whole * window.size * (window.size + 1) + rest * (rest + 1)) / (2 * length)
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)
