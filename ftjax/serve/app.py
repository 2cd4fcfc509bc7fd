"""The routes of `ftjax serve`."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ftjax.errors import UserError
from ftjax.generate.scheduler import Job
from ftjax.serve.adapters import Adapters
from ftjax.serve.errors import ApiError, invalid
from ftjax.serve.forms import ChatChoice, Envelope, News, TextChoice, embeddings, usage
from ftjax.serve.metrics import Metrics
from ftjax.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, LoadAdapter, UnloadAdapter, parse
from ftjax.serve.schedule import EngineThread
from ftjax.serve.served import Served

OPEN = ("/", "/health")  # paths that need no key
LARGEST = 16 << 20  # bytes of a request


class Run:
    """The jobs of one request, from the event loop's side: their news arrive in a queue."""

    def __init__(self, jobs: Sequence[Job], engine: EngineThread, metrics: Metrics, streamed: bool):
        self.jobs, self._engine, self._metrics, self._streamed = jobs, engine, metrics, streamed
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
        self._given = [0] * len(jobs)  # tokens that were in earlier news
        self._counted = [0] * len(jobs)
        for number, job in enumerate(jobs):
            job.news = partial(self._heard, number)

    def _heard(self, number: int, job: Job) -> None:
        """Take news in the engine's thread."""
        count = len(job.answer.tokens)
        if count > self._counted[number]:
            self._metrics.came(count - self._counted[number])
            self._counted[number] = count
        if job.ended:
            self._metrics.ended(job)
        if job.cancelled or self._loop.is_closed():
            return
        if job.ended or self._streamed:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, self._news(number, job))

    def _news(self, number: int, job: Job) -> News | ApiError:
        answer = job.answer
        if job.ended and answer.finish == "error":
            return ApiError(500, "the model's logits are not finite, or the engine has failed")
        if job.pool:
            return News(number, "", [], "stop")
        start, text = self._given[number], answer.news()[0]
        self._given[number] = len(answer.tokens)
        listed = job.listed[start:] if job.tops else [[]] * (len(answer.tokens) - start)
        new = zip(answer.tokens[start:], answer.logprobs[start:], listed, strict=True)
        return News(number, text, [one for one in new if job.scored or one[0] not in answer.ends], answer.finish)

    async def news(self) -> AsyncIterator[News]:
        """Yield all news up to the end of the last job. Raises ApiError if one has failed."""
        left = len(self.jobs)
        while left:
            news = await self._queue.get()
            if isinstance(news, ApiError):
                raise news
            left -= news.finish is not None
            yield news

    def cancel(self) -> None:
        self._engine.cancel([job for job in self.jobs if not job.ended])


