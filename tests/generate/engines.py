"""Makes generators for the tests of the engine and of its scheduler, and requests that each have their own settings."""

from functools import cache

import jax.numpy as jnp
from generate.words import words
from oracle import Case, load, make_hf, one_device, tokens

from ftjax.generate.answer import Answer, Generation
from ftjax.generate.offline import CHUNK, PAGE
from ftjax.generate.paged import PagedBatch, Room
from ftjax.generate.request import Request
from ftjax.generate.sample import Sampling
from ftjax.generate.scheduler import Job, Scheduler
from ftjax.generate.session import Generator

LLAMA = Case("llama", "llama", {"initializer_range": 0.1, "max_position_embeddings": 256})
ENDS = frozenset(range(0, 600, 9))  # one of nine tokens ends an answer: the model is random
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=20, top_p=0.9),
    Sampling(temperature=1.2, min_p=0.05, repetition_penalty=1.3),
    Sampling(repetition_penalty=1.5),
]
# One text of any length that the tests have, whose prompt is read at once
SINGLE = Room(
    rows=1, context=256, pages=256 // PAGE, page=PAGE, steps=CHUNK, reads=((1, 256),), grows=False, ends=72, biased=8, tops=0,
    grammars=False, scores=False,
)  # fmt: skip


def made(folder, case: Case, mesh=None) -> Generator:
    make_hf(case, folder)
    return generator_of(*load(folder, mesh=mesh), mesh)


def generator_of(model, params, mesh=None) -> Generator:
    found = Generator.of(model, params, words(), mesh=mesh or one_device(), dtype=jnp.float32)
    found.ends = ENDS
    return found


def request(prompt: list[int], limit: int, number: int) -> Request:
    return Request(prompt, SAMPLINGS[number % len(SAMPLINGS)], limit, seed=3, number=number)


def numbered(number: int) -> Request:
    """Return request `number`; each has its own length, limit and sampling."""
    length, limit = 3 + number * 5 % 13, 4 + number * 7 % 19
    return request(tokens(1, length, seed=number)[0].tolist(), limit, number)


def answer(generator: Generator, number: int) -> Answer:
    return generator.begin(numbered(number))


def run(scheduler: Scheduler, limit: int = 500) -> None:
    while not scheduler.idle:
        scheduler.step()
        limit -= 1
        assert limit, (scheduler.waiting, scheduler.running)


@cache
def _single(generator: Generator) -> PagedBatch:
    batch = PagedBatch(generator.engine, generator.params, SINGLE)
    batch.open()
    return batch


def alone(generator: Generator, request: Request) -> list[int]:
    """Return the tokens that a request is answered with where nothing else runs."""
    return answered_alone(generator, request).tokens


def answered_alone(generator: Generator, request: Request) -> Generation:
    """Return the answer of a request where nothing else runs, with log-probabilities; all use the same programs."""
    job, scheduler = Job(generator.begin(request)), Scheduler(_single(generator), steps=CHUNK)
    scheduler.submit(job)
    run(scheduler)
    return job.answer.generation(True)


def poisoned(generator: Generator, token: int) -> dict:
    """Return the parameters, with NaN in the embedding of one token."""
    [path] = (path for path, spec in generator.model.specs.items() if spec.hf_template.endswith("embed_tokens.weight"))
    return {**generator.params, path: generator.params[path].at[token].set(jnp.nan)}
