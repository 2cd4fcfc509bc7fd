"""Tests adapters per request: each row of a batch has its own, and answers as if it were served alone."""

import concurrent.futures
import json
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
from generate.engines import answered_alone
from serve.conftest import OTHERS, PLAIN, ROOM, running

from ftjax.errors import UserError
from ftjax.generate import separate
from ftjax.generate.adapters import AdapterStack, updates_of
from ftjax.generate.paged import PagedBatch
from ftjax.generate.request import Request
from ftjax.generate.scheduler import Job, Scheduler
from ftjax.generate.session import Generator
from ftjax.hub.load import read_hf_config
from ftjax.serve.adapters import Adapters

CHAT = [{"role": "user", "content": "Tom went to the park."}]


@pytest.fixture(scope="module")
def stack(chatty) -> AdapterStack:
    found = AdapterStack.load(str(chatty), places=3, rank=8, wanted=lambda name: name != "lm_head", dtype="float32")
    found.fill(1, None)
    return found


@pytest.fixture(scope="module")
def batch(stack) -> PagedBatch:
    with pytest.MonkeyPatch.context() as patch:  # layers are called one by one, as those of large models are; `alone` scans
        patch.setattr(separate, "WORTH", 0)
        found = PagedBatch(stack.generator.engine, stack.generator.params, ROOM)
    found.warm_up()
    return found


NAMES = ["tiny", *PLAIN]  # the base model and the adapters


def of_a_batch(number: int) -> tuple[str, Request]:
    """Return request `number` of a batch and whose it is."""
    kind = {"temperature": 1.0} if number % 3 else {}
    request = Request.of(CHAT if number % 2 else "The dog", max_new_tokens=12, seed=3, number=number, **kind)
    return NAMES[number % 4], request


LONG, SHORT = Request.of(CHAT, max_new_tokens=60, logit_bias={2: -100}), Request.of(CHAT, max_new_tokens=10)


@pytest.fixture(scope="module")
def alone(chatty, folders):
    """Return a function to the answer of the base model, or of one with an adapter that is not merged, where nothing else
    runs."""
    found = {name: Generator(str(chatty), folders / name, dtype="float32", merge=False) for name in PLAIN}
    found["tiny"] = Generator(str(chatty), dtype="float32")
    return lambda name, request: answered_alone(found[name], request)


@pytest.fixture
def server(stack, batch, folders):
    for place in range(1, 4):
        stack.fill(place, None)
    with running(stack.generator, batch, adapters=lambda served: Adapters(stack, served, folders)) as found:
        yield found


def test_rows_of_one_batch_have_their_own_adapters(stack, batch, alone, folders):
    """Tokens and log-probabilities are those of each adapter alone; samples differ from adapter to adapter."""
    places = {name: place for place, name in enumerate(NAMES)}
    for name, place in places.items():
        if place:
            stack.fill(place, stack.read(folders / name))
    scheduler, jobs, requests = Scheduler(batch), [], []
    for number in range(12):
        name, request = of_a_batch(number)
        job = Job(stack.generator.begin(request), adapter=places[name], space=places[name])
        scheduler.submit(job)
        jobs.append(job)
        requests.append((name, request))
    while not scheduler.idle:
        scheduler.step()
    texts = set()
    for job, (name, request) in zip(jobs, requests, strict=True):
        expected = alone(name, request)
        assert job.answer.tokens == expected.tokens, name
        np.testing.assert_allclose(job.answer.logprobs, expected.logprobs, atol=2e-5)
        texts.add((name, tuple(expected.tokens)))
    assert len({tokens for _, tokens in texts}) > 4


def load(server, name: str, path: str | None = None) -> tuple[int, dict]:
    return post(server, "load", {"lora_name": name, "lora_path": name if path is None else path})


