"""Depthwise causal convolution over a few tokens, as in gated DeltaNet, Mamba-2 and LFM2.

It restarts at each document of a packed row, and padding does not change what it remembers, so that the same code serves packed
training rows and decoding. `segment_ids [B, T]` are those of `ftjax.models.nn.context.Context`: the document of each token, 0
for padding.

Legend: B batch, T length, C channels, W kernel size.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ftjax.models.nn.param import Init, param


class ShortConvolution(nnx.Module):
    """The kernel `weight [C, 1, W]` of a depthwise `torch.nn.Conv1d`; its last tap applies to the token itself."""

    def __init__(self, channels: int, width: int, *, bias: bool = False, axis: str | None = "heads"):
        self.weight = param((channels, 1, width), (axis, None, None), "weight", init=Init("normal", width**-0.5))
        self.bias = param((channels,), (axis,), "bias", init=Init("zeros")) if bias else None

    @property
    def taps(self) -> Float[Array, "W C"]:
        """The kernel as `causal_conv` takes it."""
        return self.weight[...][:, 0].T


def causal_conv(
    x: Float[Array, "B T C"],
    weight: Float[Array, "W C"],
    before: Float[Array, "B W-1 C"],
    segment_ids: Int[Array, "B T"],
    bias: Float[Array, " C"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
    """Compute a depthwise causal convolution; the last row of the weight applies to the token itself.

    Products are added in float32 and rounded once, to the dtype of x.

    Args:
        before: the row's inputs before x (`ConvState`); zeros if the row starts with x.

    Returns the output and the last W - 1 inputs, not counting padding on the right as inputs.
    """
    length, taps = x.shape[1], weight.shape[0]
    inputs = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    first = segment_ids[:, :1]  # earlier inputs belong to the document that continues
    segments = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], taps - 1)), segment_ids], axis=1)
    y = jnp.zeros(x.shape, jnp.float32)
    for tap in range(taps):
        same = segments[:, tap : tap + length] == segment_ids
        own = jnp.where(same[..., None], inputs[:, tap : tap + length], 0).astype(jnp.float32)
        y = y + own * weight[tap].astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    index = jnp.arange(length, dtype=jnp.int32)
    count = jnp.max(jnp.where(segment_ids != 0, index + 1, 0), axis=1)
    last = count[:, None] + jnp.arange(taps - 1, dtype=jnp.int32)
    return y.astype(x.dtype), jnp.take_along_axis(inputs, last[..., None], axis=1)
