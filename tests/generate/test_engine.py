"""Tests what all users of the engine get: each request its own answer, by few programs, in any company and on any mesh."""

import jax
import jax.numpy as jnp
import pytest
from generate.words import words
from hypothesis import given, settings
from hypothesis import strategies as st
from models.hybrid import HYBRID, make
from oracle import Case, load, make_hf, one_device, tokens
from paged_kernel import interpreted
from processes import ALL

from ftjax.config import MeshConfig
from ftjax.generate.answer import Answer
from ftjax.generate.finite import NotFinite
from ftjax.generate.offline import PAGE, answer_all
from ftjax.generate.paged import PagedBatch
from ftjax.generate.request import Request
from ftjax.generate.sample import Sampling
from ftjax.generate.session import Generator
from ftjax.mesh import make_mesh

LLAMA = Case("llama", "llama", {"initializer_range": 0.1, "max_position_embeddings": 256})
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


def numbered(number: int) -> Request:
    """Return request `number`; each has its own length, limit and sampling."""
    length, limit = 3 + number * 5 % 13, 4 + number * 7 % 19
    return request(tokens(1, length, seed=number)[0].tolist(), limit, number)


def answer(generator: Generator, number: int) -> Answer:
    return generator.begin(numbered(number))


def alone(generator: Generator, number: int) -> list[int]:
    return generator.answer([numbered(number)])[0].tokens


@pytest.fixture(scope="module")
def want(generator) -> list[list[int]]:
    found = [alone(generator, number) for number in range(10)]
    assert len({len(one) for one in found}) > 4 and any(one[-1] in ENDS for one in found)
    return found


@settings(max_examples=30 if ALL else 6)
@given(order=st.permutations(range(10)), size=st.sampled_from([1, 3, 4, 10, 32] if ALL else [3, 32]))
def test_an_answer_depends_on_its_request_alone(generator, want, order, size):
    """In any order, with any number of requests at a time."""
    found = generator.answer([numbered(number) for number in order], batch_size=size)
    assert [one.tokens for one in found] == [want[number] for number in order]


def poisoned(generator: Generator, token: int) -> dict:
    """Return the parameters, with NaN in the embedding of one token."""
    [path] = (path for path, spec in generator.model.specs.items() if spec.hf_template.endswith("embed_tokens.weight"))
    return {**generator.params, path: generator.params[path].at[token].set(jnp.nan)}


def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt(generator, want):
    clean = [n for n in range(10) if 95 not in [*numbered(n).prompt, *want[n]]]
    broken = Generator.of(generator.model, poisoned(generator, 95), words(), mesh=one_device(), dtype=jnp.float32)
    broken.ends = ENDS
    assert [one.tokens for one in broken.answer([numbered(n) for n in clean])] == [want[n] for n in clean]
    with pytest.raises(NotFinite, match="prompt 2"):
        broken.answer([numbered(clean[0]), Request([95, 7, 8]), numbered(clean[1])])


def test_nothing_is_compiled_for_other_requests(generator, lowered):
    """Neither by the number of requests nor by their settings; nothing is kept from call to call but programs."""
    generator.answer([numbered(number) for number in range(7)], batch_size=3)
    first = lowered()
    generator.answer([numbered(number) for number in (9, 8, 3, 4, 5, 6, 7)], batch_size=3)
    assert lowered() == first


def test_layers_of_several_kinds_take_no_more_programs(tmp_path, lowered):
    def programs(generator) -> int:
        before = lowered()
        generator.answer([numbered(number) for number in range(7)], batch_size=4)
        return lowered() - before

    uniform = made(tmp_path, LLAMA)
    assert 0 < programs(generator_of(*make(HYBRID))) <= programs(uniform) == 3  # to make arrays, to read and to decode


def test_requests_that_all_fit_take_two_programs(generator, lowered):
    generator.answer([numbered(number) for number in range(5)])
    fresh, before = generator_of(generator.model, generator.params), lowered()
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
    each = [generator.answer([one])[0].tokens for one in requests]
    assert found == each and len(set(map(tuple, found))) > 2
    assert sum(sizes) == (2 * 112 + 16 * PAGE if generator.engine.keeps_prefixes else 16 * 112)


