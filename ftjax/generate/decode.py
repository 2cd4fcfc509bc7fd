"""What runs on the device: prompts into the cache, then token after token, each row at its own pace.

Pure functions; `ftjax.generate.engine` compiles them.

Legend: B rows of the batch, R rows that start together, T prompt length, S cache slots, C tokens of one call, V vocab.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.generate.cache import forward, new_cache
from ftjax.generate.sample import RowSampling, choose, process
from ftjax.mesh import constrain
from ftjax.models.cache import Cache
from ftjax.models.context import Context
from ftjax.models.model import Model

CHUNK = 32  # tokens of each row that one call of `decode` can give


class Rules(NamedTuple):
    """How each row chooses its tokens, and when it has ended.

    Attributes:
        sampling: arrays [B].
        keys: [B, 2] uint32, data of a PRNG key for each row, so that no row depends on its neighbours.
        ends: [B, e] int32, ids that end an answer; -1 fills up.
        limits: [B] int32, tokens of the longest answer.
    """

    sampling: RowSampling
    keys: jax.Array
    ends: jax.Array
    limits: jax.Array


class State(NamedTuple):
    """Rows that decode.

    Attributes:
        token: [B] int32, chosen last and not yet in the cache.
        count: [B] int32, tokens of the answer so far.
        done: [B] bool; such a row stays as it is.
        seen: [B, V] bool, tokens of prompt and answer.
    """

    cache: Cache
    token: jax.Array
    count: jax.Array
    done: jax.Array
    seen: jax.Array
    rules: Rules


class Start(NamedTuple):
    """Rows that start, in place of whatever was in them.

    Attributes:
        rows: [R] int32, which of the batch; B or more: none, this is padding.
        tokens: [R, T] int32, what is to go into the cache, padded on the right.
        counts: [R] int32, how many of them are not padding.
        kept: [R] int32, tokens before them that are in the row's cache already.
        chosen: [R] int32, how many of all these belong to the answer: a row that was computed anew goes on.
        seeds, numbers: [R] uint32, which make each row's key.
    """

    rows: jax.Array
    tokens: jax.Array
    counts: jax.Array
    kept: jax.Array
    chosen: jax.Array
    seen: jax.Array
    seeds: jax.Array
    numbers: jax.Array
    sampling: RowSampling
    ends: jax.Array
    limits: jax.Array


class View(NamedTuple):
    """What the host looks at after a call; every process holds all of it.

    Attributes:
        tokens: [B, C] int32, the new ones of each row, from the left.
        logprobs: [B, C] float32, their log-probabilities by the model itself, before temperature and the like.
        counts: [B] int32, how many there are.
    """

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array


@dataclass(frozen=True, eq=False)
class Runner:
    """A model as it runs here: activations and cache in `dtype`."""

    model: Model
    dtype: Any

    def empty(self, like: Start, *, rows: int, slots: int) -> State:
        """A batch in which nothing decodes; `like` says the sizes of `rules`."""
        zeros = lambda x: constrain(jnp.zeros((rows, *x.shape[1:]), x.dtype), "batch", *(None,) * (x.ndim - 1))  # noqa: E731
        keys = constrain(jnp.zeros((rows, 2), jnp.uint32), "batch", None)
        rules = Rules(jax.tree.map(zeros, like.sampling), keys, zeros(like.ends), zeros(like.limits))
        token, count, done = zeros(like.counts), zeros(like.counts), ~zeros(like.counts).astype(bool)
        return State(new_cache(self.model, rows, slots, self.dtype), token, count, done, zeros(like.seen), rules)

    def begin(self, params: Mapping[str, jax.Array], start: Start, *, slots: int, block: int) -> tuple[State, View]:
        """A new batch whose rows all start: `start.rows` is 0, 1, 2 ..., and a row without tokens is done."""
        state = self.empty(start, rows=start.rows.shape[0], slots=slots)
        return self._started(params, state.cache, start, block)

    def start(self, params: Mapping[str, jax.Array], state: State, start: Start, *, block: int) -> tuple[State, View]:
        """Some rows start; the others stay as they are."""
        part, view = self._started(params, state.cache.take(start.rows, start.kept), start, block)

        def put(whole: jax.Array, new: jax.Array) -> jax.Array:
            return whole.at[start.rows].set(new, mode="drop")

        rest = jax.tree.map(put, state._replace(cache=None), part._replace(cache=None))
        return rest._replace(cache=state.cache.put(start.rows, part.cache)), view

    def decode(self, params: Mapping[str, jax.Array], state: State, stopped: jax.Array, steps: jax.Array) -> tuple[State, View]:
        """At most `steps` more tokens of each row, up to `CHUNK`; the host says which rows have `stopped [B]`."""
        module = self.model.bind(params)
        rows = state.token.shape[0]
        state = state._replace(done=state.done | stopped)
        tokens, logprobs = jnp.zeros((rows, CHUNK), jnp.int32), jnp.zeros((rows, CHUNK), jnp.float32)

        def going(carry: tuple) -> jax.Array:
            step, state, *_ = carry
            return (step < steps) & ~jnp.all(state.done)

        def body(carry: tuple) -> tuple:
            step, state, tokens, logprobs = carry
            active = (~state.done).astype(jnp.int32)
            hidden, cache = forward(module, state.token[:, None], active, state.cache, self.dtype)
            state, token, logprob = self._pick(state._replace(cache=cache), self._logits(module, hidden[:, 0]))
            put = lambda x, new: jax.lax.dynamic_update_slice(x, new[:, None], (0, step))  # noqa: E731
            return step + 1, state, put(tokens, token), put(logprobs, logprob)

        before = state.count
        _, state, tokens, logprobs = jax.lax.while_loop(going, body, (jnp.int32(0), state, tokens, logprobs))
        return state, self._view(tokens, logprobs, state.count - before)

    # ---- parts ----

    def _started(self, params: Mapping[str, jax.Array], cache: Cache, start: Start, block: int) -> tuple[State, View]:
        """`State` and `View` of the rows that start alone, in their caches."""
        keys = jax.random.key_data(jax.vmap(lambda s, n: jax.random.fold_in(jax.random.key(s), n))(start.seeds, start.numbers))
        rules = Rules(start.sampling, keys, start.ends, start.limits)
        logits, cache = self._prefill(params, replace(cache, lengths=start.kept), start.tokens, start.counts, block)
        done = (start.counts <= 0) | (start.chosen >= start.limits)
        state = State(cache, jnp.zeros_like(start.counts), start.chosen, done, start.seen, rules)
        state, token, logprob = self._pick(state, logits)
        return state, self._view(token[:, None], logprob[:, None], state.count - start.chosen)

    def _prefill(
        self, params: Mapping[str, jax.Array], cache: Cache, tokens: jax.Array, counts: jax.Array, block: int
    ) -> tuple[jax.Array, Cache]:
        """Put the first `counts [B]` of tokens `[B, T]` into the cache, `block` of them at a time, so that the scores of a long
        prompt never exist at once; the logits `[B, V]` after the last of them."""
        module = self.model.bind(params)

        def part(at: jax.Array | int, cache: Cache) -> tuple[jax.Array, Cache]:
            here = jnp.clip(counts - at, 0, block)
            hidden, cache = forward(module, jax.lax.dynamic_slice_in_dim(tokens, at, block, axis=1), here, cache, self.dtype)
            last = jnp.clip(counts - 1 - at, 0, block - 1)
            return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache

        def body(number: jax.Array, carry: tuple) -> tuple:
            final, cache = carry
            found, cache = part(number * block, cache)
            return jnp.where((counts > number * block)[:, None], found, final), cache

        final, cache = part(0, cache)
        final, cache = jax.lax.fori_loop(1, tokens.shape[1] // block, body, (final, cache))
        return self._logits(module, final), cache

    def _pick(self, state: State, logits: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        """One more token of each row that is not done: `(state, token [B], its log-probability [B])`."""
        rules, rows, active = state.rules, jnp.arange(logits.shape[0]), ~state.done
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rules.keys), state.count)
        token = choose(process(logits, state.seen, rules.sampling), rules.sampling.temperature, keys)
        logprob = logits[rows, token] - jax.nn.logsumexp(logits, axis=-1)
        count = state.count + active
        ended = jnp.any(token[:, None] == rules.ends, axis=1) | (count >= rules.limits)
        state = state._replace(
            token=jnp.where(active, token, state.token),
            count=count,
            done=state.done | ended,
            seen=state.seen.at[rows, token].max(active),
        )
        return state, token, logprob

    def _logits(self, module: Any, hidden: jax.Array) -> jax.Array:
        one = jnp.ones((1, 1), jnp.int32)
        return constrain(module.unembed(hidden, Context(one, one, self.dtype)), "batch", "vocab")

    def _view(self, *arrays: jax.Array) -> View:
        return View(*(constrain(x, *(None,) * x.ndim) for x in arrays))
