"""Compile the programs of one model on one mesh, and run batches whose rows answer at their own pace."""

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
from ftjax.generate.embed import Pooling, embed_step
from ftjax.generate.sample import Sampling, row_sampling, uses_of
from ftjax.generate.score import head_step, score_step
from ftjax.mesh import parts, spec
from ftjax.models.model import Model
from ftjax.models.nn.cache import Layout

FEW = 8  # the arrays of end ids and of biases are padded to a multiple of this, to limit the number of compiled shapes


class Engine:
    """Compiled programs of a model, one per shape; sizes are bucketed to keep the number of shapes small."""

    def __init__(self, model: Model, mesh: Mesh, dtype: Any, of_sampler: bool = False):
        """Args: of_sampler: log-probabilities are those that tokens were drawn with, not the model's own."""
        self.model, self.mesh, self.dtype = model, mesh, dtype
        self.shards = parts(mesh.shape, "batch")
        runner = Runner(model, dtype, of_sampler)
        self.empty = jax.jit(runner.empty, static_argnames=("rows", "slots"))
        self.begin = jax.jit(runner.begin, static_argnames=("slots", "block"))
        self.start = jax.jit(runner.start, static_argnames="block", donate_argnums=1)
        self.decode = jax.jit(runner.decode, donate_argnums=1)
        self._score = jax.jit(
            partial(score_step, runner), static_argnames="temperature", out_shardings=NamedSharding(mesh, spec(()))
        )
        self._embed = jax.jit(
            partial(embed_step, runner), static_argnames="pooling", out_shardings=NamedSharding(mesh, spec(()))
        )
        self._head = jax.jit(partial(head_step, runner), out_shardings=NamedSharding(mesh, spec(())))
        self.whole_prompts = any(rope.by_length for rope in model.ropes)  # RoPE needs the full length
        self.keeps_prefixes = not (self.whole_prompts or Layout(model.memories).states)  # states cannot be rewound
        self.switch = min((rope.recomputed_at for rope in model.ropes if rope.recomputed_at), default=None)

    def score(
        self, params: Mapping[str, jax.Array], *batch: np.ndarray, temperature: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run `score_step` on host arrays."""
        with jax.set_mesh(self.mesh):
            logprobs, best = self._score(params, *map(self.shard_rows, batch), temperature=temperature)
        return np.asarray(logprobs), np.asarray(best)

    def head(self, params: Mapping[str, jax.Array], *batch: np.ndarray) -> np.ndarray:
        """Run `head_step` on host arrays."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._head(params, *map(self.shard_rows, batch)))

    def embed(self, params: Mapping[str, jax.Array], *batch: np.ndarray, pooling: Pooling) -> np.ndarray:
        """Run `embed_step` on host arrays."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._embed(params, *map(self.shard_rows, batch), pooling=pooling))

    def block(self, rows: int, length: int, slots: int) -> int:
        """Return the number of prompt tokens per prefill step."""
        return length if self.whole_prompts else block_length(rows, length, slots, self.model.sizes.heads)

    def steps_to_switch(self, answer: Answer) -> float:
        """Return the number of tokens until LongRoPE switches frequencies, so that cached keys become invalid; 0 means now."""
        if self.switch is None or len(answer.prompt) > self.switch:
            return math.inf
        left = self.switch + 1 - len(answer.prompt) - len(answer.tokens)
        return left if left >= 0 else math.inf

    # ---- host arrays to devices ----

    def shard_rows(self, rows: np.ndarray) -> jax.Array:
        """Place an array on the devices, sharded along its first axis, the batch."""
        where = NamedSharding(self.mesh, spec(("batch",) + (None,) * (rows.ndim - 1)))
        return jax.make_array_from_callback(rows.shape, where, lambda index: rows[index])

    def replicate(self, value: np.ndarray) -> jax.Array:
        """Place an array on the devices, replicated."""
        where = NamedSharding(self.mesh, spec(()))
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


class Batch:
    """A batch with continuous batching: between steps, any row can be ended and started with another prompt.

    An answer depends only on its prompt, sampling, seed and number, not on the other rows or on when it started. New prompts
    cause a compilation only for a new bucket of prompt lengths, or of rows that start together.

    Attributes:
        answers: the answer of each row; None if the row is free. A finished answer stays until the next one takes its row. An
            answer whose logits were not finite has `finish = "error"` and affects neither other rows nor later answers.
        slots: maximum number of tokens of a row, prompt and answer together.
    """

    def __init__(self, engine: Engine, params: Mapping[str, jax.Array], rows: int, slots: int):
        """`rows` must be a multiple of `engine.shards`, the number of devices that rows are sharded over."""
        self.engine, self.params, self.slots = engine, params, slots
        self.answers: list[Answer | None] = [None] * rows
        self._kept: list[list[int]] = [[] for _ in range(rows)]  # token ids in the cache of free rows
        self._state: State | None = None

    @property
    def active(self) -> bool:
        return any(answer is not None and not answer.finish for answer in self.answers)

    def free(self) -> list[int]:
        """Return the rows that can be started, in order."""
        return [row for row, answer in enumerate(self.answers) if answer is None or answer.finish]

    def start(self, answers: Mapping[int, Answer]) -> None:
        """Prefill each prompt into its row and choose the first token of each answer.

        A prefix of the new prompt that is already in the row's cache is reused. An answer that has tokens continues after them.
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
        state, self._state = self._state, None  # donated; set again after the program has run
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
        """Decode up to `most` (at most 32) more tokens in each unfinished row."""
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
            state, view = engine.decode(self.params, state, engine.shard_rows(stopped), engine.replicate(np.int32(steps)))
        self._read(view, {row: row for row in running})
        self._state = state

    def end(self, row: int) -> None:
        """Free a row before its answer has ended; its cache can still be reused by a prompt with the same prefix."""
        self._release(row)

    # ---- host-side bookkeeping ----

    def _running(self) -> dict[int, Answer]:
        return {row: answer for row, answer in enumerate(self.answers) if answer is not None and not answer.finish}

    def _release(self, row: int) -> None:
        answer, self.answers[row] = self.answers[row], None
        if answer is not None:
            known = [*answer.prompt, *answer.tokens[:-1]]  # the last token is not in the cache
            self._kept[row] = [] if answer.finish == "error" else known

    def _same(self, row: int, text: Sequence[int]) -> int:
        """Return the length of the text's prefix in the row's cache, without its last token, whose logits are needed."""
        if self._state is None or not self.engine.keeps_prefixes:
            return 0
        pairs = enumerate(zip(self._kept[row], text[:-1], strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self._kept[row]), len(text) - 1))

    def _start_arrays(
        self, answers: Mapping[int, Answer], texts: Mapping[int, Sequence[int]], kept: Mapping[int, int], order: Sequence[int],
        size: int, length: int,
    ) -> Start:  # fmt: skip
        tokens = np.zeros((size, length), np.int32)
        vocab = self.engine.model.sizes.vocab
        uses = np.zeros((size, vocab), np.int32)
        ends = np.full((size, _padded(max(len(answer.ends) for answer in answers.values()))), -1, np.int32)
        biased = np.full((size, _padded(max(len(answer.bias) for answer in answers.values()))), vocab, np.int32)
        bias = np.zeros(biased.shape, np.float32)
        numbers = np.zeros((6, size), np.int64)
        sampling = [Sampling()] * size
        which = np.full(size, len(self.answers), np.int32)
        for at, row in enumerate(order):
            if row not in answers:
                continue
            answer, text = answers[row], texts[row]
            new = text[kept[row] :]
            tokens[at, : len(new)] = new
            uses[at] = uses_of(answer.prompt, answer.tokens, vocab)
            ends[at, : len(answer.ends)] = sorted(answer.ends)
            biased[at, : len(answer.bias)] = list(answer.bias)
            bias[at, : len(answer.bias)] = list(answer.bias.values())
            numbers[:, at] = len(new), kept[row], len(answer.tokens), answer.seed % 2**32, answer.number, answer.limit
            sampling[at], which[at] = answer.sampling, row
        counts, kept_, chosen, seeds, ids, limits = numbers
        shard = self.engine.shard_rows
        return Start(
            rows=self.engine.replicate(which), tokens=shard(tokens), counts=shard(counts.astype(np.int32)),
            kept=shard(kept_.astype(np.int32)), chosen=shard(chosen.astype(np.int32)), uses=shard(uses),
            seeds=shard(seeds.astype(np.uint32)), numbers=shard(ids.astype(np.uint32)),
            sampling=jax.tree.map(shard, row_sampling(sampling)), ends=shard(ends), limits=shard(limits.astype(np.int32)),
            biased=shard(biased), bias=shard(bias),
        )  # fmt: skip

    def _read(self, view: View, rows: Mapping[int, int]) -> None:
        """Append the new tokens to each answer; `rows` maps batch rows to rows of the view."""
        tokens, logprobs, counts = map(np.asarray, view)
        for row, at in rows.items():
            new = slice(0, counts[at])
            self.answers[row].read(tokens[at, new].tolist(), logprobs[at, new].tolist())


def _padded(size: int) -> int:
    return max(1, math.ceil(size / FEW)) * FEW
