"""One answer, from the tokens as they come to the text as it is given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ftjax.generate.text import StopStrings, TextStream


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: without the token or string that ended it.
        tokens: ids of the answer; the one that ended it included.
        finish_reason: `stop` where the model or a stop string ended it, `length` where it was cut.
        logprobs: log-probability of each token by the model itself, before temperature and the like; where asked for.
        prompt_tokens: length of the prompt.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None
    prompt_tokens: int


@dataclass
class Answer:
    """One prompt on its way to a `Generation`."""

    prompt: list[int]
    limit: int
    stream: TextStream
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None

    def read(self, tokens: Sequence[int], ends: frozenset[int], stops: StopStrings) -> None:
        """Take new tokens up to the end of the answer; what a finished row still brings is nothing."""
        for token in tokens:
            if self.finish:
                return
            self.tokens.append(token)
            if token in ends:
                self.finish = "stop"
            elif stops.strings:
                self._grow(self.stream.feed([token]), stops)
            if not self.finish and len(self.tokens) >= self.limit:
                self.finish = "length"

    def close(self, ends: frozenset[int], stops: StopStrings) -> None:
        """The whole text."""
        if not stops.strings:
            self.text = self.stream.feed([token for token in self.tokens if token not in ends])
        if self.finish != "stop" or self.tokens[-1] in ends:
            self._grow(self.stream.finish(), stops)

    def _grow(self, more: str, stops: StopStrings) -> None:
        start = len(self.text) - stops.reach
        self.text += more
        at = stops.find(self.text, start)
        if at is not None:
            self.text, self.finish = self.text[:at], "stop"
