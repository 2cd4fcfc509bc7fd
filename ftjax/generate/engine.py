"""The compiled programs of one model on one mesh, and how the host drives them through a batch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ftjax.generate.answer import Answer
from ftjax.generate.batch import block_length, left_padded
from ftjax.generate.cache import bucket, new_cache
from ftjax.generate.context import depends_on_length, recomputes_at
from ftjax.generate.decode import Rules, Runner, State, View
from ftjax.generate.sample import Sampling
from ftjax.generate.score import score_step
from ftjax.mesh import parts, spec
from ftjax.models.cache_shape import cache_shape
from ftjax.models.context import KVCache
from ftjax.models.model import Model

SMALLEST_MEMORY = 1024  # slots of a conversation's cache


@jax.jit
def _keys(seed: jax.Array, numbers: jax.Array) -> jax.Array:
    """One PRNG key for each prompt, by its number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


class Memory:
    """A cache that is kept from one answer to the next, and the ids in its slots, from slot 0 on."""

    def __init__(self):
        self.cache: KVCache | None = None
        self.ids: list[int] = []

    def forget(self) -> None:
        self.cache, self.ids = None, []


class Engine:
    """Runs batches; programs are compiled once for each shape, and shapes are few."""

    def __init__(self, model: Model, mesh: Mesh, dtype: Any):
        self.model, self.mesh, self.dtype = model, mesh, dtype
        self.shards = parts(mesh.shape, "batch")
        self.shape = cache_shape(model)
        runner = Runner(model, self.shape, dtype)
        self._prefill = jax.jit(runner.prefill, static_argnames=("slots", "longest", "block", "logprobs"))
        self._again = jax.jit(runner.again, static_argnames=("slots", "block"))
        self._resume = jax.jit(runner.resume, static_argnames=("longest", "block", "logprobs"), donate_argnums=1)
        self._decode = jax.jit(runner.decode, donate_argnums=1)
        self._score = jax.jit(partial(score_step, runner), out_shardings=NamedSharding(mesh, spec(())))

    def rules(
        self, sampling: Sampling, seed: int, numbers: Sequence[int], answers: Sequence[Answer], ends: frozenset[int], rows: int
    ) -> Rules:
        """`numbers`: of the prompts, for their random keys; rows without an answer are padding."""
        padding = [0] * (rows - len(answers))
        keys = _keys(np.uint32(seed % 2**32), np.array([*numbers, *padding], np.uint32))
        limits = np.array([answer.limit for answer in answers] + padding, np.int32)
        return Rules(sampling.numbers(), keys, self.everywhere(np.array(sorted(ends) or [-1], np.int32)), self.place(limits))

    def answer(
        self, params: Mapping[str, jax.Array], answers: Sequence[Answer], rows: int, rules: Rules,
        *, chunk: int, logprobs: bool = False, memory: Memory | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Answer one batch, a few tokens between two stops of the iterator; the `answers` have then read them.

        Args:
            rows: of the arrays; those beyond the answers are padding.
            memory: a conversation's, which is used and kept up to date; for a single answer.
        """
        longest = bucket(max(answer.limit for answer in answers), 16)
        with jax.set_mesh(self.mesh):
            if memory is None:
                state, view = self._start(params, answers, rows, rules, longest, logprobs)
            else:
                state, view = self._go_on(params, answers[0], rows, rules, longest, logprobs, memory)
        while True:
            step, tokens = int(view.step), np.asarray(view.tokens)
            if memory is not None:
                memory.cache, memory.ids = state.cache, [*answers[0].prompt, *tokens[0, : step - 1].tolist()]
            for row, answer in enumerate(answers):
                if not answer.finish:
                    answer.read(tokens[row, len(answer.tokens) : step].tolist())
            yield
            if all(answer.finish for answer in answers):
                break
            if memory is not None:
                memory.forget()  # the decoding takes the cache away; it is put back when that is done
            with jax.set_mesh(self.mesh):
                left = self._steps_to_switch(answers)
                if left == 0:
                    state, view = self._start_again(params, state, answers, rows, rules, longest)
                    memory = None  # its slots are others now
                    continue
                stopped = np.array([answer.finish is not None for answer in answers] + [True] * (rows - len(answers)))
                until = self.everywhere(np.int32(step + min(chunk, left)))
                state, view = self._decode(params, state, self.place(stopped), rules, until)
        if logprobs:
            values = np.asarray(view.logprobs)
            for row, answer in enumerate(answers):
                answer.logprobs = values[row, : len(answer.tokens)].tolist()

    def score(self, params: Mapping[str, jax.Array], *batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`score_step` on arrays of the host."""
        with jax.set_mesh(self.mesh):
            logprobs, best = self._score(params, *map(self.place, batch))
        return np.asarray(logprobs), np.asarray(best)

    # ---- the beginning of an answer ----

    def _start(self, params, answers, rows: int, rules: Rules, longest: int, logprobs: bool) -> tuple[State, View]:
        placed, sizes = self._padded(answers, rows, longest)
        return self._prefill(params, *placed, rules, longest=longest, logprobs=logprobs, **sizes)

    def _start_again(self, params, state: State, answers, rows: int, rules: Rules, longest: int) -> tuple[State, View]:
        """A cache for texts that outgrew what their keys were rotated for."""
        placed, sizes = self._padded(answers, rows, longest)
        return self._again(params, state, *placed, rules, **sizes)

    def _padded(self, answers: Sequence[Answer], rows: int, longest: int) -> tuple[tuple[jax.Array, ...], dict[str, int]]:
        """Prompts with their answers so far: tokens and segment ids; and what sizes go with them."""
        texts = [[*answer.prompt, *answer.tokens] for answer in answers]
        length = bucket(max(map(len, texts)), 16)
        slots = length + longest
        placed = tuple(map(self.place, left_padded(texts, rows, length)))
        return placed, {"slots": slots, "block": self.block(rows, length, slots)}

    def _go_on(
        self, params, answer: Answer, rows: int, rules: Rules, longest: int, logprobs: bool, memory: Memory
    ) -> tuple[State, View]:
        """A prompt of which the beginning may be in the cache already; every row is the same."""
        same = 0
        if memory.cache is not None and not depends_on_length(self.model.config):
            pairs = enumerate(zip(memory.ids, answer.prompt[:-1], strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(memory.ids), len(answer.prompt) - 1))
        new = answer.prompt[same:]
        length = bucket(len(new), 16)
        needed = same + max(length, len(new) + longest)
        if memory.cache is None or memory.cache.segment_ids.shape[1] < needed:
            same, new = 0, answer.prompt
            length = bucket(len(new), 16)
            slots = SMALLEST_MEMORY
            while slots < max(length, len(new) + longest):
                slots *= 2
            make = partial(new_cache, self.shape, rows, slots, self.dtype)
            memory.cache = jax.jit(make)()
        cache, slots = memory.cache, memory.cache.segment_ids.shape[1]
        memory.forget()
        tokens = np.zeros((rows, length), np.int32)
        tokens[:, : len(new)] = new
        seen = np.zeros((rows, self.model.config["vocab_size"]), bool)
        seen[:, answer.prompt] = True
        return self._resume(
            params, cache, self.everywhere(np.int32(same)), self.place(tokens), self.everywhere(np.int32(len(new))),
            self.place(seen), rules, longest=longest, logprobs=logprobs, block=self.block(rows, length, slots),
        )  # fmt: skip

    def block(self, rows: int, length: int, slots: int) -> int:
        """Tokens of a prompt that go through the model at a time."""
        if depends_on_length(self.model.config):
            return length
        heads = self.model.heads
        return block_length(rows, length, slots, heads)

    def _steps_to_switch(self, answers: Sequence[Answer]) -> float:
        """Tokens until a text outgrows what its cached keys were rotated for; 0: now."""
        at = recomputes_at(self.model.config)
        if at is None:
            return math.inf
        left = [at + 1 - len(a.prompt) - len(a.tokens) for a in answers if not a.finish and len(a.prompt) <= at]
        return min((steps for steps in left if steps >= 0), default=math.inf)

    # ---- arrays of the host on the devices ----

    def place(self, rows: np.ndarray) -> jax.Array:
        """The first axis is the batch, over the devices."""
        where = NamedSharding(self.mesh, spec(("batch",) + (None,) * (rows.ndim - 1)))
        return jax.make_array_from_callback(rows.shape, where, lambda index: rows[index])

    def everywhere(self, value: np.ndarray) -> jax.Array:
        where = NamedSharding(self.mesh, spec(()))
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])