def test_a_beginning_that_all_have_is_read_once_if_it_is_long(generator, monkeypatch):
    beginning = tokens(1, 200, seed=3)[0].tolist()
    requests = [Request([*beginning, *tokens(1, 20 + n, seed=n)[0].tolist()], max_new_tokens=3) for n in range(4)]
    found, sizes = reads(generator, requests, monkeypatch)
    assert found == [generator.answer([one])[0].tokens for one in requests]
    assert sum(sizes) <= (224 + 4 * 40 if generator.engine.keeps_prefixes else 4 * 224)
    short = [Request([*beginning[:40], *tokens(1, 60, seed=n)[0].tolist()], max_new_tokens=3) for n in range(4)]
    assert len(reads(generator, short, monkeypatch)[1]) == 1


def test_long_prompts_are_read_in_equal_parts(generator, monkeypatch):
    """The attention scores of whole prompts never exist at once."""
    requests = [Request(tokens(1, length, seed=length)[0].tolist(), max_new_tokens=3) for length in (200, 180, 20)]
    found, sizes = reads(generator, requests, monkeypatch)
    assert found == [generator.answer([one])[0].tokens for one in requests]
    monkeypatch.setattr("ftjax.generate.batch.SCORES", 3 * generator.model.sizes.heads * 224 * 56)
    parts, smaller = reads(generator, requests, monkeypatch)
    assert parts == found and len(sizes) == 1 and len(smaller) > 3 and len(set(smaller)) == 1


def test_pages_for_texts_of_unlike_lengths(generator, monkeypatch):
    """A long text does not make room of its length for all others."""
    made, prompts = [], [tokens(1, 150, seed=1)[0].tolist(), *(tokens(1, 9, seed=n)[0].tolist() for n in range(7))]
    answers = [generator.begin(Request(prompt, max_new_tokens=5)) for prompt in prompts]

    def watched(engine, params, room):
        made.append(room)
        return PagedBatch(engine, params, room)

    monkeypatch.setattr("ftjax.generate.offline.PagedBatch", watched)
    for _ in answer_all(generator.engine, generator.params, answers, 8, 32):
        pass
    [room] = made
    assert room.rows == 8 and 10 <= room.context // PAGE <= 12 and 10 + 7 <= room.pages <= 8 * 12 // 2
    assert all(one.finish for one in answers)


def test_texts_that_outgrow_their_frequencies(tmp_path):
    """With LongRoPE, a row that passes the original length is computed anew, without effect on its neighbours."""
    generator = made(tmp_path, Case("phi3", "phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 64}))
    found = generator.answer([numbered(number) for number in (1, 2, 3)])
    assert [one.tokens for one in found] == [alone(generator, number) for number in (1, 2, 3)]


def test_rows_are_sharded(generator):
    """Layers of all kinds, with rows on eight devices, give the answers of one device."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    params = jax.device_put(generator.params, jax.NamedSharding(mesh, jax.P()))
    spread = generator_of(generator.model, params, mesh)
    numbers = range(10)
    found = spread.answer([numbered(number) for number in numbers], batch_size=8)
    assert [one.tokens for one in found] == [alone(generator, number) for number in numbers]


def test_a_kernel_reads_pages(tmp_path):
    """Prompts in parts, a beginning that is there already, windows, a cap and grouped heads: on four devices in interpret mode,
    the answers of one device that gathers pages."""
    sizes = {"head_dim": 16, "initializer_range": 0.1, "sliding_window": 20}
    case = Case("gemma2", "gemma2", {**sizes, "layer_types": ["sliding_attention", "full_attention"]})
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    one = made(tmp_path / "one", case)
    requests = [request(tokens(1, length, seed=length)[0].tolist(), 5, length) for length in (3, 51)]
    requests += [Request([*tokens(1, 40, seed=1)[0].tolist(), number], SAMPLINGS[1], 5, number=number) for number in range(2)]
    with interpreted():
        spread = made(tmp_path / "spread", case, mesh)
        found = spread.answer(requests)
    assert spread.engine.attention == "a kernel reads pages in place" and "gathered" in one.engine.attention
    assert [answer.tokens for answer in found] == [answer.tokens for answer in one.answer(requests)]


@settings(max_examples=30 if ALL else 6)
@given(
    order=st.permutations(range(8)),
    rows=st.integers(1, 4) if ALL else st.just(2),
    steps=st.integers(1, 7),
    slots=st.sampled_from([None, 64]),
)
def test_a_stream_gives_each_request_its_own_answer(generator, want, order, rows, steps, slots):
    """In any order of requests and rows, the pieces join to the answer, and other requests continue meanwhile."""
    requests = [numbered(number) for number in order]
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
