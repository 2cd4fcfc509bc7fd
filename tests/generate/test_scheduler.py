"""Tests the scheduler: each answer is the one that its request has alone, whatever else runs, and nothing is compiled."""

import jax
import numpy as np
import pytest
from generate.engines import LLAMA, SAMPLINGS, alone, answer, made, poisoned, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Case, tokens
from processes import ALL

from ftjax.config import MeshConfig
from ftjax.generate.paged import PagedBatch, Room
from ftjax.generate.request import Request
from ftjax.generate.sample import Sampling
from ftjax.generate.scheduler import Job, Scheduler
from ftjax.mesh import make_mesh

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
ROOM = Room(rows=3, context=64, pages=20, page=4, chunk=16, steps=3, few=(1,))


@pytest.fixture(scope="module")
def batch(generator) -> PagedBatch:
    found = PagedBatch(generator.engine, generator.params, ROOM)
    found.warm_up()
    return found


def has_all_pages(scheduler: Scheduler) -> bool:
    return all(pool.used == 0 for pool in scheduler.pools) and not any(scheduler.batch.tables)


@settings(max_examples=60 if ALL else 12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_schedule_of_arrivals(generator, want, batch, lowered, data):
    """Requests come at any time and some hang up; pages are so few that jobs give them back and go on later."""
    scheduler, jobs = Scheduler(batch, steps=data.draw(st.integers(1, 3))), {}
    compiled, waiting = lowered(), data.draw(st.permutations(range(10)))
    while waiting or not scheduler.idle:
        for _ in range(data.draw(st.integers(1 if scheduler.idle else 0, 4))):
            if waiting:
                number = waiting.pop()
                jobs[number] = Job(answer(generator, number))
                scheduler.submit(jobs[number])
        scheduler.step()
        running = [number for number, job in jobs.items() if not job.ended]
        if running and data.draw(st.integers(0, 5)) == 0:
            number = data.draw(st.sampled_from(running))
            scheduler.cancel(jobs.pop(number))
    for number, job in jobs.items():
        assert job.ended and job.answer.tokens == want[number], number
    assert has_all_pages(scheduler)
    assert lowered() == compiled


def test_rows_that_outgrow_the_pages_go_on_later(generator, batch, monkeypatch):
    """With pages for fewer than two texts, the job that came last waits, and says what it would have said."""
    monkeypatch.setattr(generator, "ends", frozenset())
    scheduler = Scheduler(batch)
    penalty = {"temperature": 1.0, "frequency_penalty": 1.5, "logit_bias": {7: 2.0}}  # they count what was said before
    requests = [Request.of(tokens(1, 4 + n, seed=n)[0].tolist(), max_new_tokens=45, number=n, **penalty) for n in range(4)]
    jobs = [Job(generator.begin(request)) for request in requests]
    for job in jobs:
        scheduler.submit(job)
    run(scheduler)
    assert scheduler.preempted and has_all_pages(scheduler)
    assert [job.answer.tokens for job in jobs] == [alone(generator, request) for request in requests]


def test_a_beginning_is_kept_once(generator, batch):
    """Samples of one prompt share its pages, also when they come together; states cannot be shared."""
    prompt, scheduler = tokens(1, 30, seed=5)[0].tolist(), Scheduler(batch)
    requests = [Request(prompt, Sampling(temperature=1.0), 6, seed=1, number=number) for number in range(3)]
    jobs = [Job(generator.begin(request)) for request in requests]
    for job in jobs:
        scheduler.submit(job)
    while not all(job.answer.tokens for job in jobs):
        scheduler.step()
    shares = generator.engine.keeps_prefixes
    used = [set(batch.tables[job.row]) for job in jobs if job.row >= 0]
    if len(used) == 3:
        assert len(set.intersection(*used)) == (7 if shares else 0)
    assert [job.cached for job in jobs] == ([0, 28, 28] if shares else [0, 0, 0])
    run(scheduler)
    assert [job.answer.tokens for job in jobs] == [alone(generator, request) for request in requests]
    other = Job(generator.begin(requests[0]), space=1)
    scheduler.submit(other)
    run(scheduler)
    assert other.cached == 0 and other.answer.tokens == jobs[0].answer.tokens


def test_what_was_used_longest_ago_is_evicted(generator, batch):
    """Kept pages make room for new texts, and texts that are evicted are read again."""
    scheduler = Scheduler(batch)
    prompts = [tokens(1, 24, seed=number)[0].tolist() for number in range(5)]
    said = []
    for _ in range(2):
        for prompt in prompts:
            job = Job(generator.begin(Request(prompt, max_new_tokens=4)))
            scheduler.submit(job)
            run(scheduler)
            said.append(job.answer.tokens)
            assert sum(pool.kept for pool in scheduler.pools) <= ROOM.pages
    assert said[:5] == said[5:] and has_all_pages(scheduler)
    again = Job(generator.begin(Request(prompts[-1], max_new_tokens=4)))
    scheduler.submit(again)
    run(scheduler)
    assert again.cached == (20 if generator.engine.keeps_prefixes else 0)


def test_a_long_prompt_does_not_stall_the_others(generator, batch, monkeypatch):
    """While a prompt is read part by part, rows that decode get tokens in every step."""
    monkeypatch.setattr(generator, "ends", frozenset())
    scheduler = Scheduler(batch)
    short, long = (Job(generator.begin(Request(tokens(1, n, seed=n)[0].tolist(), max_new_tokens=12))) for n in (3, 50))
    scheduler.submit(short)
    while not short.answer.tokens:
        scheduler.step()
    scheduler.submit(long)
    steps = 0
    while not long.answer.tokens:
        before = len(short.answer.tokens)
        scheduler.step()
        steps += 1
        assert len(short.answer.tokens) > before or short.ended
    assert steps == 4  # 50 tokens, 16 in each
    run(scheduler)


def test_a_few_rows_decode_by_a_program_of_their_own(generator, batch, monkeypatch):
    """One of the three rows is computed; the other two, which the host lets wait, go on where they were."""
    monkeypatch.setattr(generator, "ends", frozenset())
    found, decode = [], batch.decode
    monkeypatch.setattr(batch, "decode", lambda *given: found.append(decode(*given)) or found[-1])
    scheduler, lengths = Scheduler(batch), (5, 9, 30)
    asked = [Request(tokens(1, 7, seed=n)[0].tolist(), SAMPLINGS[1], n, number=n) for n in lengths]
    jobs = [Job(generator.begin(one)) for one in asked]
    for job in jobs:
        scheduler.submit(job)
    run(scheduler)
    assert [job.answer.tokens for job in jobs] == [alone(generator, one) for one in asked]
    assert {(len(places), len(seen.counts)) for places, seen in found} == {(3, 3), (2, 3), (1, 1)}


def test_few_rows_wait_while_most_read(generator, batch, monkeypatch):
    """As many parts are read before the next call that decodes as rows read."""
    monkeypatch.setattr(generator, "ends", frozenset())
    scheduler, parts, read = Scheduler(batch), [], batch.read
    monkeypatch.setattr(batch, "read", lambda *given: parts.append(1) or read(*given))
    first, *others = (Job(generator.begin(Request(tokens(1, n, seed=n)[0].tolist(), max_new_tokens=12))) for n in (3, 20, 19))
    scheduler.submit(first)
    while not first.answer.tokens:
        scheduler.step()
    for job in others:
        scheduler.submit(job)
    parts.clear()
    before = len(first.answer.tokens)
    scheduler.step()
    assert len(parts) == 2 and len(first.answer.tokens) > before
    run(scheduler)


def test_logits_that_are_not_finite_end_their_row_alone(generator, want, batch):
    """Its pages are clean when the next text takes them."""
    spoilt = PagedBatch(generator.engine, poisoned(generator, 95), ROOM)
    scheduler = Scheduler(spoilt)
    numbers = [n for n in range(10) if 95 not in [*answer(generator, n).prompt, *want[n]]]
    broken = [Job(generator.begin(Request([95, *tokens(1, 40, seed=n)[0].tolist()], max_new_tokens=4))) for n in range(4)]
    jobs = [Job(answer(generator, number)) for number in numbers]
    for number, job in enumerate(jobs):
        scheduler.submit(job)
        if number < len(broken):
            scheduler.submit(broken[number])
    scheduler.step()
    scheduler.cancel(broken[3])
    run(scheduler)
    assert [job.answer.finish for job in broken[:3]] == ["error"] * 3 and not any(job.answer.tokens for job in broken)
    assert [job.answer.tokens for job in jobs] == [want[number] for number in numbers]
    cache = spoilt._state.cache
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in (*cache.keys, *cache.values))


