"""Tests continuous batching: a row's answer is the one that it has alone, whatever the other rows do and whenever it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate.words import words
from hypothesis import given, settings
from hypothesis import strategies as st
from models.hybrid import HYBRID, make
from oracle import Case, load, make_hf, one_device, tokens
from processes import ALL

from ftjax.config import MeshConfig
from ftjax.generate.answer import Answer
from ftjax.generate.engine import Batch
from ftjax.generate.request import Request
from ftjax.generate.sample import Sampling
from ftjax.generate.session import Generator
from ftjax.mesh import make_mesh

ROWS, SLOTS = 3, 64
LLAMA = Case("llama", "llama", {"initializer_range": 0.1})
ENDS = frozenset(range(0, 600, 9))  # one of nine tokens ends an answer: the model is random
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=20, top_p=0.9),
    Sampling(temperature=1.2, min_p=0.05, repetition_penalty=1.3),
    Sampling(repetition_penalty=1.5),
]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def generator(request, tmp_path_factory) -> Generator:
    """Return a model whose layers all have keys and values, or one with layers of several sizes, sharing layers, and states."""
    if request.param == "llama":
        return made(tmp_path_factory.mktemp("model"), LLAMA)
    return generator_of(*make(HYBRID))


def made(folder, case: Case, mesh=None) -> Generator:
    make_hf(case, folder)
    return generator_of(*load(folder, mesh=mesh), mesh)


def generator_of(model, params, mesh=None) -> Generator:
    found = Generator.of(model, params, words(), mesh=mesh or one_device(), dtype=jnp.float32)
    found.ends = ENDS
    return found


def request(prompt: list[int], limit: int, number: int) -> Request:
    return Request(prompt, SAMPLINGS[number % len(SAMPLINGS)], limit, seed=3, number=number)


def answer(generator: Generator, number: int) -> Answer:
    """Begin the answer to request `number`; each has its own length, limit and sampling."""
    length, limit = 3 + number * 5 % 13, 4 + number * 7 % 19
    prompt = tokens(1, length, seed=number)[0].tolist()
    return generator.begin(request(prompt, limit, number))


def alone(generator: Generator, number: int, rows: int = ROWS) -> list[int]:
    batch, one = Batch(generator.engine, generator.params, rows, SLOTS), answer(generator, number)
    batch.start({0: one})
    while batch.active:
        batch.step()
    return one.tokens


@pytest.fixture(scope="module")
def want(generator) -> list[list[int]]:
    found = [alone(generator, number) for number in range(10)]
    assert len({len(one) for one in found}) > 4 and any(one[-1] in ENDS for one in found)
    return found


@settings(max_examples=50 if ALL else 10)
@given(st.data())
def test_any_order_of_arrivals_and_departures(generator, want, data):
    """Requests arrive at any time, into any free row, and some are cancelled before they end."""
    batch, waiting, running = Batch(generator.engine, generator.params, ROWS, SLOTS), list(range(10)), {}
    waiting = data.draw(st.permutations(waiting))
    while waiting or batch.active:
        free = data.draw(st.permutations(batch.free()))
        come = min(data.draw(st.integers(0, len(free))), len(waiting))
        if not batch.active and waiting:
            come = max(come, 1)
        for row in free[:come]:
            if row in running:
                number, one = running.pop(row)
                assert one.tokens == want[number]
        started = {row: (number := waiting.pop(), answer(generator, number)) for row in free[:come]}
        batch.start({row: one for row, (_, one) in started.items()})
        running |= started
        batch.step(data.draw(st.integers(1, 9)))
        if batch.active and data.draw(st.integers(0, 3)) == 0:
            row = data.draw(st.sampled_from([r for r, (_, one) in running.items() if not one.finish]))
            number, one = running.pop(row)
            batch.end(row)
            assert one.tokens == want[number][: len(one.tokens)]
    for number, one in running.values():
        assert one.tokens == want[number]


def poisoned(generator: Generator, token: int) -> dict:
    """Return the parameters, with NaN in the embedding of one token."""
    [path] = (path for path, spec in generator.model.specs.items() if spec.hf_template.endswith("embed_tokens.weight"))
    return {**generator.params, path: generator.params[path].at[token].set(jnp.nan)}


def test_logits_that_are_not_finite_end_their_row_alone(generator, want):
    """Other rows continue unchanged, and the row's next answer is right."""
    batch = Batch(generator.engine, poisoned(generator, 95), ROWS, SLOTS)
    numbers = [n for n in range(10) if 95 not in [*answer(generator, n).prompt, *want[n]]]
    broken = generator.begin(Request([95, *tokens(1, 30, seed=8)[0].tolist()], max_new_tokens=4))
    first, second, third = (answer(generator, n) for n in numbers[:3])
    batch.start({0: first, 1: broken})
    assert broken.finish == "error" and not broken.tokens and 1 in batch.free()
    batch.step(2)
    batch.start({1: second})
    while batch.active:
        batch.step()
    batch.start({1: third})
    while batch.active:
        batch.step()
    assert [first.tokens, second.tokens, third.tokens] == [want[n] for n in numbers[:3]]


