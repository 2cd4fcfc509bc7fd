"""Choose the next token from logits. The steps match transformers' logits processors, in their order:
repetition penalty, temperature, top-k, top-p, min-p. What OpenAI's API adds comes before the temperature: a bias on single
tokens and a grammar's mask first, presence and frequency penalties after the repetition penalty.

Legend: B batch, V vocab.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key, UInt32

from ftjax.errors import UserError

IN_PROMPT = 1 << 24  # added to a token's count of occurrences in the answer if the prompt has it


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. The defaults are greedy decoding.

    Attributes:
        temperature: logits are divided by it; 0 is greedy decoding.
        top_k: keep only this many of the most probable tokens, including ties with the last one; None or 0: all.
        top_p: keep only the most probable tokens that together reach this probability (Holtzman et al. 2019,
            arXiv:1904.09751).
        min_p: keep only tokens with at least this probability, relative to the most probable one (Nguyen et al. 2024,
            arXiv:2407.01082).
        repetition_penalty: positive logits of tokens in prompt or answer are divided by it, negative ones multiplied
            (Keskar et al. 2019, arXiv:1909.05858); also applies to greedy decoding.
        presence_penalty: subtracted from the logits of tokens that the answer already has (OpenAI's API).
        frequency_penalty: subtracted from them once for each time that the answer has them.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self):
        def refuse(name: str, wanted: str) -> None:
            raise UserError(f"{name} = {getattr(self, name)!r}; expected {wanted}")

        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value != value):
                refuse(field.name, "a number")
        if self.temperature < 0:
            refuse("temperature", "0 (greedy) or more")
        if self.top_k is not None and not 0 <= self.top_k == self.top_k // 1 < math.inf:
            refuse("top_k", "a whole number from 1, or 0 for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            refuse("top_p", "more than 0, at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            refuse("min_p", "between 0 and 1")
        if not self.repetition_penalty > 0:
            refuse("repetition_penalty", "more than 0; 1 is none")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                refuse(name, "between -2 and 2; 0 is none")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class RowSampling(NamedTuple):
    """`Sampling` of each row of a batch, as arrays `[B]`, so that rows with different settings share a program.

    Attributes:
        temperature: float32; 0 is greedy decoding.
        top_k: int32; 0 is no limit.
        tail: float32, 1 - top_p, the probability mass to drop: sums of small numbers are more exact than sums near 1. 0 is no
            limit.
        min_p: float32; 0 is no limit.
        repetition_penalty: float32; 1 is none.
        presence_penalty, frequency_penalty: float32; 0 is none.
    """

    temperature: jax.Array
    top_k: jax.Array
    tail: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array


def row_sampling(rows: Sequence[Sampling]) -> RowSampling:
    """Return the settings as host arrays. Greedy rows get no limits: their most probable token is within any limit.

    Numbers that the dtypes do not have become the nearest that they have.
    """
    most = float(np.finfo(np.float32).max)
    kinds = {"temperature": np.float32, "top_k": np.int32, "tail": np.float32, "min_p": np.float32}
    values = {
        "temperature": [min(one.temperature, most) for one in rows],
        "top_k": [0 if one.greedy else min(int(one.top_k or 0), 2**31 - 1) for one in rows],
        "tail": [0 if one.greedy or one.top_p is None else 1 - one.top_p for one in rows],
        "min_p": [0 if one.greedy else one.min_p or 0 for one in rows],
    }
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        kinds[name], values[name] = np.float32, [min(getattr(one, name), most) for one in rows]
    return RowSampling(**{name: np.array(values[name], kind) for name, kind in kinds.items()})


def uses_of(prompt: Sequence[int], answer: Sequence[int], vocab: int) -> Int32[np.ndarray, " {vocab}"]:
    """Return how often a text has each token, as `process` reads it."""
    uses = np.bincount(np.asarray(answer, np.int64), minlength=vocab).astype(np.int32)
    uses[np.asarray(prompt, np.int64)] += IN_PROMPT
    return uses


def restrict(
    logits: Float32[Array, "B V"], ids: Int32[Array, "B biased"], bias: Float32[Array, "B biased"],
    mask: UInt32[Array, "B words"] | None,
) -> Float32[Array, "B V"]:  # fmt: skip
    """Add a bias to single tokens, and exclude those that a grammar does not allow.

    Args:
        ids: tokens with a bias; padded with the size of the vocabulary.
        mask: bit `t % 32` of word `t // 32` is set if token t is allowed; None allows all.
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = jax.lax.cond(jnp.any(bias != 0), lambda x: x.at[rows, ids].add(bias, mode="drop"), lambda x: x, logits)
    if mask is None:
        return logits

    def allowed(logits: jax.Array) -> jax.Array:
        bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return _keep(logits, bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] == 1)

    return jax.lax.cond(jnp.any(mask != jnp.uint32(2**32 - 1)), allowed, lambda x: x, logits)