def test_an_answer_ends_where_its_logits_are_not_finite(generator, want):
    places = [(number, at) for number, tokens in enumerate(want) for at in range(1, len(tokens) - 1)]
    number, at = next((n, at) for n, at in places if want[n][at] not in [*answer(generator, n).prompt, *want[n][:at]])
    scheduler = Scheduler(PagedBatch(generator.engine, poisoned(generator, want[number][at]), ROOM))
    job = Job(answer(generator, number))
    scheduler.submit(job)
    run(scheduler)
    assert job.answer.finish == "error" and job.answer.tokens == want[number][: at + 1]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_that_depend_on_the_length(tmp_path, kind):
    """A prompt read part by part is rotated as a whole, and a text that outgrows LongRoPE's original length is read again,
    without effect on its neighbours."""
    if kind == "longrope":
        case = Case("phi3", "phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 64})
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
        case = Case("llama", "llama", {"rope_parameters": rope, "max_position_embeddings": 24, "initializer_range": 0.1})
    generator = made(tmp_path, case)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 12, 30, 41)]
    requests = [Request(prompt, max_new_tokens=16) for prompt in prompts]
    scheduler = Scheduler(PagedBatch(generator.engine, generator.params, ROOM))
    jobs = [Job(generator.begin(request)) for request in requests]
    for job in jobs:
        scheduler.submit(job)
    run(scheduler)
    assert [job.answer.tokens for job in jobs] == [alone(generator, request) for request in requests]


