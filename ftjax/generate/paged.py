"""`PagedBatch`: the rows and pages of the engine on the devices, all of whose shapes `Room` says.

The server makes one and warms it up, `Generator` makes one for each call (`ftjax.generate.offline`), and a conversation keeps
one from turn to turn. The programs are those of `Engine`, compiled on first use or by `warm_up`. The host decides which rows
run (`ftjax.generate.scheduler`), by nothing but the requests, so that several processes decide alike.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from ftjax.errors import UserError
from ftjax.generate.answer import Answer
from ftjax.generate.decode import State
from ftjax.generate.engine import Engine
from ftjax.generate.sample import Sampling, row_sampling, uses_of
from ftjax.generate.separate import Layers
from ftjax.generate.steps import Asked, Likelihoods, Part, Pooled, Seen, Sizes, Turn
from ftjax.long_steps import KEPT, long_step, steps_go_on
from ftjax.mesh import fitting, parts
from ftjax.models.nn.cache import Layout
from ftjax.models.nn.paged import PagedCache

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
        reads: `(rows, tokens)` of the prefill programs; empty for several short prompts, or a part of a long one per shard.
        grows: whether there are programs for shorter tables of pages, too, where attention reads whole tables.
        few: rows of smaller decode programs, in order, which run when no more rows do. There is one group of rows then.
        ends, biased: the most ids that end an answer on the device, and the most tokens that a request may bias.
        tops: the most probable tokens that a request may ask for.
        grammars: whether requests may have one.
        scores: whether requests may ask for the log-probabilities of their prompts.
    """

    rows: int
    context: int
    pages: int
    page: int = 32
    chunk: int = 256
    steps: int = 4
    reads: tuple[tuple[int, int], ...] = ()
    grows: bool = True
    few: tuple[int, ...] = ()
    ends: int = ENDS
    biased: int = BIASED
    tops: int = TOPS
    grammars: bool = True
    scores: bool = True

    @classmethod
    def fit(cls, engine: Engine, *, rows: int, context: int, memory: int | None = None, page: int = 32, **rest: int) -> "Room":
        """Return room for this many rows of this length, or for as many pages as `memory` bytes per device hold.

        Raises UserError if a single text of that length does not fit.
        """
        rows = math.ceil(rows / engine.shards) * engine.shards
        longest = math.ceil(context / page)
        most = longest * rows // engine.shards
        cost = page_bytes(engine, page)
        if memory is None or not cost:
            return cls(rows, context, most, page, **rest)
        pages = min(most, memory // cost)
        if pages < longest:
            raise UserError(
                f"the cache of one text of {context} tokens takes {longest * cost / 1e9:.2f} GB and {memory / 1e9:.2f} GB are "
                f"free for it; choose a context of at most {pages * page} tokens, or more memory for the cache"
            )
        return cls(rows, context, pages, page, **rest)


def page_bytes(engine: Engine, page: int) -> int:
    """Return the bytes of a page's keys and values in all layers, on each device that has the page."""
    layout = Layout(engine.model.memories)
    pages = jax.eval_shape(lambda: PagedCache.pages(layout, 1, 1, page, engine.dtype, engine.kernel))

    def size(slots: jax.ShapeDtypeStruct) -> int:  # heads that do not divide are on every device, as in `Steps.shardings`
        heads = fitting(engine.mesh, "kv_heads", slots.shape[4])
        return math.prod(slots.shape) // (parts(engine.mesh.shape, "kv_heads") if heads else 1)

    return sum(map(size, jax.tree.leaves(pages))) * np.dtype(engine.dtype).itemsize


class Reading(NamedTuple):
    """A row whose prompt is read on: these tokens, after the first `before` tokens of its `whole` prompt.

    Attributes:
        last: the prompt ends here, so that the answer's first token is chosen.
        follows: the token after each of these, if their log-probabilities are asked for; otherwise empty.
    """

    row: int
    tokens: Sequence[int]
    before: int
    whole: int
    last: bool
    follows: Sequence[int] = ()

    def cut(self, length: int) -> "Reading":
        """Return the first tokens of this, of which there are more."""
        return self._replace(tokens=self.tokens[:length], last=False, follows=self.follows[:length])


class Read(NamedTuple):
    """What a call that reads prompts has read, and what came of it.

    Attributes:
        found: by index in the results, what was read.
        expected: None if the room has no `scores`.
    """

    found: dict[int, Reading]
    seen: Seen
    pooled: Pooled
    expected: Likelihoods | None


class PagedBatch:
    """Rows that join and leave between any two tokens, with keys and values in pages. The caller hands out rows and pages.

    Why pages: the room that a text needs is known only when it ends. Rows of fixed slots would hold the longest text each, and
    a beginning that several texts share would be there once for each. The price is that attention reads its keys through a
    table; on every device this is one gather of what attention reads anyway.

    Attributes:
        answers: the answer of each row, or None; the caller sets them before it reads their prompts.
        tables: for each row, its pages in the order of its text; the caller changes them.
        adapters: for each row, the number of its adapter; 0 is none.
    """

    def __init__(self, engine: Engine, params: Mapping[str, jax.Array], room: Room):
        assert room.rows % engine.shards == 0, f"{room.rows} rows on {engine.shards} shards"
        self.engine, self.params, self.room = engine, params, room
        self._layers = Layers(engine.model, params, engine.mesh)
        vocab = engine.model.sizes.vocab
        self.sizes = Sizes(
            room.rows, engine.shards, room.pages + 1, room.page, room.ends, room.biased, min(room.tops, vocab), room.steps
        )  # fmt: skip
        self.tables: list[list[int]] = [[] for _ in range(room.rows)]
        self.adapters = [0] * room.rows
        self.answers: list[Answer | None] = [None] * room.rows
        self._programs = engine.programs(self.sizes)
        self._state: State | None = None  # the first read begins with an empty one
        self.words = math.ceil(vocab / 32)
        self._called: set[tuple[Any, ...]] = set()  # programs that have run
        self._all: dict[int, jax.Array] = {}  # by number of rows, masks that allow all tokens

    @property
    def decode_params(self) -> dict[str, Any]:
        """The parameters as the decode program takes them."""
        return {**self.params, **self._layers.of(self.params)}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`(rows, tokens)` of the prefill programs."""
        if self.room.reads:
            return list(self.room.reads)
        shards, chunk = self.engine.shards, min(self.room.chunk, self.room.context)
        small = max(1, chunk // 8)
        several = min(4 * shards, self.room.rows)
        return [(several, small), (shards, chunk)] if several > shards else [(shards, small), (shards, chunk)]

    @property
    def widths(self) -> list[int]:
        """Pages of the tables that programs are compiled for."""
        most, found = math.ceil(self.room.context / self.room.page), []
        grows = self.room.grows and not self.engine.on_one_cpu  # there, attention reads as far as the texts go
        width = math.ceil(SMALLEST / self.room.page) if grows else most
        while width < most:
            found.append(width)
            width *= GROWTH
        return [*found, most]

    def group(self, row: int) -> int:
        """Return the group of a row, whose pages it uses."""
        return row * self.sizes.groups // self.sizes.rows

    def open(self) -> None:
        """Make the state by a program of its own, where several calls will read prompts and one program should do for them."""
        if self._state is None:
            with jax.set_mesh(self.engine.mesh):
                self._state = self._programs.empty()

    def warm_up(self) -> None:
        """Run every program once, without effect: no request compiles anything after it."""
        self.open()
        counts = (*self.room.few, self.sizes.rows)
        with long_step("compiling the programs", (len(self.shapes) + len(counts)) * len(self.widths), "programs") as step:
            for shape in self.shapes:
                for width in self.widths:
                    self._run_prefill([], {}, shape, width)
                    step.advance()
            for width in self.widths:
                for size in counts:
                    self._run_decode([], 1, False, {}, width, size)
                    step.advance()
        self.clear(0, [])

    def read(self, waiting: Sequence[Reading], masks: Mapping[int, np.ndarray]) -> Read:
        """Read the next part of some of these rows' prompts.

        Each reading holds at least what is left of the prompt, or a chunk of it, and is cut to the program's size.

        Args:
            masks: by row, the tokens that a grammar allows first.
        """
        shape = max(self.shapes, key=lambda shape: (self._useful(waiting, shape), math.prod(shape)))
        chosen = [one if len(one.tokens) <= shape[1] else one.cut(shape[1]) for one in self._fitting(waiting, shape[0])]
        return self._run_prefill(chosen, masks, shape, self._width([one.row for one in chosen]))

    def decode(
        self, rows: Sequence[int], steps: int, listed: bool, masks: Mapping[int, np.ndarray]
    ) -> tuple[dict[int, int], Seen]:
        """Decode at most `steps` more tokens of these rows, whose pages have room for them.

        Returns `({row: its index in the results}, results)`.

        Args:
            listed: whether to return the most probable tokens too.
            masks: by row, the tokens that a grammar allows next; `steps` is then 1.
        """
        size = next((few for few in self.room.few if len(rows) <= few), self.sizes.rows)
        return self._run_decode(rows, steps, listed, masks, self._width(rows), size)

    def clear(self, group: int, pages: Sequence[int]) -> None:
        """Fill pages with zeros."""
        size = math.ceil(self.room.context / self.room.page)
        for at in range(0, max(1, len(pages)), size):
            some = np.full((self.sizes.groups, size), self.sizes.pages, np.int32)
            some[group, : len(pages[at : at + size])] = pages[at : at + size]
            with jax.set_mesh(self.engine.mesh):
                self._state = self._programs.clear(self._state, self._shard(some))

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

    def _asked(self, places: Mapping[int, int], size: int) -> Asked:
        """Return the settings of these rows' requests, in an array of so many rows."""
        room, vocab = self.room, self.engine.model.sizes.vocab
        uses, numbers = np.zeros((size, vocab), np.int32), np.zeros((4, size), np.int64)
        ends, biased = np.full((size, room.ends), -1, np.int32), np.full((size, room.biased), vocab, np.int32)
        bias, sampling = np.zeros((size, room.biased), np.float32), [Sampling()] * size
        for row, at in places.items():
            answer = self.answers[row]
            few = sorted(answer.ends)[: room.ends]  # `Answer` knows all of them, and ends by the others too
            uses[at], ends[at, : len(few)] = uses_of(answer.prompt, answer.tokens, vocab), few
            biased[at, : len(answer.bias)], bias[at, : len(answer.bias)] = list(answer.bias), list(answer.bias.values())
            numbers[:, at] = len(answer.tokens), answer.seed % 2**32, answer.number % 2**32, answer.limit
            sampling[at] = answer.sampling
        chosen, seeds, ids, limits = numbers
        return Asked(
            chosen.astype(np.int32), uses, seeds.astype(np.uint32), ids.astype(np.uint32), row_sampling(sampling), ends,
            limits.astype(np.int32), biased, bias,
        )  # fmt: skip

    def _mask(self, masks: Mapping[int, np.ndarray], places: Mapping[int, int], size: int) -> jax.Array | None:
        if not self.room.grammars:
            return None
        if not any(row in masks for row in places):
            if size not in self._all:
                self._all[size] = self._shard(np.full((size, self.words), EVERY))
            return self._all[size]
        words = np.full((size, self.words), EVERY)
        for row, at in places.items():
            if row in masks:
                words[at] = masks[row]
        return self._shard(words)

    @contextmanager
    def _compiling(self, *program: Any) -> Iterator[None]:
        """Say that a program is compiled, on its first call, where it takes long."""
        if program in self._called:
            yield
            return
        with nullcontext() if steps_go_on() else long_step("compiling", hint=KEPT):
            yield
        self._called.add(program)

    def _run_prefill(
        self, chosen: Sequence[Reading], masks: Mapping[int, np.ndarray], shape: tuple[int, int], width: int
    ) -> Read:
        found, part = self.part(chosen, masks, shape, width)
        with jax.set_mesh(self.engine.mesh), self._compiling("prefill", shape, width):
            self._state, *results = self._programs.prefill(self.params, self._state, part)
        return Read(found, *results)

    def part(
        self, chosen: Sequence[Reading], masks: Mapping[int, np.ndarray], shape: tuple[int, int], width: int
    ) -> tuple[dict[int, Reading], Part]:
        """Return `({index in the part: what is read}, the inputs of a prefill program of this shape)`."""
        size, length = shape
        each = size // self.sizes.groups
        taken = [0] * self.sizes.groups
        found: dict[int, Reading] = {}
        rows, numbers = np.full(size, self.sizes.rows, np.int32), np.zeros((4, size), np.int32)
        tokens, last, follows = np.zeros((size, length), np.int32), np.zeros(size, bool), np.zeros((size, length), np.int32)
        for one in chosen:
            group = self.group(one.row)
            at = group * each + taken[group]
            taken[group] += 1
            found[at] = one
            rows[at], tokens[at, : len(one.tokens)], last[at] = one.row, one.tokens, one.last
            numbers[:, at] = len(one.tokens), one.before, one.whole, self.adapters[one.row]
            follows[at, : len(one.follows)] = one.follows
        counts, before, whole, adapters = numbers
        places = {one.row: at for at, one in found.items()}
        table = self._table(list(places), list(places.values()), size, width)
        part = Part(rows, tokens, counts, before, whole, last, table, adapters, self._asked(places, size), None, None, None)
        part = jax.tree.map(self._shard, part)._replace(mask=self._mask(masks, places, size))
        if self.room.scores:
            scored = self.engine.replicate(np.bool_(any(one.follows for one in found.values())))
            part = part._replace(follows=self._shard(follows), scored=scored)
        return found, part

    def _run_decode(
        self, rows: Sequence[int], steps: int, listed: bool, masks: Mapping[int, np.ndarray], width: int, size: int
    ) -> tuple[dict[int, int], Seen]:
        places, turn = self.turn(rows, steps, listed, masks, width, size)
        with jax.set_mesh(self.engine.mesh), self._compiling("decode", size, width):
            self._state, seen = self._programs.decode(self.decode_params, self._state, turn)
        return places, seen

    def turn(
        self, rows: Sequence[int], steps: int, listed: bool, masks: Mapping[int, np.ndarray], width: int, size: int
    ) -> tuple[dict[int, int], Turn]:
        """Return `({row: its index}, the inputs of the decode program)` for tables of `width` pages and `size` rows."""
        replicate, all_ = self.engine.replicate, size == self.sizes.rows
        places = {row: row if all_ else at for at, row in enumerate(rows)}
        where = list(places.values())
        stopped, numbers, adapters = np.ones(size, bool), np.full(size, self.sizes.rows, np.int32), np.zeros(size, np.int32)
        stopped[where], numbers[where], adapters[where] = False, rows, [self.adapters[row] for row in rows]
        return places, Turn(
            None if all_ else self._shard(numbers), self._shard(stopped), replicate(np.int32(min(steps, self.sizes.steps))),
            replicate(np.bool_(listed)), self._shard(self._table(rows, where, size, width)), self._shard(adapters),
            self._mask(masks, places, size),
        )  # fmt: skip

    def _shard(self, rows: np.ndarray) -> jax.Array:
        return self.engine.shard_rows(rows)
