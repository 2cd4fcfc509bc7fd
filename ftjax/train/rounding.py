"""Stochastic rounding: low-precision numbers that are right on average.

A moment with decay 0.999 moves by a thousandth of itself in a step, and bfloat16 resolves 1/256: rounded to the nearest, it
would never move. Rounded up with the probability of the truncated fraction, it moves as it should on average (Gupta et al.
2015, arXiv:1502.02551).

A hash of the number and of a salt decides what rounds up, not a random key, so that any sharding gives the same bits and no
random state has to be saved.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Shaped, UInt32


def dither(x: Float[Array, "*of"], salt: Shaped[Array, ""]) -> UInt32[Array, "*of"]:
    """Return uniform integers: a hash (MurmurHash3's finaliser) of float32 x and a salt."""
    h = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) ^ (salt.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
    h = (h ^ h >> 16) * jnp.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * jnp.uint32(0xC2B2AE35)
    return h ^ h >> 16


def to_bfloat16(x: Float32[Array, "*of"], salt: Shaped[Array, ""]) -> BFloat16[Array, "*of"]:
    """Round float32 to one of the two nearest bfloat16 numbers; numbers that are not finite stay as they are."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + (dither(x, salt) & jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(up, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def to_steps(x: Float32[Array, "*of"], salt: Shaped[Array, ""]) -> Float32[Array, "*of"]:
    """Round to one of the two nearest integers, still float32."""
    return jnp.floor(x + dither(x, salt).astype(jnp.float32) * jnp.float32(2**-32))
