"""From logits to the next token. Every step means what transformers' logits processors mean, in their order:
repetition penalty, temperature, top-k, top-p, min-p.

Legend: B batch, V vocab.
"""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp

from ftjax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults choose the most probable one.

    Attributes:
        temperature: logits are divided by it; 0 is greedy decoding.
        top_k: only so many of the most probable tokens, ties with the last of them included; None or 0: all.
        top_p: only the most probable tokens that together reach this probability (Holtzman et al. 2019,
            arXiv:1904.09751).
        min_p: only tokens at least so probable, relative to the most probable one (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: positive logits of tokens in prompt or answer are divided by it, negative ones multiplied
            (Keskar et al. 2019, arXiv:1909.05858); greedy decoding heeds it too.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        def refuse(name: str, wanted: str) -> None:
            raise UserError(f"{name} = {getattr(self, name)!r}; expected {wanted}")

        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value != value):
                refuse(field.name, "a number")
        if self.temperature < 0:
            refuse("temperature", "0 (greedy) or more")
        if self.top_k is not None and (self.top_k < 0 or self.top_k != int(self.top_k)):
            refuse("top_k", "a whole number from 1, or 0 for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            refuse("top_p", "more than 0, at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            refuse("min_p", "between 0 and 1")
        if not self.repetition_penalty > 0:
            refuse("repetition_penalty", "more than 0; 1 is none")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def numbers(self) -> dict[str, jax.Array]:
        """What is in use, by name. The names alone decide what is compiled, not the values."""
        used: dict[str, float | int] = {}
        if self.repetition_penalty != 1:
            used["repetition_penalty"] = self.repetition_penalty
        if not self.greedy:
            used["temperature"] = self.temperature
            if self.top_k:
                used["top_k"] = int(self.top_k)
            if self.top_p is not None and self.top_p < 1:
                used["top_p"] = 1 - self.top_p  # what may be cut: a sum of small numbers is exact where one near 1 is not
            if self.min_p:
                used["min_p"] = self.min_p
        return {name: jnp.int32(value) if name == "top_k" else jnp.float32(value) for name, value in used.items()}


def process(logits: jax.Array, seen: jax.Array | None, numbers: dict[str, jax.Array]) -> jax.Array:
    """Logits `[B, V]` float32 with everything that `numbers` names applied; refused tokens get -inf.

    Args:
        seen: [B, V] bool, the tokens of prompt and answer; needed for the repetition penalty only.
    """
    if "repetition_penalty" in numbers:
        penalty = numbers["repetition_penalty"]
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if "temperature" in numbers:
        logits = logits / numbers["temperature"]
    if "top_k" in numbers:
        others = (logits.shape[-1] - numbers["top_k"]).astype(jnp.float32)
        logits = _keep(logits, logits >= _threshold(logits, jnp.ones_like(logits), others))
    if "top_p" in numbers:
        logits = _keep(logits, logits >= _threshold(logits, jax.nn.softmax(logits, axis=-1), numbers["top_p"]))
    if "min_p" in numbers:
        probabilities = jax.nn.softmax(logits, axis=-1)
        best = jnp.max(probabilities, axis=-1, keepdims=True)
        logits = _keep(logits, probabilities >= numbers["min_p"] * best)
    return logits


def choose(logits: jax.Array, numbers: dict[str, jax.Array], keys: jax.Array) -> jax.Array:
    """`[B]` int32: a token of each row of processed logits; `keys [B]` are one PRNG key for each row."""
    if "temperature" not in numbers:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _keep(logits: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.where(kept, logits, -jnp.inf)


def _threshold(scores: jax.Array, weights: jax.Array, most: jax.Array) -> jax.Array:
    """`[B, 1]`: the largest score such that the weights of all lower scores add up to at most `most`.

    Found bit by bit in the order-preserving integers of the float32 scores: as exact as a sort, and much cheaper.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    order = jax.lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def body(number, found):
        tried = found | (jnp.uint32(1) << (jnp.uint32(31) - number.astype(jnp.uint32)))
        below = jnp.sum(jnp.where(order < tried, weights, 0), axis=-1, keepdims=True)
        return jnp.where(below <= most, tried, found)

    found = jax.lax.fori_loop(0, 32, body, jnp.zeros((*scores.shape[:-1], 1), jnp.uint32))
    # The most probable token stays, whatever rounding makes of the sums; and the result is a score, not a pattern of bits.
    found = jnp.clip(found, jnp.min(order, axis=-1, keepdims=True), jnp.max(order, axis=-1, keepdims=True))
    bits = jax.lax.bitcast_convert_type(found, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ jnp.int32(-(2**31)), ~bits), jnp.float32)