def test_pages_on_a_mesh(uniform, tmp_path):
    """With rows on four devices, heads on two, and tokens chosen on all eight, answers and what was probable are
    those of one device, and no keys or values move."""
    spread = made(tmp_path, LLAMA, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    room = Room(rows=8, context=64, pages=20, page=4, chunk=16, steps=3)
    text = decode_program(PagedBatch(spread.engine, spread.params, room))
    said, probable = [], []
    for generator in (uniform, spread):
        batch = PagedBatch(generator.engine, generator.params, room)
        scheduler, jobs = Scheduler(batch), [Job(answer(spread, number), tops=2, scored=True) for number in range(10)]
        for job in jobs:
            scheduler.submit(job)
        run(scheduler)
        assert has_all_pages(scheduler)
        logprobs = [[logprob for logprob, _ in job.expected] for job in jobs]
        tops = [[*job.listed, *(tops for _, tops in job.expected)] for job in jobs]
        said.append([job.answer.tokens for job in jobs])
        probable.append([np.array([*np.ravel(one), *logprob]) for one, logprob in zip(tops, logprobs, strict=True)])
    assert said[0] == said[1]
    for one, other in zip(*probable, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)
    cache = batch._state.cache
    assert all(leaf.sharding.shard_shape(leaf.shape)[0] == 1 for leaf in (*cache.keys, *cache.values))
    pages = [line for line in text.splitlines() if "all-gather(" in line and ",21,4," in line.split("all-gather(")[0]]
    assert not pages, pages


def decode_program(batch: PagedBatch) -> str:
    """Return the compiled program that decodes, which the batch then uses."""
    found, program = [], batch._programs.decode

    def compiled_once(*args):
        found[:] = found or [program.lower(*args).compile()]
        return found[0](*args)

    batch._programs = batch._programs._replace(decode=compiled_once)
    batch.open()
    batch._run_decode([], 1, False, {}, batch.widths[0], batch.sizes.rows)
    return found[0].as_text()


def test_embeddings_of_prompts(generator, batch):
    """The last hidden state or the mean of all, whether the prompt is read at once or in parts."""
    from ftjax.models.nn.context import Context

    scheduler, rows = Scheduler(batch), [tokens(1, length, seed=length)[0].tolist() for length in (5, 37, 16)]
    jobs = {
        (n, pool): Job(generator.begin(Request(rows[n], max_new_tokens=1)), pool=pool)
        for n in range(3)
        for pool in ("last", "mean")
    }
    for job in jobs.values():
        scheduler.submit(job)
    run(scheduler)
    lengths = [len(row) for row in rows]
    ids, index = np.stack([np.pad(row, (0, 37 - len(row))) for row in rows]).astype(np.int32), np.arange(37, dtype=np.int32)
    context = Context(np.stack([index] * 3), (index < np.array(lengths)[:, None]).astype(np.int32))
    module = generator.model.bind(generator.params)
    hidden = np.asarray(jax.jit(lambda ids: module.hidden(ids, context)[0])(ids))
    for (n, pool), job in jobs.items():
        own = hidden[n, : lengths[n]]
        np.testing.assert_allclose(job.hidden, own[-1] if pool == "last" else own.mean(axis=0), atol=1e-5)
        assert job.answer.tokens == []
