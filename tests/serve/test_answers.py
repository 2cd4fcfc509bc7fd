"""Tests the answers of the server through OpenAI's own client: they are those of the engine without a server."""

import concurrent.futures
import json
import math
from types import SimpleNamespace
from typing import Literal

import numpy as np
import openai
import pyarrow as pa
import pytest
from generate.engines import answered_alone
from pydantic import BaseModel

from ftjax.config import Config
from ftjax.generate.request import Request
from ftjax.rl.teach import teach
from ftjax.serve.forms import News, TextChoice

CHAT = [{"role": "user", "content": "Tom went to the park."}]


def want(server, prompt, *, chat=True, **settings):
    """Return the answer without a server; the seed of choice n is its number."""
    return answered_alone(server.generator, Request.of(prompt, chat=chat, **settings))


def test_a_chat(server, client):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=12)
    found = want(server, CHAT, max_new_tokens=12)
    assert answer.choices[0].message.content == found.text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == found.finish_reason
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (found.prompt_tokens, len(found.tokens))
    assert answer.model == "tiny" and answer.id.startswith("chatcmpl-")


def test_a_stream_joins_to_the_answer(server, client):
    asked = {"model": "tiny", "messages": CHAT, "temperature": 1.0, "seed": 4, "n": 3, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    texts, ends, usage = ["", "", ""], [None] * 3, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert ends[choice.index] is None
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) > 1
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    alone = [want(server, CHAT, temperature=1.0, seed=4, number=n, max_new_tokens=20).text for n in range(3)]
    assert texts == alone


def test_many_at_a_time_are_as_each_alone(server, client, lowered):
    """Requests of all kinds, at the same time, give what each gives alone, and nothing is compiled."""
    rng = np.random.default_rng(0)
    kinds = [
        {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"temperature": 0, "frequency_penalty": 1.0},
        {"temperature": 1.2, "seed": 7, "presence_penalty": 1.5},
        {"temperature": 1, "seed": 1, "logit_bias": {"300": 4.0, "17": -100}},
    ]  # fmt: skip
    asked = []
    for number in range(15):
        text = " ".join(rng.choice(["Tom", "park", "the", "dog", "ran", "and"], rng.integers(1, 40)))
        asked.append((text, {**kinds[number % 5], "max_tokens": int(rng.integers(1, 30))}))
    expected = []
    for text, settings in asked:
        own = {**settings, "max_new_tokens": settings["max_tokens"]}
        own = {name: value for name, value in own.items() if name != "max_tokens"}
        own["logit_bias"] = {int(token): value for token, value in own.get("logit_bias", {}).items()}
        expected.append(want(server, text, chat=False, **own))
    before = lowered()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: client.completions.create(model="tiny", prompt=one[0], **one[1]), asked))
    assert [one.choices[0].text for one in found] == [one.text for one in expected]
    assert [one.usage.completion_tokens for one in found] == [len(one.tokens) for one in expected]
    assert lowered() == before


def test_extensions_of_other_servers(server, client):
    extra = {"top_k": 3, "min_p": 0.01, "repetition_penalty": 1.2}
    found = client.completions.create(model="tiny", prompt="A", seed=5, temperature=1, max_tokens=9, extra_body=extra)
    assert found.choices[0].text == want(server, "A", chat=False, seed=5, temperature=1.0, max_new_tokens=9, **extra).text


def test_stop_strings(server, client):
    whole = want(server, CHAT, max_new_tokens=40, repetition_penalty=1.3)
    stop = whole.text[len(whole.text) // 2 :][:3]
    expected = want(server, CHAT, max_new_tokens=40, repetition_penalty=1.3, stop=(stop,))
    asked = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 40, "stop": [stop]}
    found = client.chat.completions.create(**asked, extra_body={"repetition_penalty": 1.3})
    assert found.choices[0].message.content == expected.text == whole.text[: whole.text.index(stop)]
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens == len(expected.tokens)
    stream = client.chat.completions.create(**asked, extra_body={"repetition_penalty": 1.3}, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected.text


def test_several_prompts(server, client):
    prompts = ["Tom", [5, 9, 30], "The dog ran"]
    found = [
        client.completions.create(model="tiny", prompt=one, temperature=0, max_tokens=5).choices[0].text for one in prompts
    ]
    texts = client.completions.create(model="tiny", prompt=[prompts[0], prompts[2]], temperature=0, max_tokens=5, n=2)
    assert [choice.text for choice in texts.choices] == [found[0]] * 2 + [found[2]] * 2
    assert texts.usage.prompt_tokens == sum(len(server.generator.encode(one, chat=False)) for one in (prompts[0], prompts[2]))
    ids = client.completions.create(model="tiny", prompt=[prompts[1]], temperature=0, max_tokens=5)
    assert ids.choices[0].text == found[1]


def test_log_probabilities(server, client):
    """The chosen tokens' and the most probable ones', under the model itself; streamed too."""
    expected = server.generator.answer([Request.of(CHAT, max_new_tokens=8)], logprobs=True)[0]
    asked = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 4}
    found = client.chat.completions.create(**asked).choices[0].logprobs.content
    tokens = [token for token in expected.tokens if token not in server.generator.ends]
    np.testing.assert_allclose([one.logprob for one in found], expected.logprobs[: len(tokens)], atol=1e-5)
    assert [one.token for one in found] == [
        server.served.voice("tiny").grammars.decode(token).decode("utf-8", "replace") for token in tokens
    ]
    for one in found:
        assert len(one.top_logprobs) == 4 and one.top_logprobs[0].token == one.token  # greedy
        values = [top.logprob for top in one.top_logprobs]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) < 1
        assert bytes(one.bytes).decode("utf-8", "replace") == one.token
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        listed = chunk.choices[0].logprobs
        streamed += listed.content if listed else []
    assert streamed == found
    plain = client.completions.create(model="tiny", prompt="Tom", temperature=0, max_tokens=4, logprobs=2).choices[0].logprobs
    assert len(plain.tokens) == len(plain.token_logprobs) == len(plain.top_logprobs) == len(plain.text_offset)
    assert all(len(one) <= 2 for one in plain.top_logprobs)


