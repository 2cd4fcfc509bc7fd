"""What runs on the device: prompts into the cache, then token after token in a loop that stops when all rows have.

Pure functions; `ftjax.generate.session` compiles them.

Legend: B batch, T prompt length, S cache slots, N longest answer, V vocab, E embed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.generate.cache import forward, new_cache
from ftjax.generate.sample import choose, process
from ftjax.mesh import constrain
from ftjax.models.cache_shape import CacheShape
from ftjax.models.context import Context, KVCache
from ftjax.models.model import Model


class Rules(NamedTuple):
    """How tokens are chosen and when a row is done.

    Attributes:
        numbers: of `Sampling`, by name.
        keys: [B] PRNG keys, one for each row, so that a row does not depend on its neighbours.
        ends: [e] int32, ids that end an answer.
        limits: [B] int32, the longest answer of each row.
    """

    numbers: dict[str, jax.Array]
    keys: jax.Array
    ends: jax.Array
    limits: jax.Array


class State(NamedTuple):
    """A batch of answers in the making.

    Attributes:
        token: [B] int32, chosen last and not yet in the cache.
        position: [B] int32, of that token.
        step: [] int32, tokens chosen so far.
        tokens: [B, N] int32, all that were chosen; those behind a row's end mean nothing.
        logprobs: [B, N] float32, their log-probabilities by the model itself, before temperature and the like; or None.
        done: [B] bool.
        seen: [B, V] bool, tokens of prompt and answer; or None.
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    step: jax.Array
    tokens: jax.Array
    logprobs: jax.Array | None
    done: jax.Array
    seen: jax.Array | None


class View(NamedTuple):
    """What the host looks at between two calls; every process holds all of it."""

    step: jax.Array
    tokens: jax.Array
    logprobs: jax.Array | None
    done: jax.Array


