"""Tests what all users of the engine get: each request its own answer, by few programs, in any company and on any mesh."""

import jax
import pytest
from generate.engines import SAMPLINGS, alone, generator_of, made, numbered, poisoned, request
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, tokens
from paged_kernel import interpreted
from processes import ALL

from ftjax.config import MeshConfig
from ftjax.generate.engine import Engine
from ftjax.generate.finite import NotFinite
from ftjax.generate.offline import PAGE, answer_all, arrange
from ftjax.generate.paged import PagedBatch
from ftjax.generate.request import Request
from ftjax.generate.sample import Sampling
from ftjax.generate.session import Generator
from ftjax.mesh import make_mesh


@settings(max_examples=30 if ALL else 6)
@given(order=st.permutations(range(10)), size=st.sampled_from([1, 3, 4, 10, 32] if ALL else [3, 32]))
def test_an_answer_depends_on_its_request_alone(generator, want, order, size):
    """In any order, with any number of requests at a time."""
    found = generator.answer([numbered(number) for number in order], batch_size=size)
    assert [one.tokens for one in found] == [want[number] for number in order]


def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt(mixed, monkeypatch):
    want = [alone(mixed, numbered(n)) for n in range(10)]
    clean = [n for n in range(10) if 95 not in [*numbered(n).prompt, *want[n]]]
    monkeypatch.setattr(mixed, "params", poisoned(mixed, 95))
    found = mixed.answer([numbered(n) for n in clean], batch_size=3)
    assert [one.tokens for one in found] == [want[n] for n in clean]
    with pytest.raises(NotFinite, match="prompt 2"):
        mixed.answer([numbered(clean[0]), Request([95, 7, 8]), numbered(clean[1])])


def test_nothing_is_compiled_for_other_requests(generator, lowered):
    """Neither by the number of requests nor by their settings; nothing is kept from call to call but programs."""
    generator.answer([numbered(number) for number in range(7)], batch_size=3)
    first = lowered()
    generator.answer([numbered(number) for number in (9, 8, 3, 4, 5, 6, 7)], batch_size=3)
    assert lowered() == first


def test_layers_of_several_kinds_take_no_more_programs(mixed, lowered):
    fresh, before = generator_of(mixed.model, mixed.params), lowered()
    fresh.answer([numbered(number) for number in range(7)], batch_size=4)
    assert lowered() - before == 3  # to make arrays, to read and to decode


def test_requests_that_all_fit_take_two_programs(uniform, lowered):
    fresh, before = generator_of(uniform.model, uniform.params), lowered()
    fresh.answer([numbered(number) for number in range(5)])
    assert lowered() - before == 2


def reads(generator: Generator, requests: list[Request], monkeypatch, **options) -> tuple[list, list[int]]:
    """Return the answers, and how many tokens each call that reads prompts has computed."""
    sizes, read = [], PagedBatch._run_prefill

    def watched(self, chosen, masks, shape, width):
        sizes.append(shape[0] * shape[1])
        return read(self, chosen, masks, shape, width)

    with monkeypatch.context() as patched:
        patched.setattr(PagedBatch, "_run_prefill", watched)
        return [one.tokens for one in generator.answer(requests, **options)], sizes


def test_samples_of_one_prompt_read_it_once(generator, monkeypatch):
    """Of layers with states, which cannot be shared, each sample reads it."""
    prompts = [tokens(1, 100, seed=seed)[0].tolist() for seed in (1, 2)]
    sampling = Sampling(temperature=1.0)
    requests = [Request(prompt, sampling, 8, number=n) for n, prompt in enumerate(p for p in prompts for _ in range(8))]
    found, sizes = reads(generator, requests, monkeypatch)
    each = [alone(generator, one) for one in requests]
    assert found == each and len(set(map(tuple, found))) > 2
    assert sum(sizes) == (2 * 112 + 16 * PAGE if generator.engine.keeps_prefixes else 16 * 112)


def test_a_beginning_that_all_have_is_read_once_if_it_is_long(uniform, monkeypatch):
    beginning = tokens(1, 200, seed=3)[0].tolist()
    requests = [Request([*beginning, *tokens(1, 20 + n, seed=n)[0].tolist()], max_new_tokens=3) for n in range(4)]
    found, sizes = reads(uniform, requests, monkeypatch)
    assert found == [alone(uniform, one) for one in requests]
    assert sum(sizes) <= 224 + 4 * 40
    short = [Request([*beginning[:40], *tokens(1, 60, seed=n)[0].tolist()], max_new_tokens=3) for n in range(4)]
    assert len(reads(uniform, short, monkeypatch)[1]) == 1


def test_long_prompts_are_read_in_equal_parts(mixed, monkeypatch):
    """The attention scores of whole prompts never exist at once."""
    requests = [Request(tokens(1, length, seed=length)[0].tolist(), max_new_tokens=3) for length in (200, 180, 20)]
    found, sizes = reads(mixed, requests, monkeypatch)
    assert found == [alone(mixed, one) for one in requests]
    monkeypatch.setattr("ftjax.generate.batch.SCORES", 3 * mixed.model.sizes.heads * 224 * 56)
    parts, smaller = reads(mixed, requests, monkeypatch)
    assert parts == found and len(sizes) == 1 and len(smaller) > 3 and len(set(smaller)) == 1