def test_a_json_schema_is_kept(server, client):
    """Random weights say nothing else than what the schema allows; the text parses as soon as it ends by itself."""
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"], "additionalProperties": False,
    }  # fmt: skip
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(4):
        found = client.chat.completions.create(
            model="tiny", messages=CHAT, temperature=1, seed=seed, max_tokens=120, response_format=given
        )  # fmt: skip
        choice = found.choices[0]
        assert choice.finish_reason == "stop", choice
        value = json.loads(choice.message.content)
        assert set(value) == {"n", "ok"} and value["n"] in (1, 2, 3) and isinstance(value["ok"], bool)


class Weather(BaseModel):
    city: Literal["Rome", "Oslo"]
    warm: bool


def test_the_client_parses_its_own_types(client):
    found = client.chat.completions.parse(model="tiny", messages=CHAT, response_format=Weather, temperature=1, seed=3)
    assert isinstance(found.choices[0].message.parsed, Weather)


def test_a_schema_that_cannot_be_kept(client):
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=CHAT, response_format=given)
    assert error.value.param == "response_format"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"], "additionalProperties": False,
            },
        },
    }
]  # fmt: skip


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call_of_a_tool(client, choice):
    """A call that is asked for comes in the template's form, and is parsed."""
    asked = {
        "model": "tiny",
        "messages": CHAT,
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": 1,
        "seed": 2,
        "max_tokens": 150,
    }
    found = client.chat.completions.create(**asked).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content is None
    (call,) = found.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["days"] in (1, 2)
    parts = [p.choices[0].delta.tool_calls for p in client.chat.completions.create(**asked, stream=True)]
    (streamed,) = (one for calls in parts if calls for one in calls)
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    after = [*CHAT, found.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert client.chat.completions.create(model="tiny", messages=after, tools=TOOLS, max_tokens=3, seed=1).choices


def test_reasoning_stands_apart(server, client):
    """What a prompt opens as reasoning is reasoning until it is closed; a schema begins after it."""
    asked = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 8}
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(**asked, extra_body=thinking).choices[0].message
    prompt = server.generator.encode(CHAT, chat=True, template_arguments={"enable_thinking": True})
    assert message.reasoning_content == want(server, prompt, chat=None, max_new_tokens=8).text and not message.content
    quiet = {"chat_template_kwargs": {"quiet": True}}
    message = client.chat.completions.create(**asked, extra_body=quiet).choices[0].message
    assert message.content and not hasattr(message, "reasoning_content")


def test_tools_are_in_the_prompt_unless_none_is_to_be_called(client):
    def tokens(**more) -> int:
        return client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=1, seed=1, **more).usage.prompt_tokens

    assert tokens(tools=TOOLS) > tokens(tools=TOOLS, tool_choice="none") == tokens()


def test_embeddings(server, client):
    found = client.embeddings.create(model="tiny", input=["Tom went", "The dog ran to the park and Tom"])
    assert len(found.data) == 2 and len(found.data[0].embedding) == server.generator.model.sizes.embed
    mean = client.embeddings.create(model="tiny", input="Tom went", extra_body={"pooling": "mean"}, encoding_format="float")
    assert not np.allclose(mean.data[0].embedding, found.data[0].embedding)
    assert found.usage.prompt_tokens == sum(
        len(server.generator.encode(text, chat=False)) for text in ("Tom went", "The dog ran to the park and Tom")
    )


