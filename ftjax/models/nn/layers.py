"""Layers shared by all model families: Linear, Embedding, RMSNorm, LayerNorm and activations.

Legend: B batch, T query length, E embed, I in, O out, V vocab.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

from ftjax.errors import UserError
from ftjax.models.nn.bfloat16 import rounded, rounded_product
from ftjax.models.nn.context import Context, is_virtual
from ftjax.models.nn.device import on_one_cpu
from ftjax.models.nn.gathered import fully_sharded, gathered
from ftjax.models.nn.lookup import rows_of
from ftjax.models.nn.param import Init, param
from ftjax.models.nn.remat import WHOLE, saved_product

FEW = 32  # most tokens for which a CPU is faster with the weight as the left factor

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Return the activation function of that name. Raises UserError if it is not in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {name!r} is not supported; supported are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def project(x: Float[Array, "*of I"], weight: Float[Array, "_ _"], *, conv1d: bool = False) -> Float[Array, "*of O"]:
    """Multiply x by a weight (O, I), or (I, O) with `conv1d`; the result has the dtype of x.

    float32 uses the highest precision: accelerators would otherwise round the operands.

    Where a CPU decodes, the weight is the left factor. XLA's products there rearrange the right one first, which takes as long
    as multiplying it by a few tokens: with 16 of them this way round is twice as fast, with 64 as fast, and slower beyond.
    The barrier keeps XLA from swapping the two back.
    """
    weight = weight.astype(x.dtype)
    if rounded(x.dtype):
        return rounded_product(x, weight, conv1d)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if not conv1d and on_one_cpu() and math.prod(x.shape[:-1]) <= FEW:
        turned = jax.lax.dot_general(weight, x, (((1,), (x.ndim - 1,)), ((), ())), precision=precision)
        return jnp.moveaxis(jax.lax.optimization_barrier(turned), 0, -1)
    contract = (((x.ndim - 1,), (0 if conv1d else 1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, precision=precision)


@jax.custom_vjp
def widen(x: Float[Array, "*of I"], weight: Float[Array, "O I"]) -> Float[Array, "*of O"]:
    """Run `project` with a trained weight that has fewer inputs than outputs (LoRA's B, gate and up of a feed-forward layer).

    Its gradient is a product over all tokens, whose left factor CPUs transpose first. JAX's own rule puts the gradient of the
    outputs on the left; here it is the narrow input, and the small result is transposed instead. The barrier keeps XLA from
    swapping the two back. With LoRA's B this takes an eighth of the time.
    """
    return project(x, weight)


def _widen_forward(x, weight):
    return project(x, weight), (x, weight)


def _widen_backward(saved, d_y):
    x, weight = saved
    tokens = tuple(range(x.ndim - 1))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    kind = jnp.float32 if rounded(x.dtype) else None
    d_weight = jax.lax.dot_general(x, d_y, ((tokens, tokens), ((), ())), precision=precision, preferred_element_type=kind)
    d_weight = jax.lax.platform_dependent(d_weight, cpu=jax.lax.optimization_barrier, default=lambda product: product)
    return project(d_y, weight, conv1d=True), d_weight.T.astype(weight.dtype)


widen.defvjp(_widen_forward, _widen_backward)


def project_sharded(
    x: jax.Array,
    weight: jax.Array,
    axes: tuple[str | None, ...],
    ctx: Context,
    multiply: Callable[[jax.Array, jax.Array], jax.Array] = project,
) -> jax.Array:
    """Return `multiply(x, weight)` after gathering the weight if it is sharded along `fsdp`; `axes` are its logical axes.

    The output projection is not gathered here but by the objective, which needs it for every chunk of its loss.
    """
    if "vocab" in axes or ctx.whole_weights or not fully_sharded():
        return multiply(x, weight)

    def whole(x, weight):
        return multiply(x, checkpoint_name(gathered(weight.astype(x.dtype), axes), WHOLE))

    # Even if the block is not recomputed, save the shard for the backward pass and not the gathered weight.
    return jax.checkpoint(whole)(x, weight) if ctx.remat == "none" else whole(x, weight)


class Linear(nnx.Module):
    """`y[..., O] = x[..., I] @ weight[O, I].T + bias[O]`."""

    def __init__(
        self, size_in: int, size_out: int, axes: tuple[str | None, str | None], *, bias: bool = False, conv1d: bool = False
    ):
        """Create abstract weights.

        A family sets `adaptable` to False if PEFT could not load an adapter on the layer.

        Args:
            axes: logical axes of input and output.
            conv1d: store the weight as (I, O), like GPT-2.
        """
        self.adaptable = True
        self.size_in, self.size_out, self.axes, self.conv1d = size_in, size_out, axes, conv1d
        shape = (size_in, size_out) if conv1d else (size_out, size_in)
        self.weight = param(shape, self.weight_axes, "weight")
        self.bias = param((size_out,), (axes[1],), "bias", init=Init("zeros")) if bias else None

    @property
    def weight_axes(self) -> tuple[str | None, str | None]:
        return self.axes if self.conv1d else self.axes[::-1]

    def __call__(self, x: Float[Array, "*of I"], ctx: Context) -> Float[Array, "*of O"]:
        widens = self.size_out > self.size_in and not self.conv1d and self.weight.row.trainable
        multiply = widen if widens else partial(project, conv1d=self.conv1d)
        y = project_sharded(x, self.weight[...], self.weight_axes, ctx, multiply)
        return saved_product(y if self.bias is None else y + self.bias[...].astype(x.dtype))


class Embedding(nnx.Module):
    """Embedding table `weight[V, E]`; `attend` is the tied output projection.

    Virtual tokens have no ids; they are passed as embeddings `[B, T, E]`, which are returned unchanged.
    """

    def __init__(self, vocab: int, embed: int, vocab_axis: str | None = "vocab"):
        self.weight = param((vocab, embed), (vocab_axis, "embed"), "weight")

    def __call__(self, tokens: Shaped[Array, "B T ..."], dtype) -> Float[Array, "B T E"]:
        if is_virtual(tokens):
            return tokens.astype(dtype)
        return rows_of(self.weight[...], self.weight.row.axes, tokens, dtype)

    def attend(self, x: Float[Array, "*of E"]) -> Float[Array, "*of V"]:
        """Project hidden states to logits."""
        return project(x, self.weight[...])


class IdentityAdapter(nnx.Module):
    """Returns a sublayer's output unchanged; bottleneck adapters replace it.

    A block calls it as `attention_adapters(x, o, ctx)` and `output_adapters(x, o, ctx)`, with the residual stream x before the
    sublayer and the sublayer's output o.
    """

    def __call__(self, x: Float[Array, "B T E"], o: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        return o


def unit_rms(x: Float[Array, "*of size"], eps: float) -> Float[Array, "*of size"]:
    """Return `x / rms(x)`, computed in float32: a norm without weights."""
    return _unit_rms(x, eps).astype(x.dtype)


def _unit_rms(x: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` in float32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    `offset` is added to the weight (Gemma stores `weight - 1`). `round_first`: multiply after rounding to the dtype of x, as in
    Llama, instead of before, as in Gemma.
    """

    def __init__(self, size: int, eps: float, *, offset: float = 0.0, round_first: bool = True, axis: str | None = "norm"):
        self.eps, self.offset, self.round_first = eps, offset, round_first
        self.weight = param((size,), (axis,), "weight", init=Init("zeros" if offset else "ones"))

    def __call__(self, x: Float[Array, "*of size"]) -> Float[Array, "*of size"]:
        y = _unit_rms(x, self.eps)
        weight = self.weight[...].astype(jnp.float32) + self.offset
        if self.round_first:
            return y.astype(x.dtype) * weight.astype(x.dtype)
        return (y * weight).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with weight and bias, computed in float32."""

    def __init__(self, size: int, eps: float, *, bias: bool = True):
        self.eps = eps
        self.weight = param((size,), ("norm",), "weight", init=Init("ones"))
        self.bias = param((size,), ("norm",), "bias", init=Init("zeros")) if bias else None

    def __call__(self, x: Float[Array, "*of size"]) -> Float[Array, "*of size"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        y = y * self.weight[...].astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