def test_an_answer_ends_where_its_logits_are_not_finite(generator, want):
    places = [(number, at) for number, tokens in enumerate(want) for at in range(1, len(tokens) - 1)]
    number, at = next((n, at) for n, at in places if want[n][at] not in [*answer(generator, n).prompt, *want[n][:at]])
    batch, one = Batch(generator.engine, poisoned(generator, want[number][at]), ROWS, SLOTS), answer(generator, number)
    batch.start({0: one})
    while batch.active:
        batch.step()
    assert one.finish == "error" and one.tokens == want[number][: at + 1]


def test_nothing_is_compiled_for_other_requests(generator, want, lowered):
    def all_of_them(numbers):
        batch, waiting = Batch(generator.engine, generator.params, ROWS, SLOTS), list(numbers)
        while waiting or batch.active:
            for row in batch.free():
                if waiting:
                    batch.start({row: answer(generator, waiting.pop())})
            batch.step(5)

    all_of_them(range(4))
    first = lowered()
    all_of_them(range(4, 10))
    assert lowered() == first


def test_layers_of_several_kinds_take_no_more_programs(tmp_path, lowered):
    def programs(generator) -> int:
        before = lowered()
        alone(generator, 3)
        batch = Batch(generator.engine, generator.params, ROWS, SLOTS)
        batch.start({0: answer(generator, 1)})
        batch.step(2)
        batch.start({2: answer(generator, 2)})
        while batch.active:
            batch.step()
        return lowered() - before

    uniform = made(tmp_path, LLAMA)
    assert 0 < programs(generator_of(*make(HYBRID))) <= programs(uniform)


def test_a_prompt_that_a_row_knows_is_not_computed_again(generator, monkeypatch):
    """Layers with states, which cannot go back to the prompt's end, compute it again as a whole."""
    batch = Batch(generator.engine, generator.params, ROWS, SLOTS)
    one = answer(generator, 3)
    batch.start({1: one})
    while batch.active:
        batch.step()
    more = generator.begin(Request([*one.prompt, *one.tokens, 5, 6], max_new_tokens=8))
    start, counts = generator.engine.start, []

    def watched(params, state, given, **sizes):
        counts.append(np.asarray(given.counts).tolist())
        return start(params, state, given, **sizes)

    monkeypatch.setattr(generator.engine, "start", watched)
    batch.start({1: more})
    while batch.active:
        batch.step()
    uniform = len(set(generator.model.memories)) == 1
    assert counts == [[3 if uniform else len(more.prompt)]]  # the last token of the answer was chosen but not fed to the model
    again = generator.begin(Request(more.prompt, max_new_tokens=8))
    fresh = Batch(generator.engine, generator.params, ROWS, SLOTS)
    fresh.start({0: again})
    while fresh.active:
        fresh.step()
    assert more.tokens == again.tokens


