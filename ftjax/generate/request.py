"""Requests for generation: a prompt, sampling settings and stopping criteria."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ftjax.data.example import Example, Message
from ftjax.errors import UserError
from ftjax.generate.sample import Sampling

Prompt = str | Sequence[Message] | Sequence[int] | Example


@dataclass(frozen=True)
class Request:
    """One prompt and all settings that its answer depends on, besides the model.

    Attributes:
        prompt: a text, a list of messages, a data `Example` (its prompt is used), or token ids. All but token ids are rendered
            as in training (`ftjax.data.template.render_prompt`).
        sampling: how tokens are chosen.
        max_new_tokens: maximum length of the answer; the model's context may limit it further.
        stop: strings that end an answer and are not part of it.
        seed, number: determine the PRNG key of the answer.
        chat: whether to render a text as a user message with the chat template; None: if the tokenizer has one.
        tools: functions that the model may call, as JSON schemas for the chat template.
        logit_bias: added to the logits of single tokens, by id.
        template_arguments: further arguments of the chat template, such as `enable_thinking`.
    """

    prompt: Prompt = ""
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    number: int = 0
    chat: bool | None = None
    tools: list[Any] | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    template_arguments: Mapping[str, Any] | None = None

    def __post_init__(self):
        """Check and normalise the fields. Raises UserError if `max_new_tokens` is less than 1."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens}; expected at least 1")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))

    @classmethod
    def of(cls, prompt: Prompt = "", **settings: Any) -> "Request":
        """Create a request from its own attributes and those of `Sampling`, by name.

        Raises UserError for values out of range, and for a setting that there is not.
        """
        names = {one.name for one in fields(Sampling)}
        known = sorted(names | {one.name for one in fields(cls)} - {"prompt", "sampling"})
        if unknown := [name for name in settings if name not in known]:
            raise UserError(f"there is no setting {', '.join(unknown)}; there are {', '.join(known)}")
        sampling = Sampling(**{name: settings.pop(name) for name in names & settings.keys()})
        return cls(prompt, sampling, **settings)


@dataclass(frozen=True)
class Piece:
    """A streamed piece of one of several answers.

    Attributes:
        index: index of the request, from 0.
        text: new text, which will not change any more.
        tokens: new token ids; their text may come with a later piece.
        finish_reason: `stop` or `length` in the last piece of an answer, otherwise None.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: str | None
