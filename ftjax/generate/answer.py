"""Collect the tokens of one answer and turn them into text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ftjax.generate.sample import Sampling
from ftjax.generate.text import StopStrings, TextStream


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: text of the answer, without the token or string that ended it.
        tokens: token ids of the answer, including the one that ended it.
        finish_reason: `stop` if the model or a stop string ended the answer, `length` if it reached the token limit.
        logprobs: log-probability of each token under the model itself, before temperature and other sampling settings;
            None unless requested.
        prompt_tokens: length of the prompt in tokens.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None
    prompt_tokens: int

    @property
    def truncated(self) -> bool:
        """Whether it reached the token limit."""
        return self.finish_reason == "length"


GREEDY = Sampling()


class Answer:
    """Host-side state of one row, from its prompt to the finished `Generation`."""

    def __init__(
        self, prompt: list[int], limit: int, ends: frozenset[int], stops: StopStrings, stream: TextStream,
        *, sampling: Sampling = GREEDY, seed: int = 0, number: int = 0, bias: Mapping[int, float] | None = None,
    ):  # fmt: skip
        """
        Args:
            limit: maximum length of the answer in tokens.
            ends: token ids that end the answer.
            stops: strings that end the answer.
            seed, number: determine the row's PRNG key.
            bias: added to the logits of single tokens.
        """
        self.prompt, self.limit, self.ends = prompt, limit, ends
        self.sampling, self.seed, self.number = sampling, seed, number
        self.bias = dict(bias or {})
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Literal["stop", "length", "error"] | None = None  # error: the model's logits were not finite
        self._stops, self._stream = stops, stream
        self._shown = 0  # characters that `piece` has returned
        self._given = 0  # tokens that `news` has returned
        self._fed = 0  # tokens already decoded into `text`

    def read(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Append new tokens up to the end of the answer; ignore what a finished row still produces."""
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

    def end(self) -> None:
        """End the answer after the tokens that it has: a grammar allows no more."""
        self._grow()
        self._add(self._stream.finish())
        self.finish = "stop"

    def piece(self) -> str:
        """Return the new text that will not change any more; once the answer is finished, all remaining text."""
        if self.finish:
            self._close()
        else:
            self._grow()
        until = len(self.text) - (0 if self.finish else self._stops.open(self.text))
        shown, self._shown = self._shown, max(until, self._shown)
        return self.text[shown:until]

    def news(self) -> tuple[str, list[int]]:
        """Return `(text, tokens)` that are new since the last call."""
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
