"""`PagedBatch`: the programs and the device state of the serving engine, with every shape fixed at the start."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from ftjax.errors import UserError
from ftjax.generate.answer import Answer
from ftjax.generate.decode import Runner
from ftjax.generate.engine import Engine
from ftjax.generate.sample import row_sampling, uses_of
from ftjax.generate.steps import Join, Part, Pooled, Seen, Sizes, Steps, Turn
from ftjax.mesh import parts, spec
from ftjax.models.model import Model
from ftjax.models.nn.cache import Layout

TOPS = 20  # most probable tokens that a request may ask for, as in OpenAI's API
BIASED = 304  # tokens that a request may bias; OpenAI's API takes 300
ENDS = 32  # ids that end an answer on the device; the host knows the others too
SMALLEST = 512  # tokens of the shortest table of pages
GROWTH = 4  # each table of pages is so many times longer than the one before
EVERY = np.uint32(2**32 - 1)  # a word of a mask that allows all tokens


@dataclass(frozen=True)
class Room:
    """How much the engine holds; arrays of these sizes are made when it starts.

    Attributes:
        rows: requests that run at the same time; a multiple of the devices that rows are sharded over.
        context: the most tokens of a prompt and its answer.
        pages: pages of keys and values on each of these devices, all rows together.
        page: tokens of a page.
        chunk: tokens of a long prompt per step.
        steps: the most tokens per row and decode call.
    """

    rows: int
    context: int
    pages: int
    page: int = 32
    chunk: int = 256
    steps: int = 4

    @classmethod
    def fit(cls, engine: Engine, *, rows: int, context: int, memory: int | None = None, page: int = 32, **rest: int) -> "Room":
        """Return room for this many rows of this length, or for as many pages as `memory` bytes per device hold.

        Raises UserError if a single text of that length does not fit.
        """
        rows = math.ceil(rows / engine.shards) * engine.shards
        longest = math.ceil(context / page)
        most = longest * rows // engine.shards
        cost = page_bytes(engine.model, page, engine.dtype) // parts(engine.mesh.shape, "kv_heads")
        if memory is None or not cost:
            return cls(rows, context, most, page, **rest)
        pages = min(most, memory // cost)
        if pages < longest:
            raise UserError(
                f"the cache of one text of {context} tokens takes {longest * cost / 1e9:.2f} GB and {memory / 1e9:.2f} GB are "
                f"free for it; choose a context of at most {pages * page} tokens, or more memory for the cache"
            )
        return cls(rows, context, pages, page, **rest)


def page_bytes(model: Model, page: int, dtype: Any) -> int:
    """Return the bytes of a page's keys and values in all layers."""
    layout = Layout(model.memories)
    sizes = (layout.size(one) * one.kv_heads * (one.key_dim + one.value_dim) for one in layout.keys_values)
    return page * sum(sizes) * np.dtype(dtype).itemsize


class Reading(NamedTuple):
    """A row whose prompt is read on: these tokens, after the first `before` tokens of its `whole` prompt."""

    row: int
    tokens: Sequence[int]
    before: int
    whole: int
    last: bool


