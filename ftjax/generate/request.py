"""What is asked of a model: a prompt, how tokens are chosen, and when to stop."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ftjax.data.example import Example, Message
from ftjax.errors import UserError
from ftjax.generate.sample import Sampling

Prompt = str | Sequence[Message] | Sequence[int] | Example


@dataclass(frozen=True)
class Request:
    """One prompt and everything that its answer depends on, besides the model.

    Attributes:
        prompt: a text, a list of messages, an `Example` of data (its prompt), or token ids; all but the last become what
            training saw (`ftjax.data.template.render_prompt`).
        sampling: how tokens are chosen.
        max_new_tokens: the longest answer; shorter where the model's context ends.
        stop: strings that end an answer and are not part of it.
        seed, number: make the random key of the answer.
        chat: whether a text is a user's message in the chat template; None: where the tokenizer has one.
        tools: functions that the model may call, as JSON schemas for the chat template.
    """

    prompt: Prompt = ""
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    number: int = 0
    chat: bool | None = None
    tools: list[Any] | None = None

    def __post_init__(self):
        """Raises UserError for an answer without a token."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens}; expected at least 1")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))

    @classmethod
    def of(cls, prompt: Prompt = "", **settings: Any) -> "Request":
        """A request by the names of its own attributes and of those of `Sampling`.

        Raises UserError for values out of range.
        """
        names = {one.name for one in fields(Sampling)}
        sampling = Sampling(**{name: settings.pop(name) for name in names & settings.keys()})
        return cls(prompt, sampling, **settings)


@dataclass(frozen=True)
class Piece:
    """What is new of one of several answers.

    Attributes:
        index: which request it answers, counted from 0.
        text: what is new and will not change.
        tokens: ids that are new; their text may come with a later piece.
        finish_reason: `stop` or `length` in the last piece of an answer.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: str | None
