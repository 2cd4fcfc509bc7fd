"""Adam with moments in bfloat16 or in 8 bits.

The arithmetic stays float32; only the stored moments are rounded, stochastically (`ftjax.train.rounding`).

8-bit moments are in blocks of 256 along the last axis with one float32 scale per block (the blocks of Dettmers et al. 2022,
arXiv:2110.02861, but with even steps in place of their table): the first moment as int8, the second as the uint8 of its square
root. A second moment that rounds to zero counts as half a step, so that no update is divided by zero.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ftjax.train.rounding import to_bfloat16, to_steps

BLOCK = 256


class HeldMoments(NamedTuple):
    """Each field but the count is a tree like the parameters; the scales are empty arrays if the moments need none."""

    count: jax.Array  # [] int32: updates so far
    mu: Any
    nu: Any
    mu_scale: Any
    nu_scale: Any


def scale_by_held_adam(b1: float, b2: float, eps: float, dtype: str) -> optax.GradientTransformation:
    """Build `optax.scale_by_adam` with moments in `bfloat16` or `int8`."""
    hold, value = (_to_bfloat16, _of_bfloat16) if dtype == "bfloat16" else (_to_int8, _of_int8)

    def init(params):
        moments = {}
        for field, signed in (("mu", True), ("nu", False)):
            start = partial(_start, hold, signed)
            moments[field] = jax.tree.map(lambda p, start=start: start(p)[0], params)
            moments[f"{field}_scale"] = jax.tree.map(lambda p, start=start: start(p)[1], params)
        return HeldMoments(jnp.int32(0), **moments)

    def update(updates, state, params=None):
        count = state.count + 1

        def leaf(g, mu, nu, mu_scale, nu_scale):
            g = g.astype(jnp.float32)
            mu = b1 * value(mu, mu_scale, True) + (1 - b1) * g
            nu = b2 * value(nu, nu_scale, False) + (1 - b2) * jnp.square(g)
            past = count.astype(jnp.float32)
            step = mu / (1 - b1**past) / (jnp.sqrt(nu / (1 - b2**past)) + eps)
            # Different salts, so that the two moments of one number do not round alike.
            return step, *hold(mu, 2 * count, True), *hold(nu, 2 * count + 1, False)

        found = jax.tree.map(leaf, updates, state.mu, state.nu, state.mu_scale, state.nu_scale)
        step, mu, mu_scale, nu, nu_scale = (jax.tree.map(lambda _, row, i=i: row[i], updates, found) for i in range(5))
        return step, HeldMoments(count, mu, nu, mu_scale, nu_scale)

    return optax.GradientTransformation(init, update)


def _start(hold, signed, param):
    return hold(jnp.zeros(param.shape, jnp.float32), jnp.int32(0), signed)


def _to_bfloat16(x: jax.Array, salt: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    return to_bfloat16(x, salt), jnp.zeros(0)


def _of_bfloat16(held: jax.Array, scale: jax.Array, signed: bool) -> jax.Array:
    return held.astype(jnp.float32)


def _blocks(x: jax.Array) -> jax.Array:
    """Reshape `[..., C] -> [..., C / 256, 256]`; a last axis that 256 does not divide is one block, as is a scalar."""
    size = x.shape[-1] if x.ndim else 1
    each = BLOCK if size % BLOCK == 0 else size
    return x.reshape(*x.shape[:-1], -1, each)


def _to_int8(x: jax.Array, salt: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    """Return `(codes, scale [..., blocks])`."""
    blocks = _blocks(x if signed else jnp.sqrt(x))
    scale = jnp.max(jnp.abs(blocks), axis=-1) / (127 if signed else 255)
    steps = to_steps(blocks / jnp.where(scale > 0, scale, 1)[..., None], salt)
    return steps.astype(jnp.int8 if signed else jnp.uint8).reshape(x.shape), scale


def _of_int8(codes: jax.Array, scale: jax.Array, signed: bool) -> jax.Array:
    blocks = _blocks(codes).astype(jnp.float32)
    if signed:
        return (blocks * scale[..., None]).reshape(codes.shape)
    return jnp.square(jnp.maximum(blocks, 0.5) * scale[..., None]).reshape(codes.shape)
