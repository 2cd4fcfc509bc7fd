"""Tests that no request, however wrong, brings the server down: no 500, no traceback, no row that stays taken.

`make test` tries 100 requests, `make test-all` 10,000. Each is made from its number, which a failure names.
"""

import concurrent.futures
import http.client
import json
import logging
import time
from collections import Counter
from urllib.parse import urlsplit

import numpy as np
import pytest
from processes import ALL
from serve.conftest import ROOM, running

from ftjax.generate.adapters import AdapterStack
from ftjax.generate.paged import PagedBatch
from ftjax.serve.adapters import Adapters

COUNT = 10_000 if ALL else 100
TEXTS = [
    "", "Tom", "Tom went to the park. " * 9, "\ud800", "\x00", "é\u200f😀", "<think>", "</s><s>", "{{ 1/0 }}", "x" * 5000,
    "../../etc/passwd", "a/" * 3000, "null", "-1", "\n" * 40,
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 0.5, 1e-30, 1e300, 2**31, 2**63, -(2**70), 10**30, float("nan"), float("inf"), 16, 384]
SCHEMAS = [
    {}, {"type": "object"}, {"type": "nothing"}, {"$ref": "#/nowhere"}, {"pattern": "("}, {"enum": []}, {"type": "string"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"anyOf": [{"type": "null"}, {"$ref": "#"}]}, {"minLength": 10**9, "type": "string"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}]


def anything(rng: np.random.Generator, depth: int = 0):
    """Return any JSON value."""
    kind = rng.integers(8 if depth < 3 else 5)
    if kind == 0:
        return [None, True, False][rng.integers(3)]
    if kind in (1, 2):
        return NUMBERS[rng.integers(len(NUMBERS))]
    if kind in (3, 4):
        return TEXTS[rng.integers(len(TEXTS))]
    some = [anything(rng, depth + 1) for _ in range(rng.integers(4))]
    return some if kind == 5 else {TEXTS[rng.integers(len(TEXTS))][:20]: one for one in some}


def fields(rng: np.random.Generator) -> dict:
    """Return fields of a request, most of them valid."""

    def one(*of):
        return of[rng.integers(len(of))]

    text = TEXTS[rng.integers(len(TEXTS))]
    return {
        "messages": [{"role": one("user", "system", "assistant", "tool"), "content": text} for _ in range(rng.integers(1, 4))],
        "prompt": one(text, [text, "Tom"], [5, 6, 7], [[5], [9, 4]], [2**31], [[]], []),
        "input": one(text, [text], [3, 4]),
        "max_tokens": one(1, 3, 9, 40, 384, 0),
        "temperature": one(0, 0.0, 0.7, 2.0, 1e-30),
        "top_p": one(1.0, 0.5, 1e-9),
        "top_k": one(0, 1, 5, -1, 10**9),
        "min_p": one(0.0, 0.1, 1.0),
        "n": one(1, 2, 3),
        "seed": one(0, -1, 2**40, 7),
        "stop": one(None, text, ["a", text], [""]),
        "logprobs": one(None, True, False, 0, 3, 20),
        "top_logprobs": one(None, 0, 5),
        "logit_bias": one({}, {"5": 100}, {"5": -100, "9": 3.5}, {"-1": 1}, {"9" * 400: 1}),
        "presence_penalty": one(0, 2, -2),
        "repetition_penalty": one(1.0, 1.3, 1e-30, 1e30),
        "stream": one(True, False),
        "echo": one(True, False),
        "stream_options": one(None, {"include_usage": True}, {}),
        "tools": one(None, TOOLS, [{"type": "function", "function": {"name": text}}]),
        "tool_choice": one("auto", "none", "required", {"type": "function", "function": {"name": "go"}}),
        "response_format": one(
            {"type": "text"}, {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMAS[rng.integers(len(SCHEMAS))]}},
        ),
        "chat_template_kwargs": one({}, {"enable_thinking": True}, {"messages": 1}, {"tokenize": True}, {"quiet": text}),
        "pooling": one("last", "mean"),
        "encoding_format": one("float", "base64"),
        "lora_name": one(text, "own", "tiny"),
        "lora_path": one(text, "all", "dora", "."),
    }  # fmt: skip


