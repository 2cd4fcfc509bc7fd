"""One answer, from the tokens as they come to the text as it is given."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ftjax.generate.sample import Sampling
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


GREEDY = Sampling()


class Answer:
    """One prompt on its way to a `Generation`: the host's side of a row."""

    def __init__(
        self, prompt: list[int], limit: int, ends: frozenset[int], stops: StopStrings, stream: TextStream,
        *, sampling: Sampling = GREEDY, seed: int = 0, number: int = 0,
    ):  # fmt: skip
        """
        Args:
            limit: tokens of the longest answer.
            ends: ids that end it.
            stops: texts that end it.
            seed, number: make its random key.
        """
        self.prompt, self.limit, self.ends = prompt, limit, ends
        self.sampling, self.seed, self.number = sampling, seed, number
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Literal["stop", "length", "error"] | None = None  # error: the model's logits were not finite
        self._stops, self._stream = stops, stream
        self._shown = 0  # characters that `piece` has given
        self._given = 0  # tokens that `news` has given
        self._fed = 0  # tokens whose text is in `text`

    def read(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Take new tokens up to the end of the answer; what a finished row still brings means nothing."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.finish:
                return
            if not math.isfinite(logprob):
                self.finish = "error"
                return
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token in self.ends:
                self.finish = "stop"
            elif self._stops.strings:
                self._grow()
            if not self.finish and len(self.tokens) >= self.limit:
                self.finish = "length"

    def piece(self) -> str:
        """The text that is new since the last piece and will not change; all that is left, once the answer is finished."""
        if self.finish:
            self._close()
        else:
            self._grow()
        until = len(self.text) - (0 if self.finish else self._stops.open(self.text))
        shown, self._shown = self._shown, max(until, self._shown)
        return self.text[shown:until]

    def news(self) -> tuple[str, list[int]]:
        """`(piece, tokens)` that are new since the last look."""
        piece = self.piece()
        tokens, self._given = self.tokens[self._given :], len(self.tokens)
        return piece, tokens

    def generation(self, logprobs: bool = False) -> Generation:
        self._close()
        return Generation(self.text, self.tokens, self.finish, self.logprobs if logprobs else None, len(self.prompt))

    def _grow(self) -> None:
        tokens, self._fed = self.tokens[self._fed :], len(self.tokens)
        self._add(self._stream.feed([token for token in tokens if token not in self.ends]))

    def _close(self) -> None:
        if self._stream is None:
            return
        ended_by_text = self.finish == "stop" and self.tokens[-1] not in self.ends
        if not ended_by_text:
            self._grow()
            self._add(self._stream.finish())
        self._stream = None

    def _add(self, more: str) -> None:
        start = len(self.text) - self._stops.reach
        self.text += more
        at = self._stops.find(self.text, start)
        if at is not None:
            self.text, self.finish = self.text[:at], "stop"