def test_texts_that_outgrow_their_frequencies(tmp_path):
    """With LongRoPE, a row that passes the original length is computed anew, without effect on its neighbours."""
    generator = made(tmp_path, Case("phi3", "phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 64}))
    expected = {number: alone(generator, number) for number in (1, 2, 3)}
    batch = Batch(generator.engine, generator.params, ROWS, SLOTS)
    answers = {number: answer(generator, number) for number in (1, 2, 3)}
    for row, number in enumerate(answers):
        batch.start({row: answers[number]})
        batch.step(3)
    while batch.active:
        batch.step(5)
    assert {number: one.tokens for number, one in answers.items()} == expected


def test_a_sharded_cache_is_written_where_it_is(tmp_path):
    """With rows on four devices and heads on two, decoding moves no keys or values; answers are those of one device."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread, one = made(tmp_path / "a", LLAMA, mesh), made(tmp_path / "b", LLAMA)
    for number in (2, 5):
        assert alone(spread, number, 4) == alone(one, number, 4)
    batch = Batch(spread.engine, spread.params, 8, 1024)
    batch.start({0: answer(spread, 1)})
    text = _decode_program(spread, batch)
    gathered = [line for line in text.splitlines() if "all-gather(" in line and "1024" in line.split("all-gather(")[0]]
    assert not gathered, gathered


def test_states_are_sharded_by_rows(generator):
    """Layers of all kinds, with rows on eight devices, give the answers of one device."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    params = jax.device_put(generator.params, jax.NamedSharding(mesh, jax.P()))
    spread = generator_of(generator.model, params, mesh)
    for number in (2, 5):
        assert alone(spread, number, 8) == alone(generator, number, 8)
    batch = Batch(spread.engine, spread.params, 8, SLOTS)
    batch.start({row: answer(spread, row) for row in range(5)})
    cache = batch._state.cache
    assert all(not leaf.sharding.is_fully_replicated for leaf in (*cache.keys, *cache.states))


def _decode_program(generator: Generator, batch: Batch) -> str:
    engine = generator.engine
    with jax.set_mesh(engine.mesh):
        stopped, steps = engine.shard_rows(np.zeros(8, bool)), engine.replicate(np.int32(1))
        return engine.decode.lower(generator.params, batch._state, stopped, steps).compile().as_text()


@settings(max_examples=30 if ALL else 6)
@given(
    order=st.permutations(range(8)),
    rows=st.integers(1, 4) if ALL else st.just(2),
    steps=st.integers(1, 7),
    slots=st.sampled_from([None, 64]),
)
def test_a_stream_gives_each_request_its_own_answer(generator, want, order, rows, steps, slots):
    """In any order of requests and rows, the pieces join to the answer, and other requests continue meanwhile."""
    numbers = [answer(generator, number) for number in range(8)]
    requests = [request(numbers[number].prompt, numbers[number].limit, number) for number in order]
    found = {index: [] for index in range(8)}
    ended = set()
    for piece in generator.stream(iter(requests), rows=rows, slots=slots, steps=steps):
        assert piece.index not in ended
        found[piece.index] += piece.tokens
        ended |= {piece.index} if piece.finish_reason else set()
    assert ended == set(range(8))
    assert [found[index] for index in range(8)] == [want[number] for number in order]


def test_the_text_of_a_stream(storyteller_stream):
    requests, pieces, whole = storyteller_stream
    texts = {index: "".join(piece.text for piece in pieces if piece.index == index) for index in range(len(requests))}
    assert texts == {index: one.text for index, one in enumerate(whole)}
    reasons = {piece.index: piece.finish_reason for piece in pieces if piece.finish_reason}
    assert reasons == {index: one.finish_reason for index, one in enumerate(whole)}


@pytest.fixture(scope="module")
def storyteller_stream(generator):
    requests = [request(tokens(1, 5, seed=n)[0].tolist(), 9, n) for n in range(5)]
    return requests, list(generator.stream(requests, rows=2, steps=2)), generator.answer(requests)


def test_a_stream_asks_for_requests_as_rows_are_free(generator):
    """The third request is taken once one of the first two has ended; a larger one gets a larger cache."""
    asked, ended = [], 0

    def coming():
        for number, (length, limit) in enumerate([(3, 9), (4, 2), (5, 3), (40, 5), (3, 4)]):
            asked.append(ended)
            yield request(tokens(1, length, seed=number)[0].tolist(), limit, number)

    answered = set()
    for piece in generator.stream(coming(), rows=2, steps=1):
        ended += bool(piece.finish_reason)
        answered |= {piece.index}
    assert answered == set(range(5)) and asked[:2] == [0, 0] and asked[2] >= 1 and asked == sorted(asked)
