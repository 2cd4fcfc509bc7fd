"""What a server answers with: one base model, its adapters by name, and the jobs that requests become."""

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ftjax.errors import UserError
from ftjax.generate.answer import Answer
from ftjax.generate.paged import BIASED
from ftjax.generate.request import Request
from ftjax.generate.scheduler import Grammar, Job
from ftjax.generate.session import Generator
from ftjax.generate.speech import CallForm, Channels, Speech, form_of, has_channels, reasons, splitter, thinks
from ftjax.serve.errors import ApiError, invalid
from ftjax.serve.grammar import Grammars
from ftjax.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, Sampled
from ftjax.serve.schedule import EngineThread


@dataclass(frozen=True, eq=False)
class Voice:
    """One name that requests may ask for.

    Attributes:
        generator: renders its prompts and begins its answers, with its own tokenizer and chat template.
        adapter: number of its adapter in the engine; 0 is the base model.
        space: a number that no other voice has or had: texts share the cache within it.
    """

    name: str
    generator: Generator
    adapter: int = 0
    space: int = 0

    @cached_property
    def template(self) -> str:
        found = self.generator.tokenizer.chat_template
        return "\n".join(found.values()) if isinstance(found, dict) else found or ""

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.generator.tokenizer, self.generator.model.sizes.vocab, self.generator.ends)

    def thinking(self, ids: Sequence[int]) -> bool:
        """Return whether a prompt ends within reasoning that the template has opened."""
        if not reasons(self.template):
            return False
        return thinks(self.generator.tokenizer.decode(ids[-16:]))


class Served:
    """Turns requests into jobs.

    Attributes:
        voices: the base model first, then its adapters, by name.
    """

    def __init__(self, generator: Generator, engine: EngineThread, name: str):
        self.generator, self.engine, self.name = generator, engine, name
        self.voices = {name: Voice(name, generator)}
        self._lock = threading.Lock()  # the tokenizer is not made for several threads

    @property
    def context(self) -> int:
        return min(self.generator.context, self.engine.scheduler.batch.room.context)

    def voice(self, name: str) -> Voice:
        """Return the voice of this name. Raises ApiError, 404, if there is none."""
        found = self.voices.get(name)
        if found is None:
            known = ", ".join(self.voices)
            raise ApiError(404, f"the model {name!r} does not exist; there is {known}", "model", "model_not_found")
        return found

    def serves(self, name: str, jobs: Sequence[Job]) -> bool:
        """Return whether the name still means what it meant when these jobs were made."""
        found = self.voices.get(name)
        return found is not None and all(job.space == found.space for job in jobs)

    # ---- requests to jobs ----

    def chat(self, asked: ChatRequest) -> tuple[list[Job], list[Speech | Channels]]:
        """Return the jobs of a chat, one per choice, and what splits their answers."""
        voice = self.voice(asked.model)
        if not voice.template:
            raise invalid(f"{asked.model} has no chat template; use /v1/completions", "messages")
        if asked.top_logprobs and not asked.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        tools, form = asked.tools_for_template(), None
        if tools:
            form = form_of(voice.template)
        forced = asked.forced
        if forced and form is None:
            raise invalid("tool_choice: the chat template defines no form of calls, so that none can be forced", "tool_choice")
        arguments = asked.chat_template_kwargs
        ids = self._encode(voice, asked.for_template(), "messages", chat=True, tools=tools, template_arguments=arguments)
        thinking = voice.thinking(ids)
        speeches = [splitter(voice.template, form, thinking) for _ in range(asked.n or 1)]
        marked = has_channels(voice.template) or (form is not None and form.special)
        jobs = self._jobs(asked, voice, ids, shows_special=marked)
        for job in jobs:
            job.tops = asked.top_logprobs or 0
            job.grammar = _grammar(voice, asked, forced, form, thinking)
        return jobs, speeches

    def completion(self, asked: CompletionRequest) -> list[Job]:
        """Return the jobs of a completion: `n` per prompt, prompt by prompt."""
        voice, jobs = self.voice(asked.model), []
        if asked.best_of not in (None, asked.n or 1):
            raise invalid("best_of: only the value of n is supported", "best_of")
        if asked.max_tokens == 0 and not asked.echo:
            raise invalid("max_tokens: 0 is for the prompt alone, with echo: true", "max_tokens")
        for prompt in asked.prompts:
            ids = self._encode(voice, prompt, "prompt", chat=False)
            jobs += self._jobs(asked, voice, ids)
        for job in jobs:
            job.tops = asked.logprobs or 0
            job.scored = bool(asked.echo) and asked.logprobs is not None
        return jobs

    def echoes(self, asked: CompletionRequest, jobs: Sequence[Job]) -> list[str]:
        """Return the prompt that each choice's text begins with; nothing unless that is asked for."""
        if not asked.echo:
            return [""] * len(jobs)
        with self._lock:
            decode = self.voice(asked.model).generator.tokenizer.decode
            texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in asked.prompts]
        return [text for text in texts for _ in range(len(jobs) // len(texts))]

    def embedding(self, asked: EmbeddingRequest) -> list[Job]:
        """Return one job per input."""
        voice, jobs = self.voice(asked.model), []
        for given in asked.inputs:
            ids = self._encode(voice, given, "input", chat=False)
            answer = Answer(ids, 1, frozenset(), None, None)
            jobs.append(_job(answer, voice, pool=asked.pooling))
        return jobs

    def _jobs(self, asked: Sampled, voice: Voice, ids: list[int], shows_special: bool = False) -> list[Job]:
        sampling = asked.sampling(self.generator.settings)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        room = self.context - len(ids)
        if asked.most is not None and asked.most > room:
            raise invalid(
                f"the prompt has {len(ids)} tokens and max_tokens is {asked.most}; the context is {self.context} tokens",
                "max_tokens", "context_length_exceeded",
            )  # fmt: skip
        most = room if asked.most is None else max(1, asked.most)  # of an echo alone the token is thrown away
        bias = asked.bias(self.generator.model.sizes.vocab, BIASED)
        jobs = []
        for number in range(asked.n or 1):
            request = Request(
                ids, sampling, most, stop=asked.stops, seed=seed, number=number, logit_bias=bias
            )  # fmt: skip
            jobs.append(_job(voice.generator.begin(request, shows_special=shows_special), voice))
        return jobs

    def _encode(self, voice: Voice, prompt: Any, field: str, **how: Any) -> list[int]:
        try:
            with self._lock:
                ids = voice.generator.encode(prompt, **how)
        except UserError as error:
            raise invalid(str(error), field) from None
        if len(ids) >= self.context:
            raise invalid(
                f"the prompt has {len(ids)} tokens, and the context is {self.context}, answer included", field,
                "context_length_exceeded",
            )  # fmt: skip
        return ids


def _job(answer: Answer, voice: Voice, **more: Any) -> Job:
    return Job(answer, adapter=voice.adapter, space=voice.space, **more)


def _grammar(voice: Voice, asked: ChatRequest, forced: str | None, form: CallForm | None, thinking: bool) -> Grammar | None:
    """Return what an answer may say: a call that is forced, or what `response_format` asks for; None: anything."""
    if forced:
        tools = [tool.function for tool in asked.tools if forced in ("*", tool.function.name)]
        return voice.grammars.of_calls(form, [(one.name, one.parameters) for one in tools], thinking)
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_schema" and wanted.json_schema is None:
        raise invalid("response_format.json_schema is missing", "response_format.json_schema")
    schema = {"type": "object"} if wanted.type == "json_object" else wanted.json_schema.schema_
    return voice.grammars.of_schema(schema, thinking)