ASKED = {
    "/v1/chat/completions": (("messages",), "max_tokens temperature top_p top_k min_p n seed stop logprobs top_logprobs "
        "logit_bias presence_penalty repetition_penalty stream stream_options tools tool_choice response_format "
        "chat_template_kwargs"),
    "/v1/completions": (("prompt",), "max_tokens temperature top_p top_k min_p n seed stop logprobs logit_bias "
        "repetition_penalty stream stream_options echo"),
    "/v1/embeddings": (("input",), "pooling encoding_format"),
    "/v1/load_lora_adapter": (("lora_name", "lora_path"), ""),
    "/v1/unload_lora_adapter": (("lora_name",), ""),
}  # fmt: skip


def request(number: int) -> tuple[str, str, bytes, dict[str, str], bool]:
    """Return `(method, path, body, headers, whether the client hangs up)`."""
    rng = np.random.default_rng(number)
    path = rng.choice(list(ASKED), p=[0.5, 0.3, 0.1, 0.05, 0.05])
    needed, others = ASKED[path]
    known = fields(rng)
    chosen = [name for name in others.split() if rng.random() < 0.15]
    body = {"model": "tiny" if rng.random() < 0.95 else "own", **{name: known[name] for name in (*needed, *chosen)}}
    if path.startswith(("/v1/load", "/v1/unload")):
        del body["model"]
    for _ in range(rng.choice([0, 0, 0, 1, 2])):  # what is wrong
        body[rng.choice([*known, "model", "unknown"])] = anything(rng)
    raw, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    method = "POST"
    damage = rng.random()
    if damage < 0.03:
        raw = raw[: rng.integers(len(raw))]
    elif damage < 0.06:
        raw = bytes(rng.permutation(np.frombuffer(raw, np.uint8)))
    elif damage < 0.07:
        raw = b"[" * 100_000
    elif damage < 0.08:
        raw = b"\xff\xfe" + raw
    elif damage < 0.09:
        headers["content-type"] = "text/plain"
    elif damage < 0.11:
        path, method = path + "/x", str(rng.choice(["GET", "POST", "DELETE", "PUT"]))
    return method, path, raw, headers, rng.random() < 0.1


def send(url: str, number: int) -> tuple[int | None, str]:
    """Return the status, and what is wrong with the answer; None for a request that was hung up."""
    method, path, body, headers, hangs_up = request(number)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    try:
        connection.request(method, path, body, headers)
        if hangs_up:
            return None, ""
        answer = connection.getresponse()
        text = answer.read().decode()
        status = answer.status
    finally:
        connection.close()
    if status == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            *events, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
            wrong = last != "[DONE]" or any("error" in json.loads(event) for event in events)
        else:
            wrong = "error" in json.loads(text)
    else:
        wrong = status >= 500 or set(json.loads(text)["error"]) != {"message", "type", "param", "code"}
    return status, f"request {number}, {path}: {status} {text[:300]}" if wrong else ""


@pytest.fixture(scope="module")
def open_server(chatty, folders):
    """A server that loads adapters by request."""
    stack = AdapterStack.load(str(chatty), places=2, rank=8, wanted=lambda name: "lm_head" not in name, dtype="float32")
    stack.fill(1, None)
    batch = PagedBatch(stack.generator.engine, stack.generator.params, ROOM)
    batch.warm_up()
    with running(stack.generator, batch, adapters=lambda served: Adapters(stack, served, folders)) as server:
        yield server


def test_requests_of_all_kinds(open_server, caplog, lowered):
    server, client = open_server, open_server.client()
    asked = {"model": "tiny", "prompt": "Tom went", "max_tokens": 12, "temperature": 1, "seed": 3}
    before, programs = client.completions.create(**asked).choices[0].text, lowered()
    with caplog.at_level(logging.ERROR), concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: send(server.url, number), range(COUNT)))
    wrong = [text for _, text in found if text]
    assert not wrong, "\n".join(wrong[:5])
    assert not caplog.records, caplog.text
    statuses = Counter(status for status, _ in found)
    assert statuses[200] > COUNT / 6 and statuses[400] > COUNT / 6 and statuses[None] > COUNT / 50, statuses
    deadline = time.monotonic() + 120
    while server.engine.load:
        assert time.monotonic() < deadline, "a row stays taken"
        time.sleep(0.01)
    assert not server.engine.scheduler.running and all(pool.used == 0 for pool in server.engine.scheduler.pools)
    assert client.completions.create(**asked).choices[0].text == before
    assert lowered() == programs
