"""Schedule requests on the engine: who gets a row and pages, what is read and decoded next, and who waits."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from ftjax.generate.answer import Answer
from ftjax.generate.paged import PagedBatch, Reading
from ftjax.generate.pages import PagePool
from ftjax.generate.steps import Seen

MOST_PARTS = 4  # most parts of prompts that are read in a row while others decode


class Grammar(Protocol):
    """What an answer may say; the host follows it token by token."""

    def mask(self) -> np.ndarray:
        """Return the tokens allowed next, as `ftjax.generate.sample.restrict` reads them."""
        ...

    def accept(self, token: int) -> bool:
        """Take a token of the answer; return whether the answer may only end now."""
        ...


@dataclass(eq=False)
class Job:
    """A request from its arrival to its end.

    Attributes:
        answer: its answer, which ends with `finish`.
        adapter: number of the adapter; 0 is none.
        space: what keys and values depend on besides the tokens: texts share pages within a space only.
        tops: how many of the most probable tokens to list at each place, in `listed`.
        grammar: what the answer may say, or None.
        pool: for an embedding of the prompt: its last hidden state or the mean of all, then in `hidden`. No answer follows.
        scored: whether to list the log-probability of each token of the prompt but the first, in `expected`.
        news: called in the engine's thread after tokens have arrived, and at the end.
    """

    answer: Answer
    adapter: int = 0
    space: int = 0
    tops: int = 0
    grammar: Grammar | None = None
    pool: Literal["last", "mean"] | None = None
    scored: bool = False
    news: Callable[["Job"], None] = lambda job: None

    listed: list[list[tuple[int, float]]] = field(default_factory=list)
    expected: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)  # and the `tops` most probable tokens
    hidden: np.ndarray | None = None
    cached: int = 0  # tokens of the prompt that were in the cache when the request first got a row
    arrived: float = field(default_factory=time.monotonic)
    first: float | None = None  # when the first token came
    ended: bool = False
    cancelled: bool = False

    # while it has a row
    row: int = -1
    text: list[int] = field(default_factory=list)  # what has to be in the cache before the next token is chosen
    filled: int = 0  # tokens in the cache
    started: int = -1
    broken: bool = False  # its logits are not finite

    @property
    def reading(self) -> bool:
        return self.filled < len(self.text)

    @property
    def reads_all(self) -> bool:
        """Whether each token of the prompt must be read, even if its keys and values are there already."""
        return self.pool is not None or (self.scored and not self.answer.tokens)


class Scheduler:
    """Runs jobs: first come, first served, as far as rows and pages reach.

    An answer takes pages as it grows. When there are none, the pages of ended texts go first; then the job that came last
    gives its pages back, waits, and goes on later where it was: what it has said already is read like a prompt. An answer's
    tokens depend on its request alone.

    Attributes:
        waiting: jobs without a row, in order.
        running: jobs by row.
    """

    def __init__(self, batch: PagedBatch, *, steps: int | None = None, reads_first: bool = False):
        """
        Args:
            steps: tokens per row and call; None takes the engine's most.
            reads_first: rows decode once all prompts have been read: better for all of them together, while the others wait.
        """
        self.batch, self.reads_first = batch, reads_first
        self.steps = steps or batch.sizes.steps
        self.pools = [PagePool(batch.sizes.pages - 1, batch.sizes.page) for _ in range(batch.sizes.groups)]
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self.reused = self.read = self.decoded = self.preempted = 0  # three numbers of tokens, and one of jobs
        self._starts = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def fits(self, tokens: int) -> bool:
        """Return whether a text of so many tokens can ever be in the cache."""
        return self._pages(tokens) <= self.batch.sizes.pages - 1 and tokens <= self.batch.room.context

    def submit(self, job: Job) -> None:
        """Add a job, which must fit (`fits`)."""
        assert self.fits(len(job.answer.prompt) + job.answer.limit), "a text that never fits would wait for ever"
        self.waiting.append(job)

    def cancel(self, job: Job) -> None:
        """End a job at the next `step`; its `news` is called with `cancelled`."""
        job.cancelled = True

    def step(self) -> None:
        """Let requests leave and join, read some parts of the prompts that wait (or all), and decode a few tokens."""
        for job in [job for job in (*self.running.values(), *self.waiting) if job.cancelled]:
            self._end(job)
        self._switch()
        self._admit()
        parts = self._parts()
        while self._read() and (self.reads_first or (parts := parts - 1)):
            self._admit()
        self._decode()

    def _parts(self) -> int:
        """Return how many parts of prompts to read before rows decode again: as many as rows read, up to a few.

        A call that decodes takes almost as long for one row as for all. The sooner many rows have read their prompts, the fewer
        calls there are; the long prompt of a single row goes on by one part between two calls, which stalls the others least.
        """
        return min(MOST_PARTS, max(1, sum(job.reading for job in self.running.values())))

    # ---- joining and leaving ----

    def _pages(self, tokens: int) -> int:
        return math.ceil(tokens / self.batch.sizes.page)

    def _admit(self) -> None:
        for job in list(self.waiting):
            free = [row for row in range(self.batch.sizes.rows) if row not in self.running]
            text = [*job.answer.prompt, *job.answer.tokens]
            groups = [group for group in dict.fromkeys(map(self.batch.group, free)) if not self._soon(job, text, group)]
            if free and not groups:
                continue  # later ones may go first: this one waits for what another is reading
            place = next(filter(None, (self._place(job, text, group) for group in self._best(job, text, groups))), None)
            if place is None:
                return
            group, known, taken = place
            self.waiting.remove(job)
            self._start(job, text, next(row for row in free if self.batch.group(row) == group), known, taken)

    def _best(self, job: Job, text: Sequence[int], groups: Sequence[int]) -> list[int]:
        """Return these groups, the one first that holds most of the text, or else has most pages."""
        return sorted(groups, key=lambda group: (-len(self._known(job, text, group)), -self.pools[group].available))

    def _place(self, job: Job, text: Sequence[int], group: int) -> tuple[int, list[int], list[int]] | None:
        """Return `(group, pages that hold the beginning of the text, new pages for the rest)`; None if there are too few.

        A page is left for each row that runs there and may take more, so that this job is not the next to give its own back.
        """
        pool, known = self.pools[group], self._known(job, text, group)
        pool.share(known)
        lacking = self._pages(len(text)) - len(known)
        others = sum(self.batch.group(row) == group and self._grows(other) for row, other in self.running.items())
        taken = pool.take(lacking) if pool.available >= lacking + others else None
        if taken is None:
            pool.give_back(known)
            return None
        return group, known, taken

    def _grows(self, job: Job) -> bool:
        return len(self.batch.tables[job.row]) < self._pages(len(job.answer.prompt) + job.answer.limit)

    def _start(self, job: Job, text: list[int], row: int, known: list[int], taken: list[int]) -> None:
        batch = self.batch
        job.row, job.text, job.filled = row, text, len(known) * batch.sizes.page
        self._starts += 1
        job.started = self._starts
        self.reused += job.filled
        job.cached = job.filled if not job.answer.tokens else job.cached
        self.running[row] = job
        batch.tables[row], batch.adapters[row] = [*known, *taken], job.adapter
        batch.answers[row] = job.answer

    def _known(self, job: Job, text: Sequence[int], group: int) -> list[int]:
        """Return the pages that hold the beginning of a text; its last token is read again, for its logits."""
        if not self.batch.engine.keeps_prefixes or job.reads_all:
            return []
        return self.pools[group].find(job.space, text[:-1])

    def _soon(self, job: Job, text: Sequence[int], group: int) -> bool:
        """Return whether a row of the group is reading a beginning of the text that is worth waiting for: at least a half."""
        if not self.batch.engine.keeps_prefixes or job.reads_all:
            return False
        known, size = len(self._known(job, text, group)), self.batch.sizes.page
        upto = (known + math.ceil((len(text) - known * size) / 2 / size)) * size
        return len(text) > upto and any(
            other.reading and other.space == job.space and not other.pool and self.batch.group(row) == group
            and len(other.text) >= upto and other.text[:upto] == text[:upto]
            for row, other in self.running.items()
        )  # fmt: skip

    def _leave(self, job: Job) -> None:
        """Take a job's row and pages. Pages that may hold something that is not finite are cleared for the next row."""
        batch, group = self.batch, self.batch.group(job.row)
        pages, pool = batch.tables[job.row], self.pools[group]
        if job.reading or job.broken:
            batch.clear(group, pool.unpublished(pages))
        else:
            self._publish(job)
        pool.give_back(pages)
        batch.tables[job.row], batch.adapters[job.row], batch.answers[job.row] = [], 0, None
        del self.running[job.row]
        job.row = -1

    def _publish(self, job: Job) -> None:
        """Let other texts use the pages of this one, whose logits were finite so far."""
        if self.batch.engine.keeps_prefixes and not job.pool:
            text = [*job.answer.prompt, *job.answer.tokens]
            self.pools[self.batch.group(job.row)].publish(job.space, text[: job.filled], self.batch.tables[job.row])

    def _end(self, job: Job) -> None:
        if job.row >= 0:
            self._leave(job)
        elif job in self.waiting:
            self.waiting.remove(job)
        job.ended = True
        job.news(job)

    def _preempt(self, job: Job) -> None:
        self._leave(job)
        self.preempted += 1
        self.waiting.appendleft(job)

    def _switch(self) -> None:
        """Read texts again that LongRoPE rotates otherwise from now on."""
        for job in [job for job in self.running.values() if not job.reading and self._until_switch(job) == 0]:
            self._preempt(job)

    def _until_switch(self, job: Job) -> float:
        return self.batch.engine.steps_to_switch(job.answer)

    # ---- reading and decoding ----

    def _read(self) -> bool:
        """Read a part of the prompts; return whether there was one to read."""
        batch = self.batch
        jobs = sorted((job for job in self.running.values() if job.reading), key=lambda job: job.started)
        if not jobs:
            return False
        longest = max(length for _, length in batch.shapes)
        waiting = [
            Reading(
                job.row, job.text[job.filled : job.filled + longest], job.filled, len(job.text), self._last(job, longest),
                job.text[job.filled + 1 : job.filled + 1 + longest] if job.scored and job.reads_all else (),
            )
            for job in jobs
        ]  # fmt: skip
        masks = {job.row: job.grammar.mask() for job in jobs if job.grammar is not None and self._last(job, longest)}
        found, seen, pooled, expected = batch.read(waiting, masks)
        for at, one in found.items():
            job = self.running[one.row]
            if one.follows:
                self._score(job, one, *(np.asarray(x)[at] for x in expected))
            job.filled += len(one.tokens)
            self.read += len(one.tokens)
            if job.pool:
                self._pool(job, np.asarray(pooled.last)[at], np.asarray(pooled.total)[at])  # indexed on the host, not compiled
            elif not job.reading:
                self._take(job, seen, at)
        return True

    def _score(self, job: Job, one: Reading, logprobs: np.ndarray, tops: np.ndarray, values: np.ndarray) -> None:
        """List what the model expected of the prompt's tokens."""
        del job.expected[one.before :]  # of an earlier reading that came to no end
        places = range(len(one.follows))
        listed = [list(zip(*(x[n, : job.tops].tolist() for x in (tops, values)), strict=True)) for n in places]
        job.expected += zip(logprobs[: len(places)].tolist(), listed, strict=True)

    def _last(self, job: Job, length: int) -> bool:
        return len(job.text) - job.filled <= length and job.pool is None

    def _pool(self, job: Job, last: np.ndarray, total: np.ndarray) -> None:
        if job.pool == "mean":
            job.hidden = total if job.hidden is None else job.hidden + total
        if not job.reading:
            job.hidden = last if job.pool == "last" else job.hidden / len(job.text)
            job.broken = not np.isfinite(job.hidden).all()
            job.answer.finish = "error" if job.broken else "stop"
            self._end(job)

    def _decode(self) -> None:
        jobs = sorted((job for job in self.running.values() if not job.reading), key=lambda job: job.started)
        if not jobs:
            return
        masks = {job.row: job.grammar.mask() for job in jobs if job.grammar is not None}
        steps = 1 if masks else self.steps
        steps = int(min(steps, *map(self._until_switch, jobs)))
        going = [job for job in jobs if self._grow(job, min(steps, job.answer.limit - len(job.answer.tokens)))]
        going = [job for job in going if job.row >= 0]  # a later one may have given its pages to an earlier one
        if not going:
            return
        rows = [job.row for job in going]
        places, seen = self.batch.decode(rows, steps, any(job.tops for job in going), masks)
        for job in going:
            self._take(job, seen, places[job.row])

    def _grow(self, job: Job, steps: int) -> bool:
        """Give a row the pages for its next tokens; return False if the job had to give up its row for others."""
        if job.row < 0:
            return False
        group = self.batch.group(job.row)
        table = self.batch.tables[job.row]
        while (lacking := self._pages(job.filled + steps) - len(table)) > 0:
            taken = self.pools[group].take(lacking)
            if taken is not None:
                table += taken
                break
            last = max(
                (one for one in self.running.values() if self.batch.group(one.row) == group), key=lambda one: one.started
            )
            self._preempt(last)
            if last is job:
                return False
        return True

    def _take(self, job: Job, seen: Seen, at: int) -> None:
        """Read the new tokens of a row."""
        answer, before = job.answer, len(job.answer.tokens)
        new = slice(0, int(np.asarray(seen.counts)[at]))
        logprobs = np.asarray(seen.logprobs)[at, new]
        answer.read(np.asarray(seen.tokens)[at, new].tolist(), logprobs.tolist())
        job.broken = not np.isfinite(logprobs).all()
        came = answer.tokens[before:]
        self.decoded += len(came)
        if came and not before:
            job.first = time.monotonic()
            self._publish(job)  # the prompt
        job.filled = len(answer.prompt) + len(answer.tokens) - 1
        if job.tops:
            ids, values = (np.asarray(x)[at, : len(came), : job.tops].tolist() for x in (seen.tops, seen.top_logprobs))
            job.listed += [list(zip(*one, strict=True)) for one in zip(ids, values, strict=True)]
        if job.grammar is not None and not answer.finish and any([job.grammar.accept(token) for token in came]):
            answer.end()
        if answer.finish:
            self._end(job)
        elif came:
            job.news(job)