@dataclass(frozen=True, eq=False)
class Runner:
    """A model as it runs here: activations and cache in `dtype`."""

    model: Model
    shape: CacheShape
    dtype: Any

    # ---- prompts ----

    def prefill(
        self, params: Mapping[str, jax.Array], tokens: jax.Array, segment_ids: jax.Array, rules: Rules,
        *, slots: int, longest: int, block: int, logprobs: bool,
    ) -> tuple[State, View]:  # fmt: skip
        """Left-padded prompts `[B, T]`, and the first token of each answer."""
        rows, length = tokens.shape
        cache = new_cache(self.shape, rows, slots, self.dtype)
        last = jnp.full(rows, length - 1, jnp.int32)
        logits, cache = self.absorb(params, cache, tokens, segment_ids, positions_of(segment_ids), last, block=block)
        seen = seen_in(tokens, segment_ids, logits.shape[-1]) if "repetition_penalty" in rules.numbers else None
        return self.start(logits, cache, jnp.sum(segment_ids, axis=1), seen, rules, longest=longest, logprobs=logprobs)

    def again(
        self, params: Mapping[str, jax.Array], state: State, tokens: jax.Array, segment_ids: jax.Array, rules: Rules,
        *, slots: int, block: int,
    ) -> tuple[State, View]:  # fmt: skip
        """A new cache out of prompts and answers so far `[B, T]`, left-padded, and the next token of each answer."""
        rows, length = tokens.shape
        cache = new_cache(self.shape, rows, slots, self.dtype)
        last = jnp.full(rows, length - 1, jnp.int32)
        logits, cache = self.absorb(params, cache, tokens, segment_ids, positions_of(segment_ids), last, block=block)
        return self._view(self.pick(state._replace(cache=cache), logits, rules))

    def resume(
        self, params: Mapping[str, jax.Array], cache: KVCache, length: jax.Array, tokens: jax.Array, count: jax.Array,
        seen: jax.Array, rules: Rules, *, longest: int, block: int, logprobs: bool,
    ) -> tuple[State, View]:  # fmt: skip
        """Go on behind the first `length` slots of a cache, in which slot and position are the same: with the first
        `count` of `tokens [B, T]`, and the first token of each answer. What is in later slots nobody sees: attention is
        causal by slot, and each is written over before its turn comes."""
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        segment_ids = (index < count).astype(jnp.int32)
        last = jnp.full(tokens.shape[0], count - 1, jnp.int32)
        # Padding stays within the positions that exist: what is not a number would outlive its slot.
        positions = length + jnp.minimum(index, count - 1)
        logits, cache = self.absorb(params, replace(cache, length=length), tokens, segment_ids, positions, last, block=block)
        cache = replace(cache, length=length + count)  # the padding's slots are written over
        seen = seen if "repetition_penalty" in rules.numbers else None
        return self.start(logits, cache, length + last + 1, seen, rules, longest=longest, logprobs=logprobs)

    def absorb(
        self, params: Mapping[str, jax.Array], cache: KVCache, tokens: jax.Array, segment_ids: jax.Array,
        positions: jax.Array, last: jax.Array, *, block: int,
    ) -> tuple[jax.Array, KVCache]:  # fmt: skip
        """Put tokens `[B, T]` into the cache, `block` of them at a time, so that the scores of a long prompt never exist
        at once; the logits `[B, V]` that follow the token at index `last [B]`."""
        module = self.model.bind(params)

        def part(at: jax.Array | int, cache: KVCache) -> tuple[jax.Array, KVCache]:
            take = lambda x: jax.lax.dynamic_slice_in_dim(x, at, block, axis=1)  # noqa: E731
            ctx = Context(take(positions), take(segment_ids), self.dtype)
            hidden, cache = forward(module, take(tokens), ctx, cache)
            inside = jnp.clip(last - at, 0, block - 1)
            return jnp.take_along_axis(hidden, inside[:, None, None], axis=1)[:, 0], cache

        def body(number: jax.Array, carry: tuple) -> tuple:
            final, cache = carry
            found, cache = part(number * block, cache)
            return jnp.where((last >= number * block)[:, None], found, final), cache

        final, cache = part(0, cache)
        final, cache = jax.lax.fori_loop(1, tokens.shape[1] // block, body, (final, cache))
        return self._logits(module, final), cache

    # ---- answers ----

    def start(
        self, logits: jax.Array, cache: KVCache, position: jax.Array, seen: jax.Array | None, rules: Rules,
        *, longest: int, logprobs: bool,
    ) -> tuple[State, View]:  # fmt: skip
        """The first token of each row, from the logits behind its prompt; `position [B]` is where that token will be."""
        rows = logits.shape[0]
        state = State(
            cache=cache,
            token=jnp.zeros(rows, jnp.int32),
            position=position - 1,
            step=jnp.int32(0),
            tokens=jnp.zeros((rows, longest), jnp.int32),
            logprobs=jnp.zeros((rows, longest), jnp.float32) if logprobs else None,
            done=rules.limits <= 0,
            seen=seen,
        )
        return self._view(self.pick(state, logits, rules))

    def decode(
        self, params: Mapping[str, jax.Array], state: State, stopped: jax.Array, rules: Rules, until: jax.Array
    ) -> tuple[State, View]:
        """Go on to `until` tokens, or until every row is done; the host says which rows have `stopped [B]`."""
        module = self.model.bind(params)

        def going(state: State) -> jax.Array:
            return (state.step < until) & ~jnp.all(state.done)

        def body(state: State) -> State:
            ctx = Context(state.position[:, None], jnp.ones_like(state.token)[:, None], self.dtype)
            hidden, cache = forward(module, state.token[:, None], ctx, state.cache)
            return self.pick(state._replace(cache=cache), self._logits(module, hidden[:, 0]), rules)

        return self._view(jax.lax.while_loop(going, body, state._replace(done=state.done | stopped)))

    def pick(self, state: State, logits: jax.Array, rules: Rules) -> State:
        """One more token of each row."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(rules.keys, state.step)
        token = choose(process(logits, state.seen, rules.numbers), rules.numbers, keys)
        at, rows = (0, state.step), jnp.arange(token.shape[0])
        logprobs, seen, step = state.logprobs, state.seen, state.step + 1
        if logprobs is not None:
            own = logits[rows, token] - jax.nn.logsumexp(logits, axis=-1)
            logprobs = jax.lax.dynamic_update_slice(logprobs, own[:, None], at)
        if seen is not None:
            seen = seen.at[rows, token].set(True)
        ended = jnp.any(token[:, None] == rules.ends, axis=1) | (step >= rules.limits)
        return State(
            cache=state.cache,
            token=token,
            position=state.position + 1,
            step=step,
            tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], at),
            logprobs=logprobs,
            done=state.done | ended,
            seen=seen,
        )

    def _logits(self, module: Any, hidden: jax.Array) -> jax.Array:
        one = jnp.ones((1, 1), jnp.int32)
        return constrain(module.unembed(hidden, Context(one, one, self.dtype)), "batch", "vocab")

    def _view(self, state: State) -> tuple[State, View]:
        whole = [None if x is None else constrain(x, *(None,) * x.ndim) for x in (state.tokens, state.logprobs, state.done)]
        return state, View(state.step, *whole)


def positions_of(segment_ids: jax.Array) -> jax.Array:
    """`[B, T]`: 0 for the first token behind the padding."""
    return jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)


def seen_in(tokens: jax.Array, segment_ids: jax.Array, vocab: int) -> jax.Array:
    """`[B, V]` bool: the tokens that occur in each row, padding not counted."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].max(segment_ids > 0)