class PagedBatch:
    """Rows that join and leave between any two tokens, with keys and values in pages. The caller hands out rows and pages.

    Why pages: the room that a text needs is known only when it ends. Rows of fixed slots would hold the longest text each, and
    a beginning that several texts share would be there once for each. The price is that attention reads its keys through a
    table; on every device this is one gather of what attention reads anyway.

    Attributes:
        tables: for each row, its pages in the order of its text; the caller changes them.
        adapters: for each row, the number of its adapter; 0 is none.
    """

    def __init__(self, engine: Engine, params: Mapping[str, jax.Array], room: Room):
        assert room.rows % engine.shards == 0, f"{room.rows} rows on {engine.shards} shards"
        self.engine, self.params, self.room = engine, params, room
        vocab = engine.model.sizes.vocab
        self.sizes = Sizes(
            room.rows, engine.shards, room.pages + 1, room.page, ENDS, BIASED, min(TOPS, vocab), room.steps
        )  # fmt: skip
        self.tables: list[list[int]] = [[] for _ in range(room.rows)]
        self.adapters = [0] * room.rows
        steps = Steps(Runner(engine.model, engine.dtype), self.sizes, engine.whole_prompts)
        with jax.set_mesh(engine.mesh):
            self._state = jax.jit(steps.empty)()
            where = jax.tree.map(lambda leaf: leaf.sharding, self._state)
            everywhere = NamedSharding(engine.mesh, spec(()))
            self._join = jax.jit(steps.join, donate_argnums=0, out_shardings=where)
            self._prefill = jax.jit(steps.prefill, donate_argnums=1, out_shardings=(where, everywhere, everywhere))
            self._decode = jax.jit(steps.decode, donate_argnums=1, out_shardings=(where, everywhere))
            self._clear = jax.jit(steps.clear, donate_argnums=0, out_shardings=where)
        self.words = math.ceil(vocab / 32)
        self._all = {rows: self._shard(np.full((rows, self.words), EVERY)) for rows in {room.rows, *dict(self.shapes)}}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`(rows, tokens)` of the prefill programs: several short prompts, or a part of a long one per shard."""
        shards, chunk = self.engine.shards, min(self.room.chunk, self.room.context)
        small = max(1, chunk // 8)
        several = min(4 * shards, self.room.rows)
        return [(several, small), (shards, chunk)] if several > shards else [(shards, small), (shards, chunk)]

    @property
    def widths(self) -> list[int]:
        """Pages of the tables that programs are compiled for."""
        most, found = math.ceil(self.room.context / self.room.page), []
        width = math.ceil(SMALLEST / self.room.page)
        while width < most:
            found.append(width)
            width *= GROWTH
        return [*found, most]

    def group(self, row: int) -> int:
        """Return the group of a row, whose pages it uses."""
        return row * self.sizes.groups // self.sizes.rows

    def warm_up(self) -> None:
        """Run every program once, without effect: no request compiles anything after it."""
        answer = Answer([0], 1, frozenset(), None, None)
        self.join(0, answer)
        for shape in self.shapes:
            for width in self.widths:
                self._run_prefill([], {}, shape, width)
        for width in self.widths:
            self._run_decode([], 1, False, {}, width)
        self.clear(0, [])

    def join(self, row: int, answer: Answer) -> None:
        """Give a row to an answer; `read` its prompt next."""
        sizes, vocab = self.sizes, self.engine.model.sizes.vocab
        ends, biased = np.full(sizes.ends, -1, np.int32), np.full(sizes.biased, vocab, np.int32)
        bias = np.zeros(sizes.biased, np.float32)
        few = sorted(answer.ends)[: sizes.ends]  # `Answer` knows all of them, and ends by the others too
        ends[: len(few)], biased[: len(answer.bias)] = few, list(answer.bias)
        bias[: len(answer.bias)] = list(answer.bias.values())
        new = Join(
            np.int32(row), np.int32(len(answer.tokens)), uses_of(answer.prompt, answer.tokens, vocab),
            np.uint32(answer.seed % 2**32), np.uint32(answer.number % 2**32),
            jax.tree.map(lambda x: x[0], row_sampling([answer.sampling])), ends, np.int32(answer.limit), biased, bias,
        )  # fmt: skip
        with jax.set_mesh(self.engine.mesh):
            self._state = self._join(self._state, jax.tree.map(self.engine.replicate, jax.tree.map(np.asarray, new)))

    def read(self, waiting: Sequence[Reading], masks: Mapping[int, np.ndarray]) -> tuple[dict[int, Reading], Seen, Pooled]:
        """Read the next part of some of these rows' prompts; return `({index in the results: what was read}, results)`.

        Each reading holds at least what is left of the prompt, or a chunk of it, and is cut to the program's size.

        Args:
            masks: by row, the tokens that a grammar allows first.
        """
        shape = max(self.shapes, key=lambda shape: self._useful(waiting, shape))
        chosen = [
            one if len(one.tokens) <= shape[1] else one._replace(tokens=one.tokens[: shape[1]], last=False)
            for one in self._fitting(waiting, shape[0])
        ]
        return self._run_prefill(chosen, masks, shape, self._width([one.row for one in chosen]))

    def decode(self, rows: Sequence[int], steps: int, listed: bool, masks: Mapping[int, np.ndarray]) -> Seen:
        """Decode at most `steps` more tokens of these rows, whose pages have room for them.

        Args:
            listed: whether to return the most probable tokens too.
            masks: by row, the tokens that a grammar allows next; `steps` is then 1.
        """
        return self._run_decode(rows, steps, listed, masks, self._width(rows))

    def clear(self, group: int, pages: Sequence[int]) -> None:
        """Fill pages with zeros."""
        size = math.ceil(self.room.context / self.room.page)
        for at in range(0, max(1, len(pages)), size):
            some = np.full((self.sizes.groups, size), self.sizes.pages, np.int32)
            some[group, : len(pages[at : at + size])] = pages[at : at + size]
            with jax.set_mesh(self.engine.mesh):
                self._state = self._clear(self._state, self._shard(some))

    # ---- arrays ----

    def _useful(self, waiting: Sequence[Reading], shape: tuple[int, int]) -> float:
        """Return the tokens that a prefill program would read of those that wait, for each token that it computes."""
        found = sum(min(len(one.tokens), shape[1]) for one in self._fitting(waiting, shape[0]))
        return found / (shape[0] * shape[1])

    def _fitting(self, waiting: Sequence[Reading], rows: int) -> list[Reading]:
        """Return the first of these that fit into a program of so many rows, of which each group has its own."""
        left = [rows // self.sizes.groups] * self.sizes.groups
        found = []
        for one in waiting:
            group = self.group(one.row)
            if left[group]:
                left[group] -= 1
                found.append(one)
        return found

    def _width(self, rows: Sequence[int]) -> int:
        most = max((len(self.tables[row]) for row in rows), default=0)
        return next(width for width in self.widths if width >= most)

    def _table(self, rows: Sequence[int], places: Sequence[int], size: int, width: int) -> np.ndarray:
        table = np.zeros((size, width), np.int32)
        for row, at in zip(rows, places, strict=True):
            table[at, : len(self.tables[row])] = self.tables[row]
        return table

    def _mask(self, masks: Mapping[int, np.ndarray], places: Mapping[int, int], size: int) -> jax.Array:
        if not any(row in masks for row in places):
            return self._all[size]
        words = np.full((size, self.words), EVERY)
        for row, at in places.items():
            if row in masks:
                words[at] = masks[row]
        return self._shard(words)

    def _run_prefill(
        self, chosen: Sequence[Reading], masks: Mapping[int, np.ndarray], shape: tuple[int, int], width: int
    ) -> tuple[dict[int, Reading], Seen, Pooled]:
        size, length = shape
        each = size // self.sizes.groups
        taken = [0] * self.sizes.groups
        found: dict[int, Reading] = {}
        rows, numbers = np.full(size, self.sizes.rows, np.int32), np.zeros((4, size), np.int32)
        tokens, last = np.zeros((size, length), np.int32), np.zeros(size, bool)
        for one in chosen:
            group = self.group(one.row)
            at = group * each + taken[group]
            taken[group] += 1
            found[at] = one
            rows[at], tokens[at, : len(one.tokens)], last[at] = one.row, one.tokens, one.last
            numbers[:, at] = len(one.tokens), one.before, one.whole, self.adapters[one.row]
        counts, before, whole, adapters = numbers
        places = {one.row: at for at, one in found.items()}
        table = self._table(list(places), list(places.values()), size, width)
        part = Part(rows, tokens, counts, before, whole, last, table, adapters, None)
        part = jax.tree.map(self._shard, part)._replace(mask=self._mask(masks, places, size))
        with jax.set_mesh(self.engine.mesh):
            self._state, seen, pooled = self._prefill(self.params, self._state, part)
        return found, seen, pooled

    def _run_decode(self, rows: Sequence[int], steps: int, listed: bool, masks: Mapping[int, np.ndarray], width: int) -> Seen:
        size, replicate = self.sizes.rows, self.engine.replicate
        stopped = np.ones(size, bool)
        stopped[list(rows)] = False
        turn = Turn(
            self._shard(stopped), replicate(np.int32(min(steps, self.sizes.steps))), replicate(np.bool_(listed)),
            self._shard(self._table(rows, rows, size, width)), self._shard(np.asarray(self.adapters, np.int32)),
            self._mask(masks, dict(zip(rows, rows, strict=True)), size),
        )  # fmt: skip
        with jax.set_mesh(self.engine.mesh):
            self._state, seen = self._decode(self.params, self._state, turn)
        return seen

    def _shard(self, rows: np.ndarray) -> jax.Array:
        return self.engine.shard_rows(rows)