def process(logits: Float32[Array, "B V"], uses: Int32[Array, "B V"], rows: RowSampling) -> Float32[Array, "B V"]:
    """Apply each row's sampling settings to the logits; excluded tokens get -inf.

    Limits that no row uses are not computed.

    Args:
        uses: occurrences of each token in the answer, plus IN_PROMPT if the prompt has it, for the penalties.
    """
    penalty, top_k, tail, min_p = (x[:, None] for x in (rows.repetition_penalty, rows.top_k, rows.tail, rows.min_p))
    logits = jnp.where(uses > 0, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    presence, frequency = rows.presence_penalty[:, None], rows.frequency_penalty[:, None]

    def penalised(logits: jax.Array) -> jax.Array:
        count = uses % IN_PROMPT
        return logits - frequency * count.astype(jnp.float32) - jnp.where(count > 0, presence, 0)

    logits = jax.lax.cond(jnp.any((presence != 0) | (frequency != 0)), penalised, lambda logits: logits, logits)
    logits = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]

    def most_probable(logits: jax.Array) -> jax.Array:
        others = jnp.maximum(logits.shape[-1] - top_k, 0).astype(jnp.float32)
        return _keep(logits, (logits >= _threshold(logits, jnp.ones_like(logits), others)) | (top_k == 0))

    def nucleus(logits: jax.Array) -> jax.Array:
        return _keep(logits, (logits >= _threshold(logits, jax.nn.softmax(logits, axis=-1), tail)) | (tail == 0))

    def probable_enough(logits: jax.Array) -> jax.Array:
        probabilities = jax.nn.softmax(logits, axis=-1)
        return _keep(logits, probabilities >= min_p * jnp.max(probabilities, axis=-1, keepdims=True))

    for asked, limit in ((top_k > 0, most_probable), (tail > 0, nucleus), (min_p > 0, probable_enough)):
        logits = jax.lax.cond(jnp.any(asked), limit, lambda logits: logits, logits)
    return logits


def choose(logits: Float[Array, "B V"], temperature: Float[Array, " B"], keys: Key[Array, " B"]) -> Int32[Array, " B"]:
    """Choose a token per row from processed logits.

    Args:
        temperature: rows where it is 0 take the most probable token.
        keys: one PRNG key per row.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sampled() -> jax.Array:
        return jnp.where(temperature > 0, jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32), best)

    return jax.lax.cond(jnp.any(temperature > 0), sampled, lambda: best)


def _keep(logits: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.where(kept, logits, -jnp.inf)


def _threshold(
    scores: Float32[Array, "B V"], weights: Float32[Array, "B V"], most: Float32[Array, "B 1"]
) -> Float32[Array, "B 1"]:
    """Return the largest score such that the weights of all lower scores add up to at most `most`.

    The search goes bit by bit over order-preserving integers of the float32 scores: as exact as a sort, and much cheaper.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    order = jax.lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def body(number, found):
        tried = found | (jnp.uint32(1) << (jnp.uint32(31) - number.astype(jnp.uint32)))
        below = jnp.sum(jnp.where(order < tried, weights, 0), axis=-1, keepdims=True)
        return jnp.where(below <= most, tried, found)

    found = jax.lax.fori_loop(0, 32, body, jnp.zeros((*scores.shape[:-1], 1), jnp.uint32))
    # Clip so that the most probable token is kept despite rounding in the sums, and the result is a valid float.
    found = jnp.clip(found, jnp.min(order, axis=-1, keepdims=True), jnp.max(order, axis=-1, keepdims=True))
    bits = jax.lax.bitcast_convert_type(found, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ jnp.int32(-(2**31)), ~bits), jnp.float32)