async def until_hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_hung_up(work: Awaitable[Any], receive: Receive, cancel: Callable[[], None]) -> Any:
    """Return the result of `work`; if the client hangs up first, call `cancel` and return None."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(until_hung_up(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        if not tasks[0].done() or tasks[0].cancelled() or tasks[0].exception():
            cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Events(Response):
    """A stream of server-sent events; ends its run when the client hangs up."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], run: Run):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._chunks, self._run = chunks, run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await unless_hung_up(self._write(send), receive, self._run.cancel)

    async def _write(self, send: Send) -> None:
        async def say(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        try:
            async for chunk in self._chunks:
                await say(json.dumps(chunk, ensure_ascii=False))
        except ApiError as error:
            self._run.cancel()
            await say(json.dumps(error.body))
        await say("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Guard:
    """Asks for the key, counts requests, and turns errors into OpenAI's form."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics):
        self._app, self._keys, self._metrics = app, [key.encode() for key in keys], metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                known = scope["path"] in PATHS
                self._metrics.requests.labels(scope["path"] if known else "other", message["status"]).inc()
            await send(message)

        if self._keys and scope["path"] not in OPEN and not self._has_key(scope):
            error = ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
            )
            await _refusal(error)(scope, receive, watched)
            return
        await self._app(scope, receive, watched)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        key = given[len(b"Bearer ") :] if given[: len(b"Bearer ")].lower() == b"bearer " else given
        return any([hmac.compare_digest(key.strip(), one) for one in self._keys])


def _refusal(error: ApiError) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers=headers)


async def read(request: HttpRequest, kind: type) -> Any:
    """Return the request's body. Raises ApiError: 413 if it is too large, 415 if it is not JSON, 400 if it is not valid, 499
    if the client hangs up.

    A page of another site can send a form or plain text from a browser without asking, but no JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "expected content-type: application/json")
    body, size = bytearray(), 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= LARGEST:
                body += part
            elif size > 4 * LARGEST:  # up to here it is read and dropped, as most clients read no answer before all is sent
                break
    except ClientDisconnect:
        raise ApiError(499, "the client hung up before its request was complete") from None
    if size > LARGEST:
        raise ApiError(413, f"the body is larger than {LARGEST >> 20} MB")
    return parse(kind, bytes(body))


class Routes:
    """The handlers; `adapters` loads and unloads adapters, or is None where the start did not allow it."""

    def __init__(self, served: Served, engine: EngineThread, metrics: Metrics, adapters: Adapters | None = None):
        self.served, self.engine, self.metrics, self.adapters = served, engine, metrics, adapters
        self.started = int(time.time())

    # ---- answers ----

    async def chat(self, request: HttpRequest) -> Response:
        asked = await read(request, ChatRequest)
        jobs, speeches = await run_in_threadpool(self.served.chat, asked)
        to_bytes = self.served.voice(asked.model).grammars.decode
        choices = [ChatChoice(n, speech, bool(asked.logprobs), to_bytes) for n, speech in enumerate(speeches)]
        envelope = Envelope("chat.completion", asked.model)
        first = [{"index": n, "delta": {"role": "assistant", "content": ""}, "finish_reason": None} for n in range(len(jobs))]
        return await self._answer(request, asked, jobs, choices, envelope, first)

    async def completion(self, request: HttpRequest) -> Response:
        asked = await read(request, CompletionRequest)
        jobs = await run_in_threadpool(self.served.completion, asked)
        to_bytes = self.served.voice(asked.model).grammars.decode
        echoes, silent, listed = self.served.echoes(asked, jobs), asked.max_tokens == 0, asked.logprobs is not None
        as_ids = bool(asked.return_tokens_as_token_ids)
        choices = [TextChoice(n, listed, to_bytes, job, echoes[n], silent, as_ids) for n, job in enumerate(jobs)]
        return await self._answer(
            request, asked, jobs, choices, Envelope("text_completion", asked.model), [], len(asked.prompts)
        )

    async def _answer(self, request, asked, jobs, choices, envelope: Envelope, first: list, prompts: int = 1) -> Response:
        run = Run(jobs, self.engine, self.metrics, bool(asked.stream))
        self.engine.submit(jobs, lambda: self.served.serves(asked.model, jobs))
        used = partial(usage, jobs, prompts, asked.most == 0)
        later = {"usage": None} if asked.with_usage else {}  # the last chunk has it

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            for choice in first:
                yield envelope.chunk([choice], **later)
            async for news in run.news():
                for choice in choices[news.number].feed(news):
                    yield envelope.chunk([choice], **later)
            if asked.with_usage:
                yield envelope.chunk([], usage=used())

        if asked.stream:
            return Events(chunks(), run)

        async def whole() -> Response:
            async for news in run.news():
                choices[news.number].feed(news)
            return JSONResponse(envelope.whole([choice.whole() for choice in choices], used()))

        found = await unless_hung_up(whole(), request.receive, run.cancel)
        return found or Response(status_code=499)

    async def embedding(self, request: HttpRequest) -> Response:
        asked = await read(request, EmbeddingRequest)
        jobs = await run_in_threadpool(self.served.embedding, asked)
        run = Run(jobs, self.engine, self.metrics, False)
        self.engine.submit(jobs, lambda: self.served.serves(asked.model, jobs))

        async def whole() -> Response:
            async for _ in run.news():
                pass
            return JSONResponse(embeddings(jobs, asked.model, asked.encoding_format == "base64"))

        return await unless_hung_up(whole(), request.receive, run.cancel) or Response(status_code=499)

    # ---- the server ----

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.served.voices]})

    async def model(self, request: HttpRequest) -> Response:
        return JSONResponse(self._model(self.served.voice(request.path_params["name"]).name))

    def _model(self, name: str) -> dict[str, Any]:
        parent = None if name == self.served.name else self.served.name
        own = {"id": name, "object": "model", "created": self.started, "owned_by": "ftjax"}
        return {**own, "root": self.served.name, "parent": parent, "max_model_len": self.served.context}

    async def health(self, request: HttpRequest) -> Response:
        if self.engine.failure is not None:
            return JSONResponse({"status": "failed"}, 500)
        if self.engine.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics_text(self, request: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: HttpRequest) -> Response:
        return HTMLResponse(files("ftjax.serve").joinpath("page/index.html").read_text(encoding="utf-8"))

    async def load_adapter(self, request: HttpRequest) -> Response:
        asked = await read(request, LoadAdapter)
        await run_in_threadpool(self._changeable().load, asked.lora_name, asked.lora_path)
        return JSONResponse({"status": "loaded", "name": asked.lora_name})

    async def unload_adapter(self, request: HttpRequest) -> Response:
        asked = await read(request, UnloadAdapter)
        await run_in_threadpool(self._changeable().unload, asked.lora_name)
        return JSONResponse({"status": "unloaded", "name": asked.lora_name})

    def _changeable(self) -> Adapters:
        if self.adapters is None:
            raise ApiError(403, "adapters are loaded by request only if the server was started with --adapter-root DIR")
        return self.adapters


ROUTES = (
    ("/", "page", "GET"),
    ("/health", "health", "GET"),
    ("/metrics", "metrics_text", "GET"),
    ("/v1/models", "models", "GET"),
    ("/v1/models/{name:path}", "model", "GET"),
    ("/v1/chat/completions", "chat", "POST"),
    ("/v1/completions", "completion", "POST"),
    ("/v1/embeddings", "embedding", "POST"),
    ("/v1/load_lora_adapter", "load_adapter", "POST"),
    ("/v1/unload_lora_adapter", "unload_adapter", "POST"),
)
PATHS = {path for path, _, _ in ROUTES}


def make_app(served: Served, engine: EngineThread, *, keys: Sequence[str] = (), adapters: Adapters | None = None) -> ASGIApp:
    """Return the ASGI application; the engine's thread must have been started."""
    metrics = Metrics(engine)
    handlers = Routes(served, engine, metrics, adapters)

    async def api_error(request: HttpRequest, error: ApiError) -> Response:
        return _refusal(error)

    async def user_error(request: HttpRequest, error: UserError) -> Response:
        return _refusal(invalid(str(error), None))

    async def http_error(request: HttpRequest, error: Any) -> Response:
        return _refusal(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    app = Starlette(
        routes=[Route(path, getattr(handlers, name), methods=[method]) for path, name, method in ROUTES],
        exception_handlers={ApiError: api_error, UserError: user_error, 404: http_error, 405: http_error},
    )
    return Guard(app, keys, metrics)
