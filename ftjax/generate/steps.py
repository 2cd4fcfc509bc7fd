"""Device code of the engine: rows read their prompts part by part, and decode, with keys and values in pages.

All shapes follow from `Sizes` and from those of a few inputs. All functions are pure; `ftjax.generate.engine` compiles them.

Legend: B rows of the batch, R rows of a call, G groups of rows, C tokens per call, n pages of a row, V vocab, E embed,
k most probable tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ftjax.generate.cache import forward
from ftjax.generate.decode import Rules, Runner, State, by_row, by_whole_rows
from ftjax.generate.sample import RowSampling
from ftjax.mesh import axis_of_samples, constrain, fitting
from ftjax.models.nn.attention_paged import PageKernel
from ftjax.models.nn.cache import Cache, Layout
from ftjax.models.nn.context import Context
from ftjax.models.nn.paged import PagedCache

AT_A_TIME = 16  # tokens of a prompt whose logits exist at the same time


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


class Asked(NamedTuple):
    """Settings of the requests whose prompts are read.

    Attributes:
        chosen: [R] int32, tokens that the answer has already: a row whose text is read again continues its answer.
        uses: [R, V] int32, see `State`.
        seeds, numbers: [R] uint32, which determine each row's PRNG key.
        sampling, ends, limits, biased, bias: see `Rules`.
    """

    chosen: jax.Array
    uses: jax.Array
    seeds: jax.Array
    numbers: jax.Array
    sampling: RowSampling
    ends: jax.Array
    limits: jax.Array
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
        asked: what the first token is chosen by.
        mask: [R, words] uint32, tokens that a grammar allows (`ftjax.generate.sample.restrict`), or None without grammars.
        follows: [R, C] int32, the token after each of `tokens`, whose log-probability may be asked for; or None.
        scored: bool, whether any row asks for it; or None.
    """

    rows: jax.Array
    tokens: jax.Array
    counts: jax.Array
    before: jax.Array
    whole: jax.Array
    last: jax.Array
    table: jax.Array
    adapters: jax.Array
    asked: Asked
    mask: jax.Array | None
    follows: jax.Array | None
    scored: jax.Array | None


class Turn(NamedTuple):
    """Inputs of a decode call for R rows: all B of them, or a few.

    Attributes:
        rows: [R] int32, the few; B or more marks padding. None: all.
        stopped: [R] bool, rows that do not decode.
        steps: int32, the most tokens per row.
        listed: bool, whether any row wants the most probable tokens.
        table, adapters, mask: as in `Part`, for these rows.
    """

    rows: jax.Array | None
    stopped: jax.Array
    steps: jax.Array
    listed: jax.Array
    table: jax.Array
    adapters: jax.Array
    mask: jax.Array | None


class Seen(NamedTuple):
    """What the host reads after a call.

    Attributes:
        tokens: [R, C] int32, new tokens, left-aligned.
        logprobs: [R, C] float32, their log-probabilities under the model itself.
        counts: [R] int32, number of new tokens.
        tops: [R, C, k] int32, the most probable tokens at each place.
        top_logprobs: [R, C, k] float32.
    """

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    tops: jax.Array
    top_logprobs: jax.Array


class Likelihoods(NamedTuple):
    """Of each token of a prompt's part, what the model expected after it.

    Attributes:
        logprobs: [R, C] float32, of `Part.follows`.
        tops: [R, C, k] int32, the most probable tokens.
        top_logprobs: [R, C, k] float32.
    """

    logprobs: jax.Array
    tops: jax.Array
    top_logprobs: jax.Array


class Pooled(NamedTuple):
    """Hidden states of a prefill step, for embeddings: the last one, and the sum of all, `[R, E]` in float32."""

    last: jax.Array
    total: jax.Array


