"""A model for inference: answers, conversations, scores and embeddings."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast, overload

import numpy as np

from ftjax.errors import UserError
from ftjax.generate.answer import Generation
from ftjax.generate.context import recommended
from ftjax.generate.conversation import Conversation
from ftjax.generate.named import LoadOptions
from ftjax.generate.open import Opened, mesh_of, open_model
from ftjax.generate.request import Request
from ftjax.generate.score import Score

Message = dict[str, Any]
Prompt = str | list[Message]
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


class Sampled(TypedDict, total=False):
    """Settings of answers. Without `temperature` the most likely token is taken each time.

    `max_new_tokens` is 256 by default; `stop` ends an answer before one of these texts; `seed` decides what is drawn.
    """

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: str | Sequence[str]
    seed: int


def load(
    path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None, *, revision: str | None = None,
    tokenizer: str | None = None, chat_template: str | None = None, quantization: Literal["int8", "nf4", "none"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto", mesh: Mapping[str, int] | None = None,
) -> "Model":  # fmt: skip
    """Load a model for inference.

    >>> model = ftjax.load("runs/first")
    >>> answer = model.generate("Tom went to", max_new_tokens=4)

    Args:
        path: a run, its `final/` or `best/`, a PEFT folder, a Hub id, a model folder or a .gguf file.
        adapter: a PEFT folder or a run, to put on the model.
        revision: branch, tag or commit of the model on the Hub.
        tokenizer: another tokenizer than the model's own.
        chat_template: a Jinja template, or the path of a .jinja file.
        quantization: quantise the weights of dense layers; None does as the run did.
        dtype: of weights and activations; `auto` is float32 on CPUs and bfloat16 elsewhere.
        mesh: sizes of mesh axes, such as `{"tensor": 4}`; None uses one device.

    Raises UserError if anything is missing, damaged or not supported.
    """
    options = LoadOptions(
        None if adapter is None else Path(adapter), revision, tokenizer, chat_template, quantization, dtype=dtype
    )
    return Model(open_model(os.fspath(path), options, mesh_of(mesh or {})))


class Model:
    """A loaded model; `load` and `Run.model` return one.

    >>> model = ftjax.load("runs/first")

    Attributes:
        name: what it was loaded from.
        tokenizer: its tokenizer, of transformers.
    """

    def __init__(self, opened: Opened):
        """Wrap an opened model; callers use `ftjax.load`."""
        self._generator, self._chat = opened.generator, opened.chat
        self.name = opened.named.name
        self.tokenizer: Any = opened.generator.tokenizer

    def __repr__(self) -> str:
        return f"Model({self.name})"

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._generator.context

    @overload
    def generate(
        self, prompt: Prompt, *, system: str | None = None, raw: bool = False, batch_size: int = 32, **settings: Unpack[Sampled]
    ) -> str: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[Message]], *, system: str | None = None, raw: bool = False, batch_size: int = 32,
        **settings: Unpack[Sampled],
    ) -> list[str]: ...  # fmt: skip
    def generate(
        self, prompt: Prompt | list[str] | list[list[Message]], *, system: str | None = None, raw: bool = False,
        batch_size: int = 32, **settings: Unpack[Sampled],
    ) -> str | list[str]:  # fmt: skip
        """Answer a prompt, or a list of prompts in batches.

        >>> len(model.generate(["Tom went", "The dog"], max_new_tokens=4, temperature=0.7, seed=1))
        2

        Args:
            prompt: a text, which is rendered as in training; a list of messages (`{"role": ..., "content": ...}`); or a list
                of either.
            system: a system message for each prompt.
            raw: give texts to the model without its chat template.

        Raises UserError for settings out of range, and for a prompt that is empty or does not fit into the context.
        """
        several = _several(prompt)
        prompts = cast(list[Prompt], prompt if several else [prompt])
        found = self.answer(prompts, system=system, raw=raw, batch_size=batch_size, **settings)
        return [one.text for one in found] if several else found[0].text

    def answer(
        self, prompts: Sequence[Prompt], *, system: str | None = None, raw: bool = False, batch_size: int = 32,
        logprobs: bool = False, **settings: Unpack[Sampled],
    ) -> list[Generation]:  # fmt: skip
        """Answer prompts like `generate`, with the tokens, why each answer ended and, if asked for, log-probabilities.

        >>> answer = model.answer(["Tom went"], max_new_tokens=4, logprobs=True)[0]
        >>> answer.finish_reason, len(answer.logprobs)
        ('length', 4)
        """
        if not _several(prompts):
            raise UserError("answer takes a list of prompts; put a single one into a list")
        requests = [self._request(one, system, raw, number, settings) for number, one in enumerate(prompts)]
        return self._generator.answer(requests, batch_size=batch_size, logprobs=logprobs)

    def stream(
        self, prompt: Prompt, *, system: str | None = None, raw: bool = False, **settings: Unpack[Sampled]
    ) -> Iterator[str]:
        """Yield the answer to one prompt piece by piece; arguments and errors are those of `generate`.

        >>> text = "".join(model.stream("Tom went", max_new_tokens=4))
        """
        request = self._request(prompt, system, raw, 0, settings)
        return (piece.text for piece in self._generator.stream([request]) if piece.text)

    def chat(self, system: str | None = None, **settings: Unpack[Sampled]) -> "Chat":
        """Begin a conversation. Sampling settings that are not given are the model's own, of its generation_config.json.

        >>> talk = model.chat(system="Be brief.", max_new_tokens=4)
        >>> answer = talk.say("Where did Tom go?")
        >>> [message["role"] for message in talk.messages]
        ['system', 'user', 'assistant']

        Raises UserError if the tokenizer has no chat template.
        """
        given: dict[str, Any] = dict(settings)
        asked = {name: given.pop(name, None) for name in SAMPLING}
        request = replace(Request.of(**{"max_new_tokens": 512, **given}), sampling=recommended(self._generator.settings, asked))
        return Chat(Conversation(self._generator, request, system=system))

    @overload
    def score(self, prompt: Prompt, completion: str) -> Score: ...
    @overload
    def score(
        self, prompt: list[str] | list[list[Message]], completion: Sequence[str], *, batch_size: int = 32
    ) -> list[Score]: ...
    def score(
        self, prompt: Prompt | list[str] | list[list[Message]], completion: str | Sequence[str], *, batch_size: int = 32
    ) -> Score | list[Score]:
        """Return the log-likelihood of a completion after its prompt, token by token; for lists, of each pair.

        >>> model.score("Tom went", " home").total < 0
        True

        Raises UserError for an empty completion, and for a text that does not fit into the context.
        """
        if isinstance(completion, str):
            if _several(prompt):
                raise UserError(f"score: {len(prompt)} prompts and one completion; give as many completions as prompts")
            return self._generator.score([cast(Prompt, prompt)], [completion], chat=self._chat)[0]
        if not _several(prompt) or len(prompt) != len(completion):
            count = len(prompt) if _several(prompt) else 1
            raise UserError(f"score: {count} prompts and {len(completion)} completions; give one completion for each prompt")
        return self._generator.score(cast(list[Prompt], prompt), completion, batch_size=batch_size, chat=self._chat)

    def embed(
        self, texts: str | Sequence[str], *, pooling: Literal["last", "mean"] = "last", batch_size: int = 32
    ) -> np.ndarray:
        """Return an embedding of a text, float32 `[E]`, or of each text in a list, `[N, E]`.

        >>> model.embed(["Tom went", "The dog"], pooling="mean").shape[0]
        2

        Args:
            pooling: the hidden state of the last token, or the mean of all.
        """
        one = isinstance(texts, str)
        found = self._generator.embed([texts] if one else texts, pooling=pooling, batch_size=batch_size)
        return found[0] if one else found

    def _request(self, prompt: Prompt, system: str | None, raw: bool, number: int, settings: Mapping[str, Any]) -> Request:
        if system is not None:
            if raw:
                raise UserError("system needs the chat template, which raw leaves out; choose one")
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = [{"role": "system", "content": system}, *(turn for turn in turns if turn.get("role") != "system")]
        return Request.of(prompt, number=number, chat=False if raw else self._chat, **settings)


class Chat:
    """A conversation with a model, which keeps the earlier turns in its cache; `Model.chat` returns one.

    >>> talk = ftjax.load("runs/first").chat(max_new_tokens=4)
    """

    def __init__(self, conversation: Conversation):
        """Wrap a conversation; callers use `Model.chat`."""
        self._conversation = conversation

    @property
    def messages(self) -> list[Message]:
        """What was said: `[{"role": ..., "content": ...}, ...]`."""
        return [dict(message) for message in self._conversation.messages]

    def say(self, text: str) -> str:
        """Return the answer to a message.

        >>> answer = talk.say("Where did Tom go?")

        Raises UserError if the conversation no longer fits into the model's context.
        """
        return "".join(self._conversation.ask(text))

    def stream(self, text: str) -> Iterator[str]:
        """Yield the answer to a message piece by piece.

        >>> pieces = list(talk.stream("And then?"))
        """
        return self._conversation.ask(text)

    def undo(self) -> str | None:
        """Forget the last message and its answer; return the message, or None if there is none.

        >>> talk.undo()
        'And then?'
        """
        return self._conversation.undo()


def _several(prompt: Any) -> bool:
    """Return whether it is a list of prompts, not a text or a list of messages. Raises UserError if it is none of these."""
    if not isinstance(prompt, Sequence):
        raise UserError(f"expected a text, a list of messages, or a list of either; found {type(prompt).__name__}")
    return not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], Mapping))
