"""bfloat16 on CPUs.

XLA has matrix products for CPUs that multiply bfloat16 and return float32, at almost twice the speed of float32 where the CPU
has such instructions (AVX512-BF16, AMX). It has none that return bfloat16: for these it casts all operands to float32 first. It
also casts an array before it slices it, even a whole stack of layers before a loop over them, which then takes twice the memory
of the weights beside them. So on a CPU products are taken in float32 and rounded, which changes no result but by the order of
additions, and parts of frozen weights are taken as bits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, BFloat16, Float, Int, Shaped

from ftjax.models.nn.device import on_cpu


def rounded(dtype) -> bool:
    """Return whether a product of this dtype is to be taken in float32 and rounded."""
    return dtype == jnp.bfloat16 and on_cpu()


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded_product(x: BFloat16[Array, "*of I"], weight: BFloat16[Array, "_ _"], conv1d: bool) -> BFloat16[Array, "*of O"]:
    """Multiply x by a weight (O, I), or (I, O) with `conv1d`, for `rounded` dtypes; its gradients are such products too."""
    return _wide(x, weight, (x.ndim - 1,), (0 if conv1d else 1,)).astype(x.dtype)


def _wide(a: jax.Array, b: jax.Array, over_a: tuple[int, ...], over_b: tuple[int, ...]) -> jax.Array:
    return jax.lax.dot_general(a, b, ((over_a, over_b), ((), ())), preferred_element_type=jnp.float32)


def _forward(x, weight, conv1d: bool):
    # Only what a gradient is asked of is kept: of frozen weights there is none.
    kept = x.value if weight.perturbed else None, weight.value if x.perturbed else None
    return rounded_product(x.value, weight.value, conv1d), kept


def _backward(conv1d: bool, kept: tuple, d_y):
    x, weight = kept
    if isinstance(d_y, SymbolicZero):
        return None, None
    d_x = d_weight = None
    if weight is not None:
        d_x = _wide(d_y, weight, (d_y.ndim - 1,), (1 if conv1d else 0,)).astype(d_y.dtype)
    if x is not None:
        tokens = tuple(range(x.ndim - 1))
        left, right = (x, d_y) if conv1d else (d_y, x)
        d_weight = _wide(left, right, tokens, tokens).astype(d_y.dtype)
    return d_x, d_weight


rounded_product.defvjp(_forward, _backward, symbolic_zeros=True)


def at(stack: Shaped[Array, " L *of"], index: Int[Array, ""]) -> Shaped[Array, "*of"]:
    """Return `stack[index]`, of a frozen array: no gradient flows through it."""
    if rounded(stack.dtype):
        # In a loop the barrier keeps the bits of the whole stack from being copied before it.
        stack, index = jax.lax.optimization_barrier((stack, index))
        return jax.lax.bitcast_convert_type(at(jax.lax.bitcast_convert_type(stack, jnp.uint16), index), stack.dtype)
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


@jax.custom_jvp
def rows_at(table: Float[Array, "V E"], ids: Int[Array, "*of"]) -> Float[Array, "*of E"]:
    """Return `table[ids]`; NaN for ids that are not below V."""
    if not rounded(table.dtype):
        return jnp.take(table, ids, axis=0)
    rows = jax.lax.map(lambda one: at(table, one), ids.reshape(-1)).reshape(*ids.shape, -1)
    return jnp.where((ids < table.shape[0])[..., None], rows, jnp.nan)


@rows_at.defjvp
def _rows_at_jvp(primals: tuple, tangents: tuple):
    (table, ids), (d_table, _) = primals, tangents
    return rows_at(table, ids), jnp.take(d_table, ids, axis=0)
