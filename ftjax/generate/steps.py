"""Device code of the serving engine: rows join, read their prompts part by part, and decode, with keys and values in pages.

Every shape is fixed when the engine starts, so that no request compiles anything. All functions are pure;
`ftjax.generate.paged` compiles them.

Legend: B rows of the batch, R rows of a prefill step, G groups of rows, C tokens per call, n pages of a row, V vocab, E embed,
k most probable tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.generate.cache import forward
from ftjax.generate.decode import Rules, Runner, State
from ftjax.generate.sample import RowSampling
from ftjax.mesh import constrain
from ftjax.models.nn.cache import Cache, Layout
from ftjax.models.nn.paged import PagedCache


class Sizes(NamedTuple):
    """Static sizes of the engine's arrays.

    Attributes:
        rows: B.
        groups: G, the devices that rows are sharded over.
        pages: pages of a group, with page 0.
        page: tokens of a page.
        ends, biased: sizes of the rows' arrays of end ids and of biased tokens.
        tops: k.
        steps: the most tokens that a call decodes per row.
    """

    rows: int
    groups: int
    pages: int
    page: int
    ends: int
    biased: int
    tops: int
    steps: int


class Join(NamedTuple):
    """Settings of a request that takes a row; arrays have no axis of rows.

    Attributes:
        row: int32, index of the row.
        chosen: int32, tokens that the answer has already.
        uses: [V] int32, see `State`.
        seed, number: uint32, which determine the row's PRNG key.
    """

    row: jax.Array
    chosen: jax.Array
    uses: jax.Array
    seed: jax.Array
    number: jax.Array
    sampling: RowSampling
    ends: jax.Array
    limit: jax.Array
    biased: jax.Array
    bias: jax.Array


class Part(NamedTuple):
    """The next tokens of some rows' prompts.

    Attributes:
        rows: [R] int32, in the order of their groups, R / G of each; B or more marks padding.
        tokens: [R, C] int32, padded on the right.
        counts: [R] int32, number of tokens that are not padding.
        before: [R] int32, tokens of the row that are in the cache already.
        whole: [R] int32, length of the prompt.
        last: [R] bool, whether the prompt ends here, so that the answer's first token is chosen.
        table: [R, n] int32, pages of each row.
        adapters: [R] int32.
        mask: [R, words] uint32, tokens that a grammar allows (`ftjax.generate.sample.restrict`).
    """

    rows: jax.Array
    tokens: jax.Array
    counts: jax.Array
    before: jax.Array
    whole: jax.Array
    last: jax.Array
    table: jax.Array
    adapters: jax.Array
    mask: jax.Array


class Turn(NamedTuple):
    """Inputs of a decode call.

    Attributes:
        stopped: [B] bool, rows that do not decode.
        steps: int32, the most tokens per row.
        listed: bool, whether any row wants the most probable tokens.
        table, adapters, mask: as in `Part`, for all rows.
    """

    stopped: jax.Array
    steps: jax.Array
    listed: jax.Array
    table: jax.Array
    adapters: jax.Array
    mask: jax.Array


class Seen(NamedTuple):
    """What the host reads after a call.

    Attributes:
        tokens: [B, C] int32, new tokens, left-aligned.
        logprobs: [B, C] float32, their log-probabilities under the model itself.
        counts: [B] int32, number of new tokens.
        tops: [B, C, k] int32, the most probable tokens at each place.
        top_logprobs: [B, C, k] float32.
    """

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    tops: jax.Array
    top_logprobs: jax.Array


class Pooled(NamedTuple):
    """Hidden states of a prefill step, for embeddings: the last one, and the sum of all, `[R, E]` in float32."""

    last: jax.Array
    total: jax.Array


@dataclass(frozen=True, eq=False)
class Steps:
    """A model that serves, with arrays of these sizes; `by_length`: its RoPE depends on the length of the whole prompt."""

    runner: Runner
    sizes: Sizes
    by_length: bool

    def empty(self) -> State:
        """Return the state of an idle engine."""
        sizes, model, dtype = self.sizes, self.runner.model, self.runner.dtype
        rows, layout = sizes.rows, Layout(model.memories)

        def zeros(dtype, *shape: int) -> jax.Array:
            return constrain(jnp.zeros((rows, *shape), dtype), "batch", *(None,) * len(shape))

        def placed(pages: jax.Array) -> jax.Array:
            return constrain(pages, "batch", None, None, None, "kv_heads", None)

        keys, values = PagedCache.pages(layout, sizes.groups, sizes.pages, sizes.page, dtype)
        states = tuple(
            constrain(state, None, "batch", *(None,) * (state.ndim - 2)) for state in Cache.empty(layout, rows, 0, dtype).states
        )
        cache = PagedCache(
            tuple(map(placed, keys)), tuple(map(placed, values)), states, zeros(jnp.int32), layout, zeros(jnp.int32, 0),
            zeros(jnp.int32),
        )  # fmt: skip
        kinds = {"top_k": jnp.int32}
        sampling = RowSampling(**{name: zeros(kinds.get(name, jnp.float32)) for name in RowSampling._fields})
        rules = Rules(
            sampling, zeros(jnp.uint32, 2), zeros(jnp.int32, sizes.ends), zeros(jnp.int32), zeros(jnp.int32, sizes.biased),
            zeros(jnp.float32, sizes.biased),
        )  # fmt: skip
        done = constrain(jnp.ones(rows, bool), "batch")
        return State(cache, zeros(jnp.int32), zeros(jnp.int32), done, zeros(jnp.int32, model.sizes.vocab), rules)

    def join(self, state: State, new: Join) -> State:
        """Give a row to a request; it decodes once its prompt has been read."""
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(new.seed), new.number))
        rules = Rules(new.sampling, key, new.ends, new.limit, new.biased, new.bias)
        rest = state._replace(cache=None)
        values = State(None, jnp.int32(0), new.chosen, jnp.bool_(True), new.uses, rules)
        rest = jax.tree.map(lambda whole, value: whole.at[new.row].set(value), rest, values)
        return rest._replace(cache=state.cache)

    def prefill(self, params: Mapping[str, jax.Array], state: State, part: Part) -> tuple[State, Seen, Pooled]:
        """Read a part of some prompts, and choose the first token of answers whose prompt ends here."""
        runner, module = self.runner, self.runner.model.bind(params)
        cache = state.cache.of(part.rows, part.before, part.table)
        hidden, cache = forward(
            module, part.tokens, part.counts, cache, runner.dtype, whole=part.whole if self.by_length else None,
            adapters=part.adapters,
        )  # fmt: skip
        ends = jnp.maximum(part.counts - 1, 0)
        final = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
        logits = runner.logits(module, final, part.adapters)
        rest = state._replace(cache=None)
        rows = jax.tree.map(lambda whole: whole.at[part.rows].get(mode="clip"), rest)
        rows, token, logprob = runner.pick(rows._replace(done=~part.last), logits, part.mask)
        tops = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), self.sizes.tops)
        rows = rows._replace(done=rows.done | ~part.last, cache=None)
        rest = jax.tree.map(lambda whole, new: whole.at[part.rows].set(new, mode="drop"), rest, rows)
        seen = Seen(token[:, None], logprob[:, None], part.last.astype(jnp.int32), tops[1][:, None], tops[0][:, None])
        shown = (jnp.arange(hidden.shape[1]) < part.counts[:, None])[..., None]
        hidden = hidden.astype(jnp.float32)
        pooled = Pooled(final.astype(jnp.float32), jnp.sum(jnp.where(shown, hidden, 0), axis=1))
        return rest._replace(cache=state.cache.join(part.rows, cache)), *_everywhere((seen, pooled))

    def decode(self, params: Mapping[str, jax.Array], state: State, turn: Turn) -> tuple[State, Seen]:
        """Decode at most `turn.steps` more tokens per row."""
        runner, module, sizes = self.runner, self.runner.model.bind(params), self.sizes
        state = state._replace(done=state.done | turn.stopped, cache=replace(state.cache, table=turn.table))
        rows, k = sizes.rows, sizes.tops
        found = (
            jnp.zeros((rows, sizes.steps), jnp.int32), jnp.zeros((rows, sizes.steps), jnp.float32),
            jnp.zeros((rows, sizes.steps, k), jnp.int32), jnp.zeros((rows, sizes.steps, k), jnp.float32),
        )  # fmt: skip

        def going(carry: tuple) -> jax.Array:
            step, state, _ = carry
            return (step < turn.steps) & ~jnp.all(state.done)

        def most_probable(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            values, ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), k)
            return ids, values

        def body(carry: tuple) -> tuple:
            step, state, found = carry
            active = (~state.done).astype(jnp.int32)
            hidden, cache = forward(
                module, state.token[:, None], active, state.cache, runner.dtype, adapters=turn.adapters
            )  # fmt: skip
            logits = runner.logits(module, hidden[:, 0], turn.adapters)
            state, token, logprob = runner.pick(state._replace(cache=cache), logits, turn.mask)
            nothing = lambda logits: (jnp.zeros((rows, k), jnp.int32), jnp.zeros((rows, k), jnp.float32))  # noqa: E731
            new = (token, logprob, *jax.lax.cond(turn.listed, most_probable, nothing, logits))
            put = lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one[:, None], step, axis=1)  # noqa: E731
            return step + 1, state, tuple(map(put, found, new))

        before = state.count
        _, state, (tokens, logprobs, tops, top_logprobs) = jax.lax.while_loop(going, body, (jnp.int32(0), state, found))
        seen = Seen(tokens, logprobs, state.count - before, tops, top_logprobs)
        state = state._replace(cache=replace(state.cache, table=turn.table[:, :0]))
        return state, _everywhere(seen)

    def clear(self, state: State, pages: jax.Array) -> State:
        """Fill pages `[G, ...]` with zeros; indices past the end are dropped."""
        return state._replace(cache=state.cache.cleared(pages))


def _everywhere(arrays):
    """Return the arrays replicated on every device, for the host."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), arrays)