def post(server, verb: str, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"{server.url}/v1/{verb}_lora_adapter", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_loading_and_unloading_while_others_run(server, alone, lowered):
    """Nothing is compiled, running requests keep their adapter, and a new one does not find an old one's cache."""
    client = server.client()
    asked = {"messages": CHAT, "temperature": 0, "max_tokens": 60, "logit_bias": {"2": -100}}
    expected = {name: alone(name, LONG).text for name in NAMES}
    assert len(set(expected.values())) == 4
    before = lowered()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        base = pool.submit(client.chat.completions.create, model="tiny", **asked)
        for name in PLAIN:
            assert load(server, name)[0] == 200
        assert [model.id for model in client.models.list().data] == ["tiny", *PLAIN]
        many = {name: pool.submit(client.chat.completions.create, model=name, **asked) for name in PLAIN}
        assert base.result().choices[0].message.content == expected["tiny"]
        assert {name: one.result().choices[0].message.content for name, one in many.items()} == {n: expected[n] for n in PLAIN}
        stream = client.chat.completions.create(model="all", **asked, stream=True)
        said = next(iter(stream)).choices[0].delta.content
        assert post(server, "unload", {"lora_name": "all"})[0] == 200
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="all", **asked)
        said += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert said == expected["all"]
    assert post(server, "unload", {"lora_name": "some"})[0] == 200
    assert load(server, "again", "layer")[0] == load(server, "some")[0] == 200
    for name, same in (("again", "layer"), ("some", "some"), ("tiny", "tiny")):
        assert client.chat.completions.create(model=name, **asked).choices[0].message.content == expected[same]
    assert lowered() == before


def test_adapters_that_are_not_loaded(server, folders):
    for path in ("..", "/etc", "nowhere", "../" + folders.name + "x"):
        status, answer = load(server, "x", path)
        assert status == 400 and answer["error"]["param"] == "lora_path", path
    for name, (_, says) in OTHERS.items():
        status, answer = load(server, name)
        assert status == 400 and says in answer["error"]["message"], answer
    assert load(server, "tiny", "all")[1]["error"]["param"] == "lora_name"
    assert [load(server, name)[0] for name in PLAIN] == [200] * 3
    assert "all 3 places" in load(server, "more", "all")[1]["error"]["message"]
    assert load(server, "some")[0] == 400  # the name is taken
    for name in ("tiny", "nobody"):
        assert post(server, "unload", {"lora_name": name})[0] == 404


def test_a_place_is_not_taken_between_a_request_and_its_start(server):
    """A request that was read before its adapter was unloaded does not run with the next one in its place."""
    from ftjax.serve.errors import ApiError
    from ftjax.serve.protocol import ChatRequest

    assert load(server, "all")[0] == 200
    jobs, _ = server.served.chat(ChatRequest(model="all", messages=CHAT))
    assert post(server, "unload", {"lora_name": "all"})[0] == 200
    assert load(server, "all", "some")[0] == 200
    with pytest.raises(ApiError, match="unloaded"):
        server.engine.submit(jobs, lambda: server.served.serves("all", jobs))
    assert not server.engine.load


def test_loading_that_the_start_did_not_allow(stack, batch):
    with running(stack.generator, batch) as server:
        status, answer = load(server, "all")
        assert status == 403 and "--adapter-root" in answer["error"]["message"]


def test_room_for_the_adapters_of_the_start(chatty, folders):
    rank, wanted = updates_of([folders / "some", folders / "layer"], read_hf_config(chatty))
    assert rank == 6
    assert wanted("model.layers.0.mlp.down_proj") and wanted("model.layers.1.mlp.up_proj")
    assert not wanted("model.layers.0.mlp.up_proj") and not wanted("model.layers.0.self_attn.o_proj")
    small = AdapterStack.load(str(chatty), places=1, rank=rank, wanted=wanted, dtype="float32")
    with pytest.raises(UserError, match="no room for"):
        small.read(folders / "all")
    assert small.read(folders / "some")


def test_a_stack_on_a_mesh(chatty, folders, alone):
    """Rows on two devices and heads on two give the answers of one device."""
    from ftjax.generate.open import mesh_of

    stack = AdapterStack.load(
        str(chatty), places=2, rank=6, wanted=lambda name: True, dtype="float32", mesh=mesh_of({"data": 2, "tensor": 2})
    )
    for place, name in enumerate(("all", "some"), 1):
        stack.fill(place, stack.read(folders / name))
    batch = PagedBatch(stack.generator.engine, stack.generator.params, ROOM)
    scheduler, jobs = Scheduler(batch), {}
    for place, name in enumerate(("tiny", "all", "some")):
        jobs[name] = Job(stack.generator.begin(SHORT), adapter=place, space=place)
        scheduler.submit(jobs[name])
    while not scheduler.idle:
        scheduler.step()
    for name, job in jobs.items():
        assert job.answer.tokens == alone(name, SHORT).tokens