def test_scores_are_limited_on_each_device(uniform, monkeypatch):
    """Eight rows over four devices, where two have half of the heads each, read as long parts as two rows on one device."""
    monkeypatch.setattr("ftjax.generate.batch.SCORES", 1 << 14)
    mesh = make_mesh(MeshConfig(data=2, tensor=2, fsdp=1), jax.devices()[:4])
    shared = Engine(uniform.model, mesh, uniform.engine.dtype)

    def part(engine, rows):
        answers = [uniform.begin(Request([number + 1] * 160, max_new_tokens=16)) for number in range(rows)]
        return arrange(engine, answers, rows).room.reads[0][1]

    assert part(shared, 8) == part(uniform.engine, 2) > part(uniform.engine, 8)


def test_pages_for_texts_of_unlike_lengths(uniform, monkeypatch):
    """A long text does not make room of its length for all others."""
    made, prompts = [], [tokens(1, 150, seed=1)[0].tolist(), *(tokens(1, 9, seed=n)[0].tolist() for n in range(7))]
    answers = [uniform.begin(Request(prompt, max_new_tokens=5)) for prompt in prompts]

    def watched(engine, params, room):
        made.append(room)
        return PagedBatch(engine, params, room)

    monkeypatch.setattr("ftjax.generate.offline.PagedBatch", watched)
    for _ in answer_all(uniform.engine, uniform.params, answers, 8, 32):
        pass
    [room] = made
    assert room.rows == 8 and 10 <= room.context // PAGE <= 12 and 10 + 7 <= room.pages <= 8 * 12 // 2
    assert all(one.finish for one in answers)


def test_rows_are_sharded(mixed):
    """Layers of all kinds, with rows on eight devices, give the answers of one device."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    params = jax.device_put(mixed.params, jax.NamedSharding(mesh, jax.P()))
    spread = generator_of(mixed.model, params, mesh)
    found = spread.answer([numbered(number) for number in range(10)], batch_size=8)
    assert [one.tokens for one in found] == [alone(mixed, numbered(number)) for number in range(10)]


def test_a_kernel_reads_pages(tmp_path):
    """Prompts in parts, a beginning that is there already, windows, a cap and grouped heads: on four devices in interpret mode,
    the answers of one CPU device that reads them block by block."""
    sizes = {"head_dim": 16, "initializer_range": 0.1, "sliding_window": 20}
    case = Case("gemma2", "gemma2", {**sizes, "layer_types": ["sliding_attention", "full_attention"]})
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    one = made(tmp_path / "one", case)
    requests = [request(tokens(1, length, seed=length)[0].tolist(), 5, length) for length in (3, 51)]
    requests += [Request([*tokens(1, 40, seed=1)[0].tolist(), number], SAMPLINGS[1], 5, number=number) for number in range(2)]
    with interpreted():
        spread = made(tmp_path / "spread", case, mesh)
        found = spread.answer(requests)
    assert spread.engine.attention == "a kernel reads pages in place" and "block by block" in one.engine.attention
    assert [answer.tokens for answer in found] == [answer.tokens for answer in one.answer(requests)]


@settings(max_examples=30 if ALL else 6)
@given(
    order=st.permutations(range(8)),
    rows=st.integers(1, 4) if ALL else st.just(2),
    steps=st.integers(1, 7),
    slots=st.sampled_from([None, 64]),
)
def test_a_stream_gives_each_request_its_own_answer(uniform, order, rows, steps, slots):
    """In any order of requests and rows, the pieces join to the answer, and other requests continue meanwhile."""
    requests = [numbered(number) for number in order]
    want = [alone(uniform, one) for one in requests]
    found = {index: [] for index in range(8)}
    ended = set()
    for piece in uniform.stream(iter(requests), rows=rows, slots=slots, steps=steps):
        assert piece.index not in ended
        found[piece.index] += piece.tokens
        ended |= {piece.index} if piece.finish_reason else set()
    assert ended == set(range(8))
    assert [found[index] for index in range(8)] == want


def test_the_text_of_a_stream(uniform):
    requests = [numbered(number) for number in range(10)]
    pieces, whole = list(uniform.stream(requests, rows=2, slots=64, steps=2)), uniform.answer(requests)
    texts = {index: "".join(piece.text for piece in pieces if piece.index == index) for index in range(10)}
    assert texts == {index: one.text for index, one in enumerate(whole)}
    reasons = {piece.index: piece.finish_reason for piece in pieces if piece.finish_reason}
    assert reasons == {index: one.finish_reason for index, one in enumerate(whole)}


def test_a_stream_asks_for_requests_as_rows_are_free(uniform):
    """The third request is taken once one of the first two has ended; a larger one gets a larger cache."""
    asked, ended = [], 0

    def coming():
        for number, (length, limit) in enumerate([(3, 9), (4, 2), (5, 3), (40, 5), (3, 4)]):
            asked.append(ended)
            yield request(tokens(1, length, seed=number)[0].tolist(), limit, number)

    answered = set()
    for piece in uniform.stream(coming(), rows=2, steps=1):
        ended += bool(piece.finish_reason)
        answered |= {piece.index}
    assert answered == set(range(5)) and asked[:2] == [0, 0] and asked[2] >= 1 and asked == sorted(asked)
