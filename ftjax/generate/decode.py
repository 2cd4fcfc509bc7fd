"""Device code for generation: prefill prompts into the cache, then decode token by token, each row at its own pace.

All functions are pure; `ftjax.generate.engine` compiles them.

Legend: B rows of the batch, R rows that start together, T prompt length, S cache slots, C tokens per call, V vocab.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.generate.cache import forward, new_cache
from ftjax.generate.sample import RowSampling, choose, process, restrict
from ftjax.mesh import constrain
from ftjax.models.model import Model
from ftjax.models.nn.cache import Cache
from ftjax.models.nn.context import Context

CHUNK = 32  # maximum tokens per row and call of `decode`


class Rules(NamedTuple):
    """Sampling settings and stopping criteria per row.

    Attributes:
        sampling: arrays [B].
        keys: [B, 2] uint32, key data of one PRNG key per row, so that rows are independent of each other.
        ends: [B, e] int32, token ids that end an answer, padded with -1.
        limits: [B] int32, maximum length of the answer in tokens.
        biased: [B, b] int32, tokens whose logits have a bias, padded with V.
        bias: [B, b] float32.
    """

    sampling: RowSampling
    keys: jax.Array
    ends: jax.Array
    limits: jax.Array
    biased: jax.Array
    bias: jax.Array


class State(NamedTuple):
    """Decoding state of a batch.

    Attributes:
        token: [B] int32, the most recent token, not yet in the cache.
        count: [B] int32, tokens of the answer so far.
        done: [B] bool, rows that are finished and no longer change.
        uses: [B, V] int32, how often prompt and answer have each token (`ftjax.generate.sample.process`).
    """

    cache: Cache
    token: jax.Array
    count: jax.Array
    done: jax.Array
    uses: jax.Array
    rules: Rules


class Start(NamedTuple):
    """Inputs for rows that start, replacing their previous contents.

    Attributes:
        rows: [R] int32, row indices in the batch; B or more marks padding.
        tokens: [R, T] int32, tokens to prefill, padded on the right.
        counts: [R] int32, number of tokens that are not padding.
        kept: [R] int32, number of preceding tokens that are already in the row's cache.
        chosen: [R] int32, how many of all these tokens belong to the answer: a row whose cache is rebuilt continues its answer.
        seeds, numbers: [R] uint32, which determine each row's PRNG key.
    """

    rows: jax.Array
    tokens: jax.Array
    counts: jax.Array
    kept: jax.Array
    chosen: jax.Array
    uses: jax.Array
    seeds: jax.Array
    numbers: jax.Array
    sampling: RowSampling
    ends: jax.Array
    limits: jax.Array
    biased: jax.Array
    bias: jax.Array


class View(NamedTuple):
    """Results that the host reads after a call; replicated on every device.

    Attributes:
        tokens: [B, C] int32, new tokens of each row, left-aligned.
        logprobs: [B, C] float32, their log-probabilities under the model itself, before temperature and other settings
            (`Runner.of_sampler`: after them).
        counts: [B] int32, number of new tokens of each row.
    """

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array


@dataclass(frozen=True, eq=False)
class Runner:
    """A model that runs with activations and cache in `dtype`."""

    model: Model
    dtype: Any
    of_sampler: bool = False  # log-probabilities are those of the distribution that tokens are drawn from

    def empty(self, like: Start, *, rows: int, slots: int) -> State:
        """Return the state of an idle batch; `like` determines the shapes of `rules`."""
        zeros = lambda x: constrain(jnp.zeros((rows, *x.shape[1:]), x.dtype), "batch", *(None,) * (x.ndim - 1))  # noqa: E731
        keys = constrain(jnp.zeros((rows, 2), jnp.uint32), "batch", None)
        rules = Rules(jax.tree.map(zeros, like.sampling), keys, *map(zeros, (like.ends, like.limits, like.biased, like.bias)))
        token, count, done = zeros(like.counts), zeros(like.counts), ~zeros(like.counts).astype(bool)
        return State(new_cache(self.model, rows, slots, self.dtype), token, count, done, zeros(like.uses), rules)

    def begin(self, params: Mapping[str, jax.Array], start: Start, *, slots: int, block: int) -> tuple[State, View]:
        """Start all rows of a new batch: `start.rows` is 0, 1, 2 ..., and a row without tokens is done."""
        state = self.empty(start, rows=start.rows.shape[0], slots=slots)
        return self._started(params, state.cache, start, block)

    def start(self, params: Mapping[str, jax.Array], state: State, start: Start, *, block: int) -> tuple[State, View]:
        """Start some rows and leave the others unchanged."""
        part, view = self._started(params, state.cache.take(start.rows, start.kept), start, block)

        def put(whole: jax.Array, new: jax.Array) -> jax.Array:
            return whole.at[start.rows].set(new, mode="drop")

        rest = jax.tree.map(put, state._replace(cache=None), part._replace(cache=None))
        return rest._replace(cache=state.cache.put(start.rows, part.cache)), view

    def decode(self, params: Mapping[str, jax.Array], state: State, stopped: jax.Array, steps: jax.Array) -> tuple[State, View]:
        """Decode at most `steps` (up to `CHUNK`) more tokens per row; `stopped [B]` marks rows that the host has stopped."""
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
            state, token, logprob = self.pick(state._replace(cache=cache), self.logits(module, hidden[:, 0]))
            put = lambda x, new: jax.lax.dynamic_update_slice(x, new[:, None], (0, step))  # noqa: E731
            return step + 1, state, put(tokens, token), put(logprobs, logprob)

        before = state.count
        _, state, tokens, logprobs = jax.lax.while_loop(going, body, (jnp.int32(0), state, tokens, logprobs))
        return state, self._view(tokens, logprobs, state.count - before)

    # ---- parts ----

    def _started(self, params: Mapping[str, jax.Array], cache: Cache, start: Start, block: int) -> tuple[State, View]:
        """Prefill the starting rows and choose their first tokens; return the `State` and `View` of these rows only."""
        keys = jax.random.key_data(jax.vmap(lambda s, n: jax.random.fold_in(jax.random.key(s), n))(start.seeds, start.numbers))
        rules = Rules(start.sampling, keys, start.ends, start.limits, start.biased, start.bias)
        logits, cache = self._prefill(params, replace(cache, lengths=start.kept), start.tokens, start.counts, block)
        done = (start.counts <= 0) | (start.chosen >= start.limits)
        state = State(cache, jnp.zeros_like(start.counts), start.chosen, done, start.uses, rules)
        state, token, logprob = self.pick(state, logits)
        return state, self._view(token[:, None], logprob[:, None], state.count - start.chosen)

    def _prefill(
        self, params: Mapping[str, jax.Array], cache: Cache, tokens: Int[Array, "B T"], counts: Int[Array, " B"], block: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Prefill the first `counts` of the tokens; return the logits after the last one, and the cache.

        Tokens are processed `block` at a time, so that the attention scores of a long prompt are never held all at once.
        """
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
        return self.logits(module, final), cache

    def pick(
        self, state: State, logits: Float[Array, "B V"], mask: jax.Array | None = None
    ) -> tuple[State, Int[Array, " B"], Float[Array, " B"]]:
        """Choose the next token of each unfinished row; return the state, the token and its log-probability.

        Args:
            mask: tokens that grammars allow (`ftjax.generate.sample.restrict`); None allows all.
        """
        rules, rows, active = state.rules, jnp.arange(logits.shape[0]), ~state.done
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rules.keys), state.count)
        limited = restrict(logits, rules.biased, rules.bias, mask)
        processed = process(limited, state.uses, rules.sampling)
        token = choose(processed, rules.sampling.temperature, keys)
        judged = processed if self.of_sampler else logits
        logprob = judged[rows, token] - jax.nn.logsumexp(judged, axis=-1)
        count = state.count + active.astype(jnp.int32)
        ended = jnp.any(token[:, None] == rules.ends, axis=1) | (count >= rules.limits)
        state = state._replace(
            token=jnp.where(active, token, state.token),
            count=count,
            done=state.done | ended,
            uses=state.uses.at[rows, token].add(active.astype(jnp.int32)),
        )
        return state, token, logprob

    def logits(self, module: Any, hidden: jax.Array, adapters: jax.Array | None = None) -> jax.Array:
        one = jnp.ones((1, 1), jnp.int32)
        return constrain(module.unembed(hidden, Context(one, one, self.dtype, adapters=adapters)), "batch", "vocab")

    def _view(self, *arrays: jax.Array) -> View:
        return View(*(constrain(x, *(None,) * x.ndim) for x in arrays))
