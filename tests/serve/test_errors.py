"""Tests what a server refuses, and how: OpenAI's form of errors, with the field."""

import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import openai
import pytest
from serve.conftest import running

CHAT = [{"role": "user", "content": "Tom"}]


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(url, body, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "expected 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"n": True}, "n", "integer"),
        ({"logit_bias": {"5": True}}, "logit_bias.5", "number"),
        ({"top_p": 3}, "top_p", "at most 1"),
        ({"presence_penalty": 5}, "presence_penalty", "between -2 and 2"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 9999}, "max_tokens", "context"),
        ({"messages": []}, "messages", "at least 1"),
        ({"chat_template_kwargs": {"tools": []}}, "messages", "chat_template_kwargs cannot set tools"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "expected one of"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0", "text only"),
        ({"messages": [{"role": "user", "content": "Tom " * 400}]}, "messages", "context"),
        ({"logit_bias": {"7000": 1}}, "logit_bias", "not a token"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "less than or equal"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"temprature": 1}, "temprature", "unknown field"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"stream": "yes"}, "stream", "boolean"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(server, change, param, says):
    body = {"model": "tiny", "messages": CHAT, **change}
    status, answer = post(f"{server.url}/v1/chat/completions", json.dumps(body).encode())
    assert status == 400 and answer["error"]["param"] == param, answer
    assert says in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_what_is_not_there(server, client):
    with pytest.raises(openai.NotFoundError, match="there is tiny") as error:
        client.chat.completions.create(model="huge", messages=CHAT)
    assert error.value.code == "model_not_found"
    assert post(f"{server.url}/v1/images", b"{}")[0] == 404
    status, text = get(f"{server.url}/v1/chat/completions")
    assert status == 405 and "error" in json.loads(text)


def test_bodies_that_are_no_requests(server):
    assert post(f"{server.url}/v1/chat/completions", b"{")[0] == 400
    assert post(f"{server.url}/v1/chat/completions", b"[]")[0] == 400
    body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    assert post(f"{server.url}/v1/completions", body, **{"content-type": "text/plain"})[0] == 415
    assert post(f"{server.url}/v1/completions", body, **{"content-type": "Application/JSON; charset=utf-8"})[0] == 200
    status, answer = post(f"{server.url}/v1/completions", b" " * (17 << 20))
    assert status == 413 and "16 MB" in answer["error"]["message"]


def test_a_client_that_hangs_up_within_its_request(server, caplog):
    for _ in range(2):
        with socket.create_connection(urlsplit(server.url).netloc.split(":")) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
            )
    until(lambda: 'path="/v1/completions",status="499"} 2.0' in get(f"{server.url}/metrics")[1])
    assert not caplog.records


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


def test_metrics_and_health(server, client):
    client.completions.create(model="tiny", prompt="Tom", max_tokens=3, temperature=0)
    status, text = get(f"{server.url}/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and float(lines['ftjax_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(lines["ftjax_generated_tokens_total"]) >= 1 and float(lines["ftjax_time_to_first_token_seconds_count"]) >= 1
    assert lines["ftjax_requests_waiting"] == lines["ftjax_requests_running"] == "0.0"
    assert 0 <= float(lines["ftjax_cache_kept_ratio"]) <= 1 and lines["ftjax_cache_used_ratio"] == "0.0"
    assert get(f"{server.url}/health") == (200, '{"status":"ok"}')


def test_the_page(server):
    status, text = get(f"{server.url}/")
    assert (
        status == 200 and "<html" in text and "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    )


def test_keys(generator, batch):
    with running(generator, batch, keys=["first", "second"]) as server:
        for key in ("first", "second"):
            assert server.client(api_key=key).models.list().data
            assert get(f"{server.url}/metrics", authorization=f"bearer  {key}")[0] == 200
        for key in ("wrong", "firs", "firsts"):
            with pytest.raises(openai.AuthenticationError) as error:
                server.client(api_key=key).models.list()
            assert error.value.code == "invalid_api_key"
        assert get(f"{server.url}/health")[0] == 200 and get(f"{server.url}/metrics")[0] == 401


def test_a_full_queue(generator, batch):
    with running(generator, batch, limit=3) as server:
        client = server.client()
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="tiny", messages=CHAT, n=4, max_tokens=2)
        assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"
        assert client.chat.completions.create(model="tiny", messages=CHAT, n=3, max_tokens=2).choices


def held(server, monkeypatch) -> threading.Event:
    """Make the engine wait before each step until the event is set."""
    go, step = threading.Event(), server.engine.scheduler.step

    def waiting() -> None:
        go.wait(60)
        step()

    monkeypatch.setattr(server.engine.scheduler, "step", waiting)
    return go


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_hangs_up_frees_its_row(generator, batch, monkeypatch, stream):
    with running(generator, batch) as server:
        go = held(server, monkeypatch)
        asked = {"model": "tiny", "messages": CHAT, "max_tokens": 200, "n": 3, "logit_bias": {"2": -100}}
        client = server.client(timeout=0.5)
        if stream:
            answer = client.chat.completions.create(**asked, stream=True)
            next(iter(answer))  # the role
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(**asked)
        until(lambda: all(job.cancelled for job in server.engine.jobs))
        go.set()
        until(lambda: not server.engine.load)
        assert server.engine.scheduler.idle and server.engine.scheduler.decoded < 3 * 200
        assert server.client().chat.completions.create(model="tiny", messages=CHAT, max_tokens=2).choices


def test_draining(generator, batch, monkeypatch):
    """After SIGTERM a request that is there ends, others get 503, and then the server ends."""
    with running(generator, batch) as server:
        go, found = held(server, monkeypatch), []
        asked = {"model": "tiny", "messages": CHAT, "max_tokens": 20, "temperature": 0}
        one = threading.Thread(target=lambda: found.append(server.client().chat.completions.create(**asked)))
        one.start()
        until(lambda: server.engine.load)
        server.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError) as error:
            server.client().chat.completions.create(**asked)
        assert error.value.status_code == 503 and error.value.code == "draining"
        assert get(f"{server.url}/health") == (503, '{"status":"draining"}')
        go.set()
        one.join()
        assert found[0].choices[0].finish_reason
        until(lambda: server.server.should_exit)


def test_an_engine_that_fails_says_so(generator, batch, monkeypatch):
    with running(generator, batch) as server:

        def broken() -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(server.engine.scheduler, "step", broken)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                server.client().chat.completions.create(model="tiny", messages=CHAT)
        assert get(f"{server.url}/health")[0] == 500
