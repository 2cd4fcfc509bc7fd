"""The compiled programs of one model on one mesh, and batches whose rows answer at their own pace."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ftjax.generate.answer import Answer
from ftjax.generate.batch import block_length
from ftjax.generate.cache import bucket
from ftjax.generate.decode import CHUNK, Runner, Start, State, View
from ftjax.generate.sample import Sampling, row_sampling
from ftjax.generate.score import head_step, score_step
from ftjax.mesh import parts, spec
from ftjax.models.cache import Layout
from ftjax.models.model import Model

ENDS = 8  # ids that end an answer come in multiples of it, so that few shapes are compiled


class Engine:
    """The programs of a model, compiled once for each shape, and shapes are few."""

    def __init__(self, model: Model, mesh: Mesh, dtype: Any):
        self.model, self.mesh, self.dtype = model, mesh, dtype
        self.shards = parts(mesh.shape, "batch")
        runner = Runner(model, dtype)
        self.empty = jax.jit(runner.empty, static_argnames=("rows", "slots"))
        self.begin = jax.jit(runner.begin, static_argnames=("slots", "block"))
        self.start = jax.jit(runner.start, static_argnames="block", donate_argnums=1)
        self.decode = jax.jit(runner.decode, donate_argnums=1)
        self._score = jax.jit(partial(score_step, runner), out_shardings=NamedSharding(mesh, spec(())))
        self._head = jax.jit(partial(head_step, runner), out_shardings=NamedSharding(mesh, spec(())))
        self.whole_prompts = any(rope.by_length for rope in model.ropes)  # a part of one would be rotated by other frequencies
        self.keeps_prefixes = not (self.whole_prompts or Layout(model.memories).states)  # a state is that of a whole text
        self.switch = min((rope.recomputed_at for rope in model.ropes if rope.recomputed_at), default=None)

    def score(self, params: Mapping[str, jax.Array], *batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`score_step` on arrays of the host."""
        with jax.set_mesh(self.mesh):
            logprobs, best = self._score(params, *map(self.place, batch))
        return np.asarray(logprobs), np.asarray(best)

    def head(self, params: Mapping[str, jax.Array], *batch: np.ndarray) -> np.ndarray:
        """`head_step` on arrays of the host."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._head(params, *map(self.place, batch)))

    def block(self, rows: int, length: int, slots: int) -> int:
        """Tokens of a prompt that go through the model at a time."""
        return length if self.whole_prompts else block_length(rows, length, slots, self.model.sizes.heads)

    def steps_to_switch(self, answer: Answer) -> float:
        """Tokens until a text outgrows what its cached keys were rotated for (LongRoPE); 0: now."""
        if self.switch is None or len(answer.prompt) > self.switch:
            return math.inf
        left = self.switch + 1 - len(answer.prompt) - len(answer.tokens)
        return left if left >= 0 else math.inf

    # ---- arrays of the host on the devices ----

    def place(self, rows: np.ndarray) -> jax.Array:
        """The first axis is the batch, sharded over the devices."""
        where = NamedSharding(self.mesh, spec(("batch",) + (None,) * (rows.ndim - 1)))
        return jax.make_array_from_callback(rows.shape, where, lambda index: rows[index])

    def everywhere(self, value: np.ndarray) -> jax.Array:
        where = NamedSharding(self.mesh, spec(()))
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


class Batch:
    """Rows that answer at their own pace: any of them can be ended, and started with another prompt, between two steps.

    What an answer says depends on its prompt, sampling, seed and number alone, not on what is in the other rows, nor on when it
    started. Nothing is compiled for new prompts but for a new bucket of lengths, or of rows that start together.

    Attributes:
        answers: of each row; None where it is free. A finished answer stays until the next one takes its row; one of which the
            logits were not finite has finished with `error`, and harms no other row and no later answer.
        slots: tokens that prompt and answer of a row may have together.
    """

    def __init__(self, engine: Engine, params: Mapping[str, jax.Array], rows: int, slots: int):
        """`rows` is a multiple of the devices that share them, `engine.shards`."""
        self.engine, self.params, self.slots = engine, params, slots
        self.answers: list[Answer | None] = [None] * rows
        self._kept: list[list[int]] = [[] for _ in range(rows)]  # ids that are in the slots of free rows
        self._state: State | None = None

    @property
    def active(self) -> bool:
        return any(answer is not None and not answer.finish for answer in self.answers)

    def free(self) -> list[int]:
        """Rows that can be started, in order."""
        return [row for row, answer in enumerate(self.answers) if answer is None or answer.finish]

    def start(self, answers: Mapping[int, Answer]) -> None:
        """Put prompts into the cache, each into its row, and choose the first token of each answer.

        What a row's slots hold already of its new prompt is not computed again. An answer that has tokens goes on after them.
        """
        if not answers:
            return
        engine, rows = self.engine, len(self.answers)
        for row in answers:
            self._release(row)
        texts = {row: [*answer.prompt, *answer.tokens] for row, answer in answers.items()}
        kept = {row: self._same(row, text) for row, text in texts.items()}
        length = bucket(max(len(texts[row]) - kept[row] for row in answers), 16)
        if any(kept[row] + length > self.slots for row in answers):
            kept = dict.fromkeys(answers, 0)
            length = bucket(max(map(len, texts.values())), 16)
        assert length <= self.slots, f"{length} tokens do not fit into {self.slots} slots"
        whole = self._state is None and 2 * len(answers) > rows
        order = list(range(rows)) if whole else sorted(answers)
        size = rows if whole else math.ceil(bucket(len(order)) / engine.shards) * engine.shards
        start = self._start_arrays(answers, texts, kept, order, size, length)
        block = engine.block(size, length, self.slots)
        state, self._state = self._state, None  # donated: it is put back when the program has run
        with jax.set_mesh(engine.mesh):
            if whole:
                state, view = engine.begin(self.params, start, slots=self.slots, block=block)
            else:
                state = engine.empty(start, rows=rows, slots=self.slots) if state is None else state
                state, view = engine.start(self.params, state, start, block=block)
        for row, answer in answers.items():
            self.answers[row] = answer
        self._read(view, {row: at for at, row in enumerate(order) if row in answers})
        self._state = state

    def step(self, most: int = CHUNK) -> None:
        """Choose up to `most` more tokens of each row that has not ended, at most 32."""
        engine = self.engine
        switching = {row: a for row, a in self._running().items() if engine.steps_to_switch(a) == 0}
        if switching:
            for row in switching:
                self.answers[row], self._kept[row] = None, []
            self.start(switching)
        running = self._running()
        if not running:
            return
        steps = min(most, CHUNK, *(engine.steps_to_switch(answer) for answer in running.values()))
        stopped = np.array([row not in running for row in range(len(self.answers))])
        state, self._state = self._state, None
        with jax.set_mesh(engine.mesh):
            state, view = engine.decode(self.params, state, engine.place(stopped), engine.everywhere(np.int32(steps)))
        self._read(view, {row: row for row in running})
        self._state = state

    def end(self, row: int) -> None:
        """Free a row before its answer has ended; what its slots hold stays of use to a prompt that begins alike."""
        self._release(row)

    # ---- the host's side of the rows ----

    def _running(self) -> dict[int, Answer]:
        return {row: answer for row, answer in enumerate(self.answers) if answer is not None and not answer.finish}

    def _release(self, row: int) -> None:
        answer, self.answers[row] = self.answers[row], None
        if answer is not None:
            known = [*answer.prompt, *answer.tokens[:-1]]  # the last token was never put in
            self._kept[row] = [] if answer.finish == "error" else known

    def _same(self, row: int, text: Sequence[int]) -> int:
        """How many tokens of a text are in a row's slots. The last one is computed anew: its logits are wanted."""
        if self._state is None or not self.engine.keeps_prefixes:
            return 0
        pairs = enumerate(zip(self._kept[row], text[:-1], strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self._kept[row]), len(text) - 1))

    def _start_arrays(
        self, answers: Mapping[int, Answer], texts: Mapping[int, Sequence[int]], kept: Mapping[int, int], order: Sequence[int],
        size: int, length: int,
    ) -> Start:  # fmt: skip
        tokens = np.zeros((size, length), np.int32)
        seen = np.zeros((size, self.engine.model.sizes.vocab), bool)
        most = max(len(answer.ends) for answer in answers.values())
        ends = np.full((size, max(1, math.ceil(most / ENDS)) * ENDS), -1, np.int32)
        numbers = np.zeros((6, size), np.int64)
        sampling = [Sampling()] * size
        which = np.full(size, len(self.answers), np.int32)
        for at, row in enumerate(order):
            if row not in answers:
                continue
            answer, text = answers[row], texts[row]
            new = text[kept[row] :]
            tokens[at, : len(new)] = new
            seen[at, text] = True
            ends[at, : len(answer.ends)] = sorted(answer.ends)
            numbers[:, at] = len(new), kept[row], len(answer.tokens), answer.seed % 2**32, answer.number, answer.limit
            sampling[at], which[at] = answer.sampling, row
        counts, kept_, chosen, seeds, ids, limits = numbers
        place = self.engine.place
        return Start(
            rows=self.engine.everywhere(which), tokens=place(tokens), counts=place(counts.astype(np.int32)),
            kept=place(kept_.astype(np.int32)), chosen=place(chosen.astype(np.int32)), seen=place(seen),
            seeds=place(seeds.astype(np.uint32)), numbers=place(ids.astype(np.uint32)),
            sampling=jax.tree.map(place, row_sampling(sampling)), ends=place(ends), limits=place(limits.astype(np.int32)),
        )  # fmt: skip

    def _read(self, view: View, rows: Mapping[int, int]) -> None:
        """Give each answer its new tokens; `rows` says in which row of the view those of a row of the batch are."""
        tokens, logprobs, counts = map(np.asarray, view)
        for row, at in rows.items():
            new = slice(0, counts[at])
            self.answers[row].read(tokens[at, new].tolist(), logprobs[at, new].tolist())
