"""Answers in the form of OpenAI's API, whole and as chunks of a stream."""

import base64
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ftjax.generate.scheduler import Job
from ftjax.generate.speech import Call, Channels, Speech

Bytes = Callable[[int], bytes]  # the bytes of a token
BROKEN = "\N{REPLACEMENT CHARACTER}".encode()


class News(NamedTuple):
    """What is new of one job.

    Attributes:
        number: index of the job in its request.
        text: text that will not change any more.
        tokens: `(id, log-probability, [(id, log-probability) of the most probable])`, without those that end an answer, unless
            the prompt has its own before them.
        finish: `stop` or `length` at the end, otherwise None.
    """

    number: int
    text: str
    tokens: list[tuple[int, float, list[tuple[int, float]]]]
    finish: str | None


def usage(jobs: Sequence[Job], prompts: int = 1, silent: bool = False) -> dict[str, Any]:
    """Return the tokens of a request; a prompt counts once, however many answers it has.

    Args:
        prompts: number of prompts, each with an equal number of consecutive jobs.
        silent: the answers are not shown (`TextChoice.silent`).
    """
    each = len(jobs) // prompts
    firsts = jobs[::each]
    prompt = sum(len(job.answer.prompt) for job in firsts)
    answers = 0 if silent else sum(len(job.answer.tokens) for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in firsts)},
    }


def _entry(token: int, logprob: float, to_bytes: Bytes) -> dict[str, Any]:
    raw = to_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def chat_logprobs(news: News, to_bytes: Bytes) -> dict[str, Any]:
    content = [
        {
            **_entry(token, logprob, to_bytes),
            "top_logprobs": [_entry(*one, to_bytes) for one in tops],
        }
        for token, logprob, tops in news.tokens
    ]
    return {"content": content, "refusal": None}


@dataclass
class ChatChoice:
    """One choice of a chat, while it grows."""

    number: int
    speech: Speech | Channels
    with_logprobs: bool
    to_bytes: Bytes
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None

    def feed(self, news: News) -> list[dict[str, Any]]:
        """Take what is new; return it as the choices of chunks."""
        deltas: list[dict[str, Any]] = []
        for said in self.speech.feed(news.text, end=news.finish is not None):
            if said.content:
                self.content += said.content
                deltas.append({"content": said.content})
            if said.reasoning:
                self.reasoning += said.reasoning
                deltas.append({"reasoning_content": said.reasoning})
            if said.call is not None:
                call = _call(said.call)
                deltas.append({"tool_calls": [{"index": len(self.calls), **call}]})
                self.calls.append(call)
        found = chat_logprobs(news, self.to_bytes) if self.with_logprobs else None
        if found and found["content"]:
            self.logprobs += found["content"]
            deltas = deltas or [{}]
        chunks = [{"index": self.number, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        if chunks and found:
            chunks[0]["logprobs"] = found
        if news.finish is not None:
            self.finish = "tool_calls" if self.calls and news.finish == "stop" else news.finish
            chunks.append({"index": self.number, "delta": {}, "logprobs": None, "finish_reason": self.finish})
        return chunks

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self.content or (None if self.calls else ""),
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        logprobs = {"content": self.logprobs, "refusal": None} if self.with_logprobs else None
        return {"index": self.number, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}", "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }  # fmt: skip


@dataclass
class TextChoice:
    """One choice of a completion, while it grows."""

    number: int
    with_logprobs: bool
    to_bytes: Bytes
    job: Job
    echo: str = ""  # the prompt, which the text begins with
    silent: bool = False  # the text is the prompt alone
    as_ids: bool = False  # tokens are named by their ids, as several may have one text
    text: str = ""
    finish: str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    tops: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # in characters of the text
    _ahead: bytes = b""  # of the text, from the next token on
    _characters: int = 0  # before it

    def feed(self, news: News) -> list[dict[str, Any]]:
        """Take what is new; return it as the choices of chunks."""
        if self.silent:
            news = news._replace(text="", tokens=[], finish=news.finish and "length")
        said = news.text
        if self.echo and not self.text:
            said = self.echo + said
        self.text += said
        self.finish = news.finish
        found = self._listed(news, said) if self.with_logprobs else None
        if not said and news.finish is None and not (found and found["tokens"]):
            return []
        return [{"index": self.number, "text": said, "logprobs": found, "finish_reason": news.finish}]

    def _listed(self, news: News, said: str) -> dict[str, Any]:
        start, prompt = len(self.tokens), []
        if self.job.scored and not start:
            first, *others = self.job.answer.prompt
            prompt = [(first, None, None), *((token, *one) for token, one in zip(others, self.job.expected, strict=True))]
        known, at = self._ahead + said.encode(), 0
        for token, logprob, tops in (*prompt, *news.tokens):
            raw = self.to_bytes(token)
            self.tokens.append(self._name(token))
            self.logprobs.append(logprob)
            self.tops.append(None if tops is None else self._named(tops))
            self.offsets.append(self._characters)
            shown = _shown(raw, known[at : at + max(len(raw), len(BROKEN))])
            at += len(shown)
            self._characters += sum(byte & 0xC0 != 0x80 for byte in shown)  # the other bytes go on with a character
        self._ahead = known[at:]
        return self._part(start)

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.to_bytes(token).decode("utf-8", "replace")

    def _named(self, tops: list[tuple[int, float]]) -> dict[str, float]:
        """Return the most probable tokens by their names; of two with one text, the more probable."""
        return {self._name(one): value for one, value in reversed(tops)}

    def _part(self, start: int) -> dict[str, Any]:
        return {
            "tokens": self.tokens[start:], "token_logprobs": self.logprobs[start:],
            "top_logprobs": self.tops[start:], "text_offset": self.offsets[start:],
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        logprobs = self._part(0) if self.with_logprobs else None
        return {"index": self.number, "text": self.text, "logprobs": logprobs, "finish_reason": self.finish}


def _shown(token: bytes, text: bytes) -> bytes:
    """Return what a token is in its text: all of it, none of a mark such as `<s>`, a word without the space before a text.

    Args:
        text: how the text goes on from the token, as far as it is known: it may be held back, or end before a stop string.
    """
    for raw in (token, token.removeprefix(b" ")):
        if text.startswith(raw) or raw.startswith(text):
            return raw
    return BROKEN if text.startswith(BROKEN) else b""  # bytes that are no character


class Envelope:
    """What stands around the choices: the same id, time and model in every chunk of an answer."""

    def __init__(self, kind: str, model: str):
        """`kind`: `chat.completion` or `text_completion`."""
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        self._kind = kind
        self._own = {
            "id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model,
            "system_fingerprint": None,
        }  # fmt: skip

    def chunk(self, choices: list[dict[str, Any]], **used: dict[str, Any] | None) -> dict[str, Any]:
        kind = f"{self._kind}.chunk" if self._kind.startswith("chat") else self._kind
        return {**self._own, "object": kind, "choices": choices, **used}

    def whole(self, choices: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        return {**self._own, "object": self._kind, "choices": choices, "usage": used}


def embeddings(jobs: Sequence[Job], model: str, as_base64: bool) -> dict[str, Any]:
    """Return the answer to a request for embeddings."""

    def form(hidden: np.ndarray) -> Any:
        values = np.asarray(hidden, np.float32)
        return base64.b64encode(values.tobytes()).decode() if as_base64 else values.tolist()

    data = [{"object": "embedding", "index": n, "embedding": form(job.hidden)} for n, job in enumerate(jobs)]
    count = sum(len(job.answer.prompt) for job in jobs)
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": count, "total_tokens": count}}