@dataclass(frozen=True, eq=False)
class Steps:
    """A model that generates, with arrays of these sizes.

    Attributes:
        by_length: whether its RoPE depends on the length of the whole prompt.
        kernel: reads pages on these devices; None: attention gathers them.
    """

    runner: Runner
    sizes: Sizes
    by_length: bool
    kernel: PageKernel | None

    def empty(self) -> State:
        """Return the state of an idle engine."""
        sizes, model, dtype = self.sizes, self.runner.model, self.runner.dtype
        rows, layout = sizes.rows, Layout(model.memories)

        def zeros(dtype, *shape: int) -> jax.Array:
            return jnp.zeros((rows, *shape), dtype)

        keys, values = PagedCache.pages(layout, sizes.groups, sizes.pages, sizes.page, dtype, self.kernel)
        states = Cache.empty(layout, rows, 0, dtype).states
        table, counts = zeros(jnp.int32, 0), zeros(jnp.int32)
        cache = PagedCache(keys, values, states, zeros(jnp.int32), layout, table, counts, self.kernel)
        kinds = {"top_k": jnp.int32}
        sampling = RowSampling(**{name: zeros(kinds.get(name, jnp.float32)) for name in RowSampling._fields})
        rules = Rules(
            sampling, zeros(jnp.uint32, 2), zeros(jnp.int32, sizes.ends), zeros(jnp.int32), zeros(jnp.int32, sizes.biased),
            zeros(jnp.float32, sizes.biased),
        )  # fmt: skip
        token, count, uses = zeros(jnp.int32), zeros(jnp.int32), zeros(jnp.int32, model.sizes.vocab)
        return State(cache, token, count, jnp.ones(rows, bool), uses, rules)

    def shardings(self, mesh: Mesh) -> State:
        """Return where the arrays of the state are: rows and their pages along the batch axes, heads along `tensor`."""
        state = jax.eval_shape(self.empty)

        def placed(leaf: jax.ShapeDtypeStruct, *axes: str | None) -> NamedSharding:
            axes = (*axes, *(None,) * (leaf.ndim - len(axes)))
            pairs = zip(axes, leaf.shape, strict=True)
            return NamedSharding(mesh, PartitionSpec(*(axis and fitting(mesh, axis, size) for axis, size in pairs)))

        found = jax.tree.map(lambda leaf: placed(leaf, "batch"), state)
        keys, values = jax.tree.map(
            lambda leaf: placed(leaf, "batch", None, None, None, "kv_heads"), (state.cache.keys, state.cache.values)
        )
        states = tuple(placed(leaf, None, "batch") for leaf in state.cache.states)
        cache = replace(found.cache, keys=keys, values=values, states=states)
        return found._replace(cache=cache, uses=placed(state.uses, axis_of_samples(mesh, self.sizes.rows)))

    def prefill(
        self, params: Mapping[str, jax.Array], state: State | None, part: Part
    ) -> tuple[State, Seen, Pooled, Likelihoods | None]:
        """Read a part of some prompts, and choose the first token of answers whose prompt ends here.

        Args:
            state: None begins with an empty one.
        """
        runner, module = self.runner, self.runner.model.bind(params)
        state = self.empty() if state is None else state
        cache = state.cache.of(part.rows, part.before, part.table)
        hidden, cache = forward(
            module, part.tokens, part.counts, cache, runner.dtype, whole=part.whole if self.by_length else None,
            adapters=part.adapters,
        )  # fmt: skip
        ends = jnp.maximum(part.counts - 1, 0)
        final = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
        logits = runner.logits(module, final, part.adapters)
        asked = part.asked
        folded = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(asked.seeds, asked.numbers)
        rules = Rules(asked.sampling, jax.random.key_data(folded), asked.ends, asked.limits, asked.biased, asked.bias)
        rows = State(None, jnp.zeros_like(part.counts), asked.chosen, ~part.last, asked.uses, rules)
        rows, token, logprob = runner.pick(rows, logits, part.mask)
        ids, values = self._most_probable(logits)
        seen = Seen(token[:, None], logprob[:, None], part.last.astype(jnp.int32), ids[:, None], values[:, None])
        expected = None if part.follows is None else self._expected(module, hidden, part)
        shown = (jnp.arange(hidden.shape[1]) < part.counts[:, None])[..., None]
        hidden = hidden.astype(jnp.float32)
        pooled = Pooled(final.astype(jnp.float32), jnp.sum(jnp.where(shown, hidden, 0), axis=1))
        return _join(state, part.rows, rows._replace(cache=cache)), *_everywhere((seen, pooled, expected))

    def decode(self, params: Mapping[str, jax.Array], state: State, turn: Turn) -> tuple[State, Seen]:
        """Decode at most `turn.steps` more tokens per row."""
        runner, module, sizes, whole = self.runner, self.runner.model.bind(params), self.sizes, state
        if turn.rows is None:
            state = state._replace(cache=replace(state.cache, table=turn.table))
        else:
            state = _of(state, turn.rows, turn.table)
        state = state._replace(done=state.done | turn.stopped)
        rows, k = turn.stopped.shape[0], sizes.tops
        found = (
            jnp.zeros((rows, sizes.steps), jnp.int32), jnp.zeros((rows, sizes.steps), jnp.float32),
            jnp.zeros((rows, sizes.steps, k), jnp.int32), jnp.zeros((rows, sizes.steps, k), jnp.float32),
        )  # fmt: skip

        def going(carry: tuple) -> jax.Array:
            step, state, _ = carry
            return (step < turn.steps) & ~jnp.all(state.done)

        def body(carry: tuple) -> tuple:
            step, state, found = carry
            active = (~state.done).astype(jnp.int32)
            hidden, cache = forward(
                module, state.token[:, None], active, state.cache, runner.dtype, adapters=turn.adapters
            )  # fmt: skip
            logits = runner.logits(module, hidden[:, 0], turn.adapters)
            state, token, logprob = runner.pick(state._replace(cache=cache), logits, turn.mask)
            new = (token, logprob, *jax.lax.cond(turn.listed, self._most_probable, self._nothing, logits))
            put = lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one[:, None], step, axis=1)  # noqa: E731
            return step + 1, state, tuple(map(put, found, new))

        before = state.count
        _, state, (tokens, logprobs, tops, top_logprobs) = jax.lax.while_loop(going, body, (jnp.int32(0), state, found))
        seen = Seen(tokens, logprobs, state.count - before, tops, top_logprobs)
        if turn.rows is not None:
            return _join(whole, turn.rows, state), _everywhere(seen)
        return state._replace(cache=replace(state.cache, table=turn.table[:, :0])), _everywhere(seen)

    def _expected(self, module: Any, hidden: Float[Array, "R C E"], part: Part) -> Likelihoods:
        """Return what the model expected after each token, if a row asks for it; a few tokens at a time have logits."""
        rows, length, k = *part.follows.shape, self.sizes.tops
        block = math.gcd(length, AT_A_TIME)
        context = Context(jnp.ones((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32), self.runner.dtype, adapters=part.adapters)

        def some(at: jax.Array) -> Likelihoods:
            here, follows = (jax.lax.dynamic_slice_in_dim(x, at * block, block, axis=1) for x in (hidden, part.follows))
            logits = constrain(module.unembed(here, context), "batch", None, "vocab")
            found = by_whole_rows(expected, logits.reshape(rows * block, -1), follows.reshape(rows * block))
            return Likelihoods(*(x.reshape(rows, block, *x.shape[1:]) for x in by_row(found)))

        def expected(logits: jax.Array, follows: jax.Array) -> tuple[jax.Array, ...]:
            logprobs = jax.nn.log_softmax(logits, axis=-1)
            values, ids = jax.lax.top_k(logprobs, k)  # of one array with those of the tokens, so that equal ones are equal
            return jnp.take_along_axis(logprobs, follows[:, None], axis=-1)[:, 0], ids, values

        def all_() -> Likelihoods:
            found = jax.lax.map(some, jnp.arange(length // block))  # [C / block, R, block, ...]
            return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, length, *x.shape[3:]), found)

        def nothing() -> Likelihoods:
            whole = (rows, length)
            return Likelihoods(jnp.zeros(whole), jnp.zeros((*whole, k), jnp.int32), jnp.zeros((*whole, k)))

        return jax.lax.cond(part.scored, all_, nothing)

    def _most_probable(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `(ids, log-probabilities)` of the k most probable tokens."""
        if not self.sizes.tops:
            return self._nothing(logits)
        values, ids = by_whole_rows(lambda x: jax.lax.top_k(jax.nn.log_softmax(x, axis=-1), self.sizes.tops), logits)
        return by_row((ids, values))

    def _nothing(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (logits.shape[0], self.sizes.tops)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    def clear(self, state: State, pages: jax.Array) -> State:
        """Fill pages `[G, ...]` with zeros; indices past the end are dropped."""
        return state._replace(cache=state.cache.cleared(pages))


def _of(state: State, rows: Int[Array, " R"], table: Int[Array, "R _"]) -> State:
    """Return the state of these rows, whose pages are in `table`."""
    taken = jax.tree.map(lambda whole: whole.at[rows].get(mode="clip"), state._replace(cache=None))
    lengths = state.cache.lengths.at[rows].get(mode="clip")
    return taken._replace(cache=state.cache.of(rows, lengths, table).expecting(jnp.zeros_like(lengths)))


def _join(state: State, rows: Int[Array, " R"], part: State) -> State:
    """Return the state after these rows of it have changed; indices past the end are dropped."""
    put = lambda whole, new: whole.at[rows].set(new, mode="drop")  # noqa: E731
    rest = jax.tree.map(put, state._replace(cache=None), part._replace(cache=None))
    return rest._replace(cache=state.cache.join(rows, part.cache))


def _everywhere(arrays):
    """Return the arrays replicated on every device, for the host."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), arrays)