def test_an_echo_has_the_probabilities_of_the_prompt(server, client):
    """Whether the prompt is short, or read in several parts, or there already; streamed too, with adapters beside."""
    for text in ("Tom ran", "Tom went to the park and the dog ran. " * 8):
        ids = server.generator.encode(text, chat=False)
        expected = server.generator.score([ids[:1]], [ids[1:]])[0]
        asked = {
            "model": "tiny",
            "prompt": text,
            "temperature": 0,
            "max_tokens": 4,
            "logprobs": 2,
            "extra_body": {"echo": True},
        }
        client.completions.create(model="tiny", prompt=text, temperature=0, max_tokens=1)  # its pages are there now
        found = client.completions.create(**asked).choices[0]
        alone = client.completions.create(model="tiny", prompt=text, temperature=0, max_tokens=4, logprobs=2).choices[0]
        assert found.text == text + alone.text
        listed = found.logprobs
        assert listed.token_logprobs[0] is None and listed.top_logprobs[0] is None
        np.testing.assert_allclose(listed.token_logprobs[1 : len(ids)], expected.logprobs, atol=1e-4)
        own = alone.logprobs.token_logprobs
        np.testing.assert_allclose(listed.token_logprobs[len(ids) :][: len(own)], own, atol=1e-4)
        best = [
            value == max(top.values()) for value, top in zip(listed.token_logprobs[1:], listed.top_logprobs[1:], strict=True)
        ]
        assert all(best[: len(ids) - 1]) == expected.greedy and all(best[len(ids) - 1 :])
        assert all(len(top) <= 2 for top in listed.top_logprobs[1:])
        stream = list(client.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in stream) == found.text
        assert [one for chunk in stream for one in chunk.choices[0].logprobs.tokens] == listed.tokens
    plain = client.completions.create(model="tiny", prompt=[5, 9], temperature=0, max_tokens=2, extra_body={"echo": True})
    assert plain.choices[0].text.startswith(server.generator.tokenizer.decode([5, 9])) and plain.choices[0].logprobs is None


def test_an_echo_alone(server, client):
    """With `max_tokens: 0`, as tools ask that score texts; without an echo it is refused."""
    ids = server.generator.encode("Tom ran", chat=False)
    asked = {"model": "tiny", "prompt": ["Tom ran", "The dog"], "max_tokens": 0, "logprobs": 1, "extra_body": {"echo": True}}
    answer = client.completions.create(**asked)
    assert [one.text for one in answer.choices] == asked["prompt"]
    assert {one.finish_reason for one in answer.choices} == {"length"} and answer.usage.completion_tokens == 0
    expected = server.generator.score([ids[:1]], [ids[1:]])[0]
    np.testing.assert_allclose(answer.choices[0].logprobs.token_logprobs[1:], expected.logprobs, atol=1e-4)
    stream = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in stream[:-1]) in ("Tom ranThe dog", "The dogTom ran")
    assert stream[-1].usage == answer.usage and "usage" in stream[0].model_fields_set and stream[0].usage is None
    with pytest.raises(openai.BadRequestError, match="max_tokens: 0 is for the prompt alone, with echo"):
        client.completions.create(**asked | {"extra_body": {}})


def test_a_server_is_a_teacher(server, chatty, tmp_path):
    """`ftjax teach` writes the predictions that it has from the teacher's folder; its likely tokens are named by their ids."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": one, "completion": f"{one} ran"}) + "\n" for one in "abc")
    )
    found = []
    for name, where in (("server", {"teacher_model_server_url": f"{server.url}/v1"}), ("folder", {})):
        objective = {
            "name": "distill", "teacher_model_name_or_path": "tiny" if where else str(chatty), "loss_top_k": 5,
            "teacher_logprobs": str(tmp_path / name), **where,
        }  # fmt: skip
        values = {
            "model": {"path": str(chatty), "dtype": "float32", "compute_dtype": "float32"}, "objective": objective,
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32}, "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        [path] = teach(Config.model_validate(values))
        found.append(pa.ipc.open_file(path).read_all().to_pydict())
    assert found[0]["ids"] == found[1]["ids"] and len(found[0]["ids"]) > 5
    for name in ("logprobs", "rest"):
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-4)


@pytest.mark.parametrize(
    "parts", [["Tom \u00e9\ufffd a \U0001f600b"], ["Tom", " \u00e9\ufffd a ", "\U0001f600", "b"]], ids=["whole", "stream"]
)
def test_offsets_are_places_in_the_text(parts):
    """Of an echo too, whose text lacks the mark at its start and a space, and where characters and marks are several bytes."""
    raws = [
        b"<s>",
        b" Tom",
        b" ",
        b"\xc3",
        b"\xa9",
        b"\xff",
        b" a",
        b" ",
        b"\xf0",
        b"\x9f",
        b"\x98",
        b"\x80",
        b"b",
        b" held back",
    ]
    job = SimpleNamespace(scored=True, answer=SimpleNamespace(prompt=[0, 1]), expected=[(-1.0, [])])
    choice = TextChoice(0, True, raws.__getitem__, job, parts[0][:3])
    ends, texts = [len(raws)], [parts[0][3:]]
    if len(parts) > 1:
        ends, texts = [2, 7, 12, 14], ["", *parts[1:]]
    start = 2
    for end, text in zip(ends, texts, strict=True):
        choice.feed(News(0, text, [(token, -1.0, []) for token in range(start, end)], None))
        start = end
    text, found = choice.whole()["text"], choice.whole()["logprobs"]
    assert text == "".join(parts) and found["text_offset"] == [0, 0, 3, 4, 5, 5, 6, 8, 9, 10, 10, 10, 10, 11]
