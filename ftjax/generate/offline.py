"""Answer requests that are all there, or that come when they are asked for, without a server: sizes, and who joins when.

Everything here follows from the requests alone, so that several processes do the same. Nothing is kept from call to call,
neither parameters nor pages: in training from rewards the next call has other parameters.

Programs are compiled on first use, and there are few: one reads prompts, one decodes, one makes the arrays where several calls
read prompts, and one reads what is left of prompts whose beginning others have. So rows join in groups of the size that the
reading program has, all tables of pages have one length, and sizes are rounded.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from ftjax.generate.answer import Answer
from ftjax.generate.batch import block_length, groups
from ftjax.generate.cache import bucket
from ftjax.generate.engine import Engine
from ftjax.generate.paged import PagedBatch, Room
from ftjax.generate.scheduler import Job, Scheduler

PAGE = 16  # tokens of a page
CHUNK = 32  # most tokens per row and decode call
LENGTH = 256  # tokens of a prompt per call, at least, unless attention scores would take too much memory
TOKENS = 4096  # tokens per call of all rows together, if LENGTH of each are fewer
FEW = 8  # the arrays of end ids and of biases are padded to a multiple of this
SMALLEST = 1024  # tokens of the smallest room of a conversation


class Arrangement(NamedTuple):
    """How requests are answered together.

    Attributes:
        order: their indices, in the order in which they are answered.
        joining: rows that join at a time.
        room: with all shapes of the programs.
        opens: whether several calls read prompts.
        fresh: the prompts that are read from their beginning; of the others, one before has at least a half.
    """

    order: list[int]
    joining: int
    room: Room
    opens: bool
    fresh: int


def arrange(engine: Engine, answers: Sequence[Answer], batch_size: int) -> Arrangement:
    """Choose the sizes for these requests, the longest prompts first, of which at most `batch_size` run at a time."""
    prompts = [answer.prompt for answer in answers]
    [order, *others], rows = groups([len(prompt) for prompt in prompts], batch_size, engine.shards)
    order = [*order, *(number for group in others for number in group)]
    fresh, rest = _to_read([prompts[number] for number in order], engine)
    joining = rows if not others else _rounded(rows / 4, engine.shards)
    needs = sorted((_pages(len(answer.prompt) + answer.limit) for answer in answers), reverse=True)
    width = bucket(needs[0])
    first = _read_shape(engine, min(joining, _rounded(bucket(len(fresh) * engine.shards), engine.shards)), max(fresh), width)
    reads = [first]
    if rest and 2 * (small := bucket(max(rest), PAGE)) <= first[1]:
        reads.append((joining, small))
    elif rest:
        reads = [first := _read_shape(engine, joining, max(fresh), width)]
    # Rows of a shard take the pages of as many of the longest texts at most: a half or a quarter of the largest table may do.
    each = rows // engine.shards
    pages, needed = each * width, sum(needs[:each])
    while pages % 2 == 0 and pages // 2 >= max(needed, width):
        pages //= 2
    several = bool(others or rest or max(fresh) > first[1] or len(answers) > first[0])
    return Arrangement(order, joining, room(answers, rows, width, pages, tuple(reads)), several, len(fresh))


def answer_all(
    engine: Engine, params: Mapping[str, Any], answers: Sequence[Answer], batch_size: int, steps: int
) -> Iterator[list[int]]:
    """Answer all requests, the longest prompts first; yield the indices of those that have ended after each step.

    Args:
        batch_size: the most requests that run at a time.
        steps: the most tokens per row and decode call.
    """
    if not answers:
        return
    order, joining, needed, opens, _ = arrange(engine, answers, batch_size)
    batch, rows = PagedBatch(engine, params, needed), needed.rows
    if opens:
        batch.open()
    scheduler = Scheduler(batch, steps=steps, reads_first=True)
    ended: list[int] = []
    coming = iter(order)
    while True:
        free = rows - len(scheduler.running) - len(scheduler.waiting)
        if free >= joining or scheduler.idle:
            for number in islice(coming, free):
                news = lambda job, number=number: ended.append(number) if job.ended else None  # noqa: E731
                scheduler.submit(Job(answers[number], news=news))
        if scheduler.idle:
            return
        scheduler.step()
        yield list(ended)
        ended.clear()


def stream_all(
    engine: Engine, params: Mapping[str, Any], coming: Iterator[tuple[int, Answer]], rows: int, slots: int, steps: int
) -> Iterator[tuple[int, Answer]]:
    """Answer requests as they come; yield `(index, answer)` of each one that has new tokens, after each step.

    Args:
        coming: is advanced when a row is free.
        slots: the least room for prompt and answer. A request that needs more waits until all others have ended.
        steps: the most tokens per row and step.
    """
    rows = _rounded(max(1, rows), engine.shards)
    waiting = list(islice(coming, rows))
    scheduler: Scheduler | None = None
    news: dict[int, Answer] = {}
    while True:
        if scheduler is None or scheduler.idle:
            waiting = waiting or list(islice(coming, 1))
            if not waiting:
                return
            if scheduler is None or not _takes(scheduler, waiting[0][1]):
                slots = max(slots, *(_size(answer) for _, answer in waiting), 0)
                scheduler = None  # its pages go before there are new ones
                scheduler = _stream(engine, params, [answer for _, answer in waiting], rows, slots, steps)
        for _ in range(rows - len(scheduler.running) - len(scheduler.waiting)):
            waiting = waiting or list(islice(coming, 1))
            if not waiting or not _takes(scheduler, waiting[0][1]):
                break
            index, answer = waiting.pop(0)
            scheduler.submit(Job(answer, news=lambda job, index=index: news.update({index: job.answer})))
        scheduler.step()
        yield from news.items()
        news.clear()


def for_conversation(engine: Engine, params: Mapping[str, Any], answer: Answer, steps: int) -> Scheduler:
    """Return a scheduler for one text at a time, with room for this one and for longer ones."""
    slots = SMALLEST
    while slots < _size(answer):
        slots *= 2
    width = slots // PAGE
    batch = PagedBatch(engine, params, room([answer], engine.shards, width, width, ()))
    batch.open()
    return Scheduler(batch, steps=steps)


def room(answers: Iterable[Answer], rows: int, width: int, pages: int, reads: tuple[tuple[int, int], ...]) -> Room:
    """Return room for answers like these, with tables of `width` pages."""
    few = lambda size: max(1, math.ceil(size / FEW)) * FEW  # noqa: E731
    ends, biased = (few(max(len(one) for one in all_)) for all_ in zip(*((a.ends, a.bias) for a in answers), strict=True))
    return Room(
        rows, width * PAGE, pages, PAGE, steps=CHUNK, reads=reads, grows=False, ends=ends, biased=biased, tops=0,
        grammars=False, scores=False,
    )  # fmt: skip


def _stream(
    engine: Engine, params: Mapping[str, Any], answers: Sequence[Answer], rows: int, slots: int, steps: int
) -> Scheduler:
    width = bucket(_pages(slots))
    reads = (_read_shape(engine, _rounded(rows / 4, engine.shards), max(len(answer.prompt) for answer in answers), width),)
    batch = PagedBatch(engine, params, room(answers, rows, width, rows // engine.shards * width, reads))
    batch.open()
    return Scheduler(batch, steps=min(steps, CHUNK))


def _to_read(texts: Sequence[Sequence[int]], engine: Engine) -> tuple[list[int], list[int]]:
    """Return the tokens to read of texts that begin anew, and of those of which one before has at least a half."""
    fresh, rest = [], []
    known: dict[tuple[int, tuple[int, ...]], int] = {}  # (number of the beginning before, tokens of a page) -> number
    for text in texts:
        before, shared = 0, 0
        for at in range(0, len(text) - PAGE, PAGE) if engine.keeps_prefixes else ():
            key = (before, tuple(text[at : at + PAGE]))
            if key in known:
                shared = at + PAGE
            before = known.setdefault(key, len(known) + 1)
        if 2 * shared >= len(text):
            rest.append(len(text) - shared)
        else:
            fresh.append(len(text))
    return fresh, rest


def _read_shape(engine: Engine, rows: int, longest: int, width: int) -> tuple[int, int]:
    """Return `(rows, tokens)` of a program that reads prompts of at most `longest` tokens in equal parts."""
    length = bucket(longest, 16)
    parts = math.ceil(length / max(LENGTH, TOKENS // rows))
    chunk = math.ceil(length / parts / 16) * 16
    return rows, block_length(rows // engine.shards, chunk, width * PAGE, engine.heads)


def _pages(tokens: int) -> int:
    return math.ceil(tokens / PAGE)


def _size(answer: Answer) -> int:
    return len(answer.prompt) + answer.limit


def _takes(scheduler: Scheduler, answer: Answer) -> bool:
    return scheduler.fits(_size(answer)) and len(answer.bias) <= scheduler.batch.room.biased


def _rounded(rows: float, shards: int) -> int:
    """Round up to a multiple of the devices that rows are sharded over."""
    return math.ceil(rows / shards) * shards
